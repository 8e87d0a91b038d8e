"""The folder of the model that training begins with: fetched, and what its files say of it. No torch.

`assembly` and `training_process` fetch it, the memory estimate is made from it.
"""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith_api.memory.facts import ModelFacts
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_store.files import fetch_model
from tunesmith_store.store import ObjectStore
from tunesmith_store.weights import stored_tensors

__all__ = ["facts_of", "fetch_base"]


def fetch_base(plan: TrainingPlan, store: ObjectStore, scratch: Path) -> Path:
    """Fetch the model's folder once per pod, without the weights where they begin at random; return where it is.

    Raises:
        UserError: there is no such model.
        Retryable: the store can't be reached, or the model is being rewritten.
    """
    return fetch_model(store, plan.model_uri, scratch / "model", weights=plan.model_init is Init.PRETRAINED)


def facts_of(folder: Path) -> ModelFacts:
    """Read a model's sizes from its folder; where there are no weights, config.json must do."""
    return ModelFacts.of(json.loads((folder / "config.json").read_text()), stored_tensors(folder))
