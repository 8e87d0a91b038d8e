"""What a plan's method does to a loaded model before training, and undoes before the model is saved.

One module per method; `assembly` calls `apply` before the model is wrapped, `finish` calls `finished_model` and
`save_adapter` with the trained model, whole and on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType, PruningType
from tunesmith_trainer.methods.adapters import add_adapters, merge_adapters, merge_into_whole_base, save_adapter
from tunesmith_trainer.methods.pruning import keep_sparse, prune_layers, remove_layers, stay_sparse
from tunesmith_trainer.methods.qat import convert_qat, prepare_qat
from tunesmith_trainer.models.numerics import Numerics
from tunesmith_trainer.tasks.base import Batch, Task

__all__ = ["PreparedModel", "apply", "finished_model", "remove_layers", "save_adapter"]


@dataclass(frozen=True)
class PreparedModel:
    """A model as its method trains it."""

    model: nn.Module
    removed_layers: tuple[int, ...] = ()
    """Numbers, in the model as it was loaded, of the layers that pruning took away."""


def apply(
    model: nn.Module,
    plan: TrainingPlan,
    numerics: Numerics,
    task: Task,
    batches: Callable[[], Sequence[Batch]],
) -> PreparedModel:
    """Change a loaded model, still on the CPU, for the plan's method: the same on every rank.

    `batches` makes a few training batches, for pruning by layers, which has to see the model at work.

    Raises:
        UserError: the method doesn't go with this model.
    """
    method = plan.method
    if method.has_adapters:
        return PreparedModel(add_adapters(model, plan, task))
    removed: tuple[int, ...] = ()
    if method.qat is not None:
        prepare_qat(model, method.qat, exclude=task.head_modules(model))
    elif method.pruning is not None and method.pruning.type is PruningType.LAYERS:
        removed = prune_layers(model, batches(), method.pruning.sparsity_percent)
    elif method.pruning is not None:
        keep_sparse(model, method.pruning.sparsity_percent, exclude=task.head_modules(model))
    return PreparedModel(model, removed)


def finished_model(model: nn.Module, plan: TrainingPlan, base: Path, task: Task) -> nn.Module:
    """Return a trained model as a plain one of transformers: adapters merged, in full precision, and traces removed.

    `base` is the folder that the model was loaded from. With QLoRA the adapters go onto its weights as they are stored
    there, not onto the 4-bit ones. The model itself is used up.
    """
    method = plan.method
    if method.type is MethodType.QLORA:
        return merge_into_whole_base(model, plan, base, task)
    if method.has_adapters:
        return merge_adapters(model)
    if method.qat is not None:
        convert_qat(model)
    if method.pruning is not None:
        stay_sparse(model)
    return model
