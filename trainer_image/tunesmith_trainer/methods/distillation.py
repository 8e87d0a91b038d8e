"""Learning from a teacher's probabilities beside the data's own answers (Hinton et al., 2015).

Called by `assembly` in place of the task's loss. Both models are asked for the same positions of the same batch, so the
loss is a sum over the task's units like any other.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_api.v1alpha1.method import Distillation
from tunesmith_api.v1alpha1.task import ProblemType
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.attention import packed_implementation
from tunesmith_trainer.models.loading import new_modules, stored_dtype
from tunesmith_trainer.models.numerics import Numerics
from tunesmith_trainer.tasks.base import IGNORE, Batch, Prediction, Task

__all__ = ["Distiller"]

_FIELD = "spec.method.distillation"


@dataclass(frozen=True)
class Distiller:
    """A teacher and how much it has to say."""

    teacher: nn.Module
    reader: Task
    """The task as the teacher does it."""
    temperature: float
    alpha: float
    """Part of the teacher in the loss; the data has the rest."""
    tokens: int = 0
    """How many token numbers the tokenizer of both has; 0 where there is none."""

    @classmethod
    def load(cls, folder: Path, task: Task, settings: Distillation, numerics: Numerics) -> Distiller:
        """Load the teacher from its folder, frozen.

        Raises:
            UserError: it can't be loaded, has other tokens or classes, or the task has no probabilities to learn.
        """
        if type(task).predict is Task.predict:
            message = f"{_FIELD}: task {task.plan.task} has no probabilities that a teacher could teach: remove it"
            raise UserError(Reason.INVALID_SPEC, message)
        tokens = _check_tokens(folder, task)
        # the teacher is never drawn at random, and what the task knows of its student must stay
        teacher_task = copy.copy(task)
        teacher_task.plan = task.plan.model_copy(update={"model_init": Init.PRETRAINED})
        dtype = numerics.compute_dtype if stored_dtype(folder) is numerics.compute_dtype else torch.float32
        try:
            teacher = teacher_task.load_model(folder, dtype=dtype)
        except UserError as error:
            message = error.message.replace("spec.model.uri", f"{_FIELD}.teacherUri")
            raise UserError(error.reason, message, error.exit_code) from error
        missing = [name for name in new_modules(teacher) if name in task.head_modules(teacher)]
        if missing:
            message = f"{_FIELD}.teacherUri: it has no head for {task.plan.task} with these classes: fine-tune it first"
            raise UserError(Reason.MODEL_INVALID, message)
        teacher.requires_grad_(False).eval()
        return cls(teacher.to(numerics.device), teacher_task, settings.temperature, settings.alpha, tokens)

    def loss(self, task: Task, student: nn.Module, batch: Batch) -> torch.Tensor:
        """Return alpha times the teacher's loss and 1 - alpha times the task's own, summed over the batch's units.

        The teacher's is T² KL(teacher ‖ student) with both distributions softened by T: the square keeps its gradients
        as large as the data's, whatever T (Hinton et al., 2015, section 2). Models of one family have embeddings of
        other heights, filled up behind the last token: there is nothing to learn of what stands for no token.
        """
        own = task.predict(student, batch)
        with torch.no_grad(), packed_implementation(self.teacher, "packed" in batch.inputs):
            taught = self.reader.predict(self.teacher, batch)
        narrow = min(own.logits.shape[-1], taught.logits.shape[-1])
        is_padded = 0 < self.tokens <= narrow
        if own.logits.shape != taught.logits.shape and not is_padded:
            message = (
                f"{_FIELD}.teacherUri: the teacher tells {taught.logits.shape[-1]} tokens or classes apart and the "
                f"model {own.logits.shape[-1]}: take a teacher of the same family"
            )
            raise UserError(Reason.MODEL_INVALID, message)
        shown, taught = (replace(found, logits=found.logits[..., :narrow]) for found in (own, taught))
        taught_loss = self._divergence(shown, taught, task.plan.classification.problem_type)
        return self.alpha * taught_loss + (1 - self.alpha) * task.loss_of(own)

    def _divergence(self, own: Prediction, taught: Prediction, problem: ProblemType) -> torch.Tensor:
        if own.targets.ndim == 1:
            losses = self._over_classes(own.logits, taught.logits).masked_fill(own.targets == IGNORE, 0.0)
        elif problem is ProblemType.REGRESSION:
            losses = (own.logits - taught.logits).square().mean(-1)
        else:
            losses = self._class_by_class(own.logits, taught.logits).mean(-1)
        return (losses if own.weights is None else losses * own.weights).sum()

    def _over_classes(self, own: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        ours, theirs = (functional.log_softmax(logits / self.temperature, -1) for logits in (own, taught))
        return functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * self.temperature**2

    def _class_by_class(self, own: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        """The same for classes that don't exclude each other: each is there or not."""
        result = torch.zeros_like(own)
        for sign in (1.0, -1.0):
            ours, theirs = (functional.logsigmoid(sign * logits / self.temperature) for logits in (own, taught))
            result = result + functional.kl_div(ours, theirs, reduction="none", log_target=True)
        return result * self.temperature**2


def _check_tokens(folder: Path, task: Task) -> int:
    """Check that teacher and student mean the same by a token number; return how many numbers there are."""
    from transformers import AutoTokenizer

    ours: Any = task.processor
    ours = getattr(ours, "tokenizer", ours)
    if not hasattr(ours, "get_vocab"):
        return 0
    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes transformers raise
        message = f"{_FIELD}.teacherUri: the tokenizer can't be loaded: {error}"
        raise UserError(Reason.MODEL_INVALID, message) from error
    if theirs.get_vocab() != ours.get_vocab():
        message = (
            f"{_FIELD}.teacherUri: teacher and model have different vocabularies ({len(theirs)} and {len(ours)} "
            "tokens): take a teacher with the model's own tokenizer"
        )
        raise UserError(Reason.MODEL_INVALID, message)
    return 1 + max(ours.get_vocab().values(), default=-1)
