"""The tasks, each a module of its own. `task_for` finds the one of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_store.pretrained import reads_images
from tunesmith_trainer.tasks.base import Task

__all__ = ["task_for"]

_MODULES = {
    TaskName.CHAT_SFT: ("causal_lm", "ChatSFT"),
    TaskName.CAUSAL_LM: ("causal_lm", "CausalLM"),
    TaskName.MASKED_LM: ("masked_lm", "MaskedLM"),
    TaskName.SEQUENCE_CLASSIFICATION: ("sequence_classification", "SequenceClassification"),
    TaskName.TOKEN_CLASSIFICATION: ("token_classification", "TokenClassification"),
    TaskName.SEQ2SEQ: ("seq2seq", "Seq2Seq"),
    TaskName.DPO: ("dpo", "DPO"),
    TaskName.REWARD: ("reward", "Reward"),
    TaskName.IMAGE_CLASSIFICATION: ("image_classification", "ImageClassification"),
}
_VISION_CHAT = ("vision_chat", "VisionChat")


def task_for(plan: TrainingPlan, config: Mapping[str, Any] | None = None) -> Task:
    """Return the plan's task. Imports its module only: no torch, no transformers.

    `config` is the model's config.json: it says whether a chat model takes images. Without it, it doesn't.
    """
    takes_images = plan.task is TaskName.CHAT_SFT and config is not None and reads_images(config)
    module, name = _VISION_CHAT if takes_images else _MODULES[plan.task]
    task: Task = getattr(import_module(f"tunesmith_trainer.tasks.{module}"), name)(plan)
    return task
