"""How the container of a Job ends: with what it did, or why not, as its report. Used by `quantize` and `adapters`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.reports import Outcome, TerminationReport
from tunesmith_server.environment import write_report
from tunesmith_server.quantizers.conversion import DISK_FULL
from tunesmith_store.errors import FULL, Failure

__all__ = ["run_job"]


def run_job(attempt: Callable[[], TerminationReport], log: logging.Logger) -> int:
    """Make an attempt, leave its report, or that of its failure, and return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    try:
        report, code = attempt(), ExitCode.SUCCESS
    except Failure as failure:
        report, code = _failed(failure.reason, failure.message), failure.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            report, code = _failed(Reason.DISK_FULL, DISK_FULL), ExitCode.STORAGE_DENIED
        else:
            log.exception("unexpected failure")
            message = f"unexpected {type(error).__name__}: {error}"
            report, code = _failed(Reason.QUANTIZATION_FAILED, message), ExitCode.CRASHED
    log.info("%s: %s", report.reason, report.message)
    write_report(report)
    return int(code)


def _failed(reason: Reason, message: str) -> TerminationReport:
    return TerminationReport(outcome=Outcome.FAILED, reason=reason, message=message)
