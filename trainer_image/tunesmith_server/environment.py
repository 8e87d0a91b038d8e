"""What the pod gives its container: the plan, a scratch folder, a CPU limit, a place for the termination message."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import TerminationReport
from tunesmith_store.errors import UserError

__all__ = ["cpu_threads", "read_plan", "scratch_folder", "write_report"]


def read_plan(environment: Mapping[str, str]) -> ServingPlan:
    """Read the mounted ServingPlan.

    Raises:
        UserError: there is none, or it was written for another version of this image.
    """
    path = Path(environment.get(keys.ENV_PLAN, f"{keys.PLAN_DIRECTORY}/{keys.PLAN_FILE}"))
    try:
        return ServingPlan.from_json(path.read_bytes())
    except OSError as error:
        raise UserError(Reason.INVALID_SPEC, f"no plan at {path}: {error.strerror}") from error
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        message = f"the plan does not fit this image (fields {fields}): use an image of the operator's version"
        raise UserError(Reason.INVALID_SPEC, message) from error


def scratch_folder(environment: Mapping[str, str]) -> Path:
    """Return the writable folder of the pod."""
    folder = Path(environment.get(keys.ENV_SCRATCH, keys.SCRATCH_DIRECTORY))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cpu_threads(environment: Mapping[str, str]) -> int:
    """Return how many threads may compute: the pod's CPU limit, rounded down, at least 1.

    llama.cpp's threads wait for each other in a busy loop: one more than there are cores makes it many times slower.
    """
    cores = len(os.sched_getaffinity(0))
    millicores = int(environment.get(keys.ENV_CPU_LIMIT) or cores * 1000)
    return max(1, min(millicores // 1000, cores))


def write_report(report: TerminationReport) -> None:
    """Leave the result where the kubelet picks it up."""
    path = Path(os.environ.get(keys.ENV_TERMINATION_LOG, keys.TERMINATION_LOG))
    try:
        path.write_text(report.to_bounded_json())
    except OSError as error:
        logging.getLogger("tunesmith").warning("can't write the termination message to %s: %s", path, error)
