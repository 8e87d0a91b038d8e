"""What pods say of themselves, as far as a status can hold it. A user's code runs in them: any of it may be wrong.

The one way by which a report enters the operator: the progress client reads answers with it, pod views termination
messages. What is no report is none; a number or a text that no status can hold is brought within bounds or dropped,
and the rest of the report counts. A report of our own trainer comes out as it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from tunesmith_api.reports import CheckpointRef, ModelRef, ProgressReport, TerminationReport

__all__ = ["read_progress", "read_termination"]

R = TypeVar("R", bound=BaseModel)

LARGEST: Final = 2**53 - 1
"""Of the whole numbers that every JSON library reads as they are."""
LATEST: Final = 253402300799.0
"""The last second of the year 9999, which no later time can be written as."""
LONGEST_TEXT: Final = 4096
MOST_METRICS: Final = 64
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_METRIC: Final = re.compile(r"[^\s\x00-\x1f\x7f-\x9f]{1,63}")
_URI: Final = re.compile(r"(s3|pvc|hf)://[!-~]{1,1024}")
_DIGEST: Final = re.compile(r"[0-9a-f]{0,128}")


def read_progress(text: bytes | str) -> ProgressReport | None:
    """The report that a pod serves, within bounds; None where it is none."""
    try:
        report = _bounded(ProgressReport.from_json(text))
    except ValidationError:
        return None
    update = {
        "epoch": min(max(report.epoch, 0.0), float(LARGEST)),
        "heartbeat_unix": min(max(report.heartbeat_unix, 0.0), LATEST),
        "checkpoint": _saved(report.checkpoint),
    }
    return report.model_copy(update=update)


def read_termination(text: str) -> TerminationReport | None:
    """The report in a termination message, within bounds; None where the message is none."""
    if not text.startswith("{"):
        return None
    try:
        report = _bounded(TerminationReport.from_json(text))
    except ValidationError:
        return None
    return report.model_copy(update={"checkpoint": _saved(report.checkpoint), "model": _model(report.model)})


def _saved(checkpoint: CheckpointRef | None) -> CheckpointRef | None:
    return checkpoint if checkpoint is not None and _URI.fullmatch(checkpoint.uri) else None


def _model(model: ModelRef | None) -> ModelRef | None:
    is_one = model is not None and _URI.fullmatch(model.uri) and _DIGEST.fullmatch(model.digest)
    return model if is_one else None


def _bounded(report: R) -> R:
    fields = type(report).model_fields.items()
    return report.model_copy(update={name: _within(getattr(report, name), info.default) for name, info in fields})


def _within(value: Any, default: Any) -> Any:
    """A field's value within bounds; its default in place of a number that is none."""
    if isinstance(value, BaseModel):
        return _bounded(value)
    if isinstance(value, Mapping):
        return _numbers(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else default
    if isinstance(value, int):
        return min(max(value, 0), LARGEST)
    if isinstance(value, str) and not isinstance(value, Enum):
        return _CONTROL.sub(" ", value[:LONGEST_TEXT])
    return value


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    good = [name for name, value in metrics.items() if math.isfinite(value) and _METRIC.fullmatch(name)]
    return {name: metrics[name] for name in good[:MOST_METRICS]}
