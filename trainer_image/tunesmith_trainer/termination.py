"""The pod's last word, in the kubelet's termination log. Written by `supervisor`, also when all else died."""

from __future__ import annotations

from pathlib import Path

from tunesmith_api.reports import ProgressReport, TerminationReport

__all__ = ["completed_from", "write"]


def completed_from(report: TerminationReport, progress: ProgressReport, restarts: int) -> TerminationReport:
    """Fill in what the process that ended could not tell, from the last progress it made."""
    return report.model_copy(
        update={
            "global_step": report.global_step or progress.global_step,
            "max_steps": report.max_steps or progress.max_steps,
            "restarts": max(report.restarts, progress.restarts, restarts),
            "checkpoint": report.checkpoint or progress.checkpoint,
            "dataset": report.dataset or progress.dataset,
            "phase_seconds": report.phase_seconds or progress.phase_seconds,
        }
    )


def write(path: Path, report: TerminationReport) -> None:
    """Write the report, cut to what the kubelet keeps."""
    path.write_text(report.to_bounded_json())
