"""The tasks, each a module of its own. `task_for` finds the one of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_trainer.tasks.base import Task

__all__ = ["task_for"]


def task_for(plan: TrainingPlan, config: Mapping[str, Any] | None = None) -> Task:
    """Return the plan's task. Imports its module only: no torch, no transformers.

    `config` is the model's config.json: it says whether a chat model sees. Without it, it doesn't.
    """
    match plan.task:
        case TaskName.CHAT_SFT if config is not None and "vision_config" in config:
            from tunesmith_trainer.tasks.visionchat import VisionChat

            return VisionChat(plan)
        case TaskName.CHAT_SFT:
            from tunesmith_trainer.tasks.language import ChatSFT

            return ChatSFT(plan)
        case TaskName.CAUSAL_LM:
            from tunesmith_trainer.tasks.language import CausalLM

            return CausalLM(plan)
        case TaskName.MASKED_LM:
            from tunesmith_trainer.tasks.masked import MaskedLM

            return MaskedLM(plan)
        case TaskName.SEQUENCE_CLASSIFICATION:
            from tunesmith_trainer.tasks.classification import SequenceClassification

            return SequenceClassification(plan)
        case TaskName.TOKEN_CLASSIFICATION:
            from tunesmith_trainer.tasks.tokens import TokenClassification

            return TokenClassification(plan)
        case TaskName.SEQ2SEQ:
            from tunesmith_trainer.tasks.seq2seq import Seq2Seq

            return Seq2Seq(plan)
        case TaskName.DPO:
            from tunesmith_trainer.tasks.preference import DPO

            return DPO(plan)
        case TaskName.REWARD:
            from tunesmith_trainer.tasks.preference import Reward

            return Reward(plan)
        case TaskName.IMAGE_CLASSIFICATION:
            from tunesmith_trainer.tasks.images import ImageClassification

            return ImageClassification(plan)
