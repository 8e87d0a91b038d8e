"""Fetches the model that training begins with. Used by `assembly`, and by `training` while it still imports torch."""

from __future__ import annotations

from pathlib import Path

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_store.files import fetch_model
from tunesmith_store.store import ObjectStore

__all__ = ["fetch_base"]


def fetch_base(plan: TrainingPlan, store: ObjectStore, scratch: Path) -> Path:
    """Fetch the model's folder once per pod, without the weights where they begin at random; return where it is.

    Raises:
        UserError: there is no such model.
        Retryable: the store can't be reached, or the model is being rewritten.
    """
    return fetch_model(store, plan.model_uri, scratch / "model", weights=plan.model_init is Init.PRETRAINED)
