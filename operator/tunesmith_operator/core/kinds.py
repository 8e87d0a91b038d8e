"""The registry of kinds: the one place, beside its own folder, where the operator learns of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith_operator.core.finetunejob.registration import FINE_TUNE_JOB
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.modeldeployment.registration import MODEL_DEPLOYMENT
from tunesmith_operator.core.reconcile.kind import Kind

__all__ = ["KINDS", "kind_of", "owner_key"]

KINDS: tuple[Kind[Any, Any], ...] = (FINE_TUNE_JOB, MODEL_DEPLOYMENT)


def kind_of(key: Key) -> Kind[Any, Any]:
    """The kind of the resource that the key names."""
    return next(kind for kind in KINDS if kind.resource.kind == key.kind)


def owner_key(namespace: str, labels: Mapping[str, str]) -> Key | None:
    """The custom resource that an object with these labels belongs to."""
    return next((kind.key(namespace, labels[kind.label]) for kind in KINDS if kind.label in labels), None)
