"""The tasks, each a module of its own. `task_for` finds the one of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_trainer.tasks.base import Task

__all__ = ["task_for"]

_WHERE = {
    TaskName.CHAT_SFT: ("language", "ChatSFT"),
    TaskName.CAUSAL_LM: ("language", "CausalLM"),
    TaskName.MASKED_LM: ("masked", "MaskedLM"),
    TaskName.SEQUENCE_CLASSIFICATION: ("classification", "SequenceClassification"),
    TaskName.TOKEN_CLASSIFICATION: ("tokens", "TokenClassification"),
    TaskName.SEQ2SEQ: ("seq2seq", "Seq2Seq"),
    TaskName.DPO: ("preference", "DPO"),
    TaskName.REWARD: ("preference", "Reward"),
    TaskName.IMAGE_CLASSIFICATION: ("images", "ImageClassification"),
}
_SEEING_CHAT = ("visionchat", "VisionChat")


def task_for(plan: TrainingPlan, config: Mapping[str, Any] | None = None) -> Task:
    """Return the plan's task. Imports its module only: no torch, no transformers.

    `config` is the model's config.json: it says whether a chat model sees. Without it, it doesn't.
    """
    sees = plan.task is TaskName.CHAT_SFT and config is not None and "vision_config" in config
    module, name = _SEEING_CHAT if sees else _WHERE[plan.task]
    task: Task = getattr(import_module(f"tunesmith_trainer.tasks.{module}"), name)(plan)
    return task
