"""Objects for tests: valid by default, changed by keyword."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

from tunesmith_api import keys
from tunesmith_api.reports import CheckpointRef, ModelRef, Outcome, TerminationReport
from tunesmith_operator.core.config import Config

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
CONFIG = Config(
    trainer_image="localhost/trainer:1", server_image="localhost/server:1", operator_namespace="tunesmith-system"
)
DIGEST = "d" * 64


def at(seconds: float = 0) -> datetime:
    """So many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


def stamp(seconds: float = 0) -> str:
    """The same, as Kubernetes writes it."""
    return at(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge patch."""
    result = copy.deepcopy(base)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        elif value is None:
            result.pop(name, None)
        else:
            result[name] = copy.deepcopy(value)
    return result


def finetunejob(name: str = "sentiment", namespace: str = "ml", **spec: Any) -> dict[str, Any]:
    """A FineTuneJob of two workers."""
    base = {
        "model": {"uri": "s3://models/base"},
        "dataset": {"train": {"uri": "s3://data/train.jsonl"}},
        "workers": {"replicas": 2, "resources": {"cpu": "1", "memory": "1Gi"}},
        "checkpoint": {"uri": "s3://checkpoints/sentiment"},
        "output": {"uri": "s3://models/sentiment"},
        "storage": {"endpointURL": "http://s3.storage.svc:8333", "secretRef": {"name": "s3"}},
        "failurePolicy": {"startupTimeoutSeconds": 60},
    }
    return {
        "apiVersion": keys.API_VERSION,
        "kind": keys.FINETUNEJOB_KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": merged(base, spec),
    }


def modeldeployment(name: str = "sentiment", namespace: str = "ml", **spec: Any) -> dict[str, Any]:
    """A ModelDeployment of a model folder, one replica."""
    base = {"source": {"uri": "s3://models/sentiment"}, "storage": {"secretRef": {"name": "s3"}}}
    return {
        "apiVersion": keys.API_VERSION,
        "kind": keys.MODELDEPLOYMENT_KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": merged(base, spec),
    }


def succeeded(step: int = 10, **changes: Any) -> TerminationReport:
    """What a trainer leaves after success."""
    values: dict[str, Any] = {
        "outcome": Outcome.SUCCEEDED,
        "reason": keys.Reason.COMPLETED,
        "message": "10 steps, loss 2.1 to 0.4",
        "global_step": step,
        "max_steps": step,
        "checkpoint": CheckpointRef(step=step, uri=f"s3://checkpoints/sentiment/step-{step:08d}"),
        "model": ModelRef(uri="s3://models/sentiment", digest=DIGEST, size_bytes=12),
        "metrics": {"trainLoss": 0.4123, "evalLoss": 0.5},
    }
    return TerminationReport(**{**values, **changes})


def failed(reason: keys.Reason = keys.Reason.DATASET_INVALID, **changes: Any) -> TerminationReport:
    """What a trainer leaves after a user's error."""
    message = "s3://data/train.jsonl line 3: not JSON: correct the line"
    return TerminationReport(**{"outcome": Outcome.FAILED, "reason": reason, "message": message, **changes})
