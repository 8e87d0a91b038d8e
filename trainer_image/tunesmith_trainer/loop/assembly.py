"""What a rank trains with: model, wrapper, optimizer, loss. Called by `run` once the `inputs` are there.

The order matters: methods change the model before it is wrapped, and the reference of DPO and the optimizer are made of
what methods have left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith_api.memory.estimate import estimate
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_store.files import fetch_model
from tunesmith_store.store import ObjectStore
from tunesmith_trainer import methods
from tunesmith_trainer.distributed import parallel
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.loop.inputs import Inputs
from tunesmith_trainer.loop.optimizer import make_optimizer
from tunesmith_trainer.methods.distillation import Distiller
from tunesmith_trainer.models.attention import packs_exactly
from tunesmith_trainer.models.files import facts_of
from tunesmith_trainer.models.loading import load_options, stored_dtype
from tunesmith_trainer.models.numerics import Numerics
from tunesmith_trainer.models.structure import apply_dropout, enable_gradient_checkpointing
from tunesmith_trainer.tasks.base import Batch, Task
from tunesmith_trainer.tasks.vision_chat import VisionChat

__all__ = ["Assembly", "ModelSize", "assemble"]

Log = Callable[..., None]


@dataclass(frozen=True)
class ModelSize:
    """For the report."""

    parameters: int
    trained_parameters: int
    strategy: str


@dataclass(frozen=True)
class Assembly:
    """A rank's model, ready to train."""

    numerics: Numerics
    bare: nn.Module
    """The model with its adapters, not wrapped: what is evaluated, saved and exported."""
    wrapped: parallel.Wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    packed: bool
    removed_layers: tuple[int, ...]
    """Numbers, in the model as it was loaded, of the layers that pruning took away."""
    size: ModelSize


def assemble(plan: TrainingPlan, inputs: Inputs, group: Group, store: ObjectStore, scratch: Path, log: Log) -> Assembly:
    """Make model and optimizer, the same on every rank.

    Raises:
        UserError: the model can't be loaded, or doesn't go with the method.
    """
    training, task = plan.training, inputs.task
    teacher_folder = _fetch_teacher(plan, store, scratch)
    numerics = Numerics.choose(training.precision, plan.gpus_per_worker)
    facts, width = facts_of(inputs.base), numerics.bytes_per_activation
    teacher = None if teacher_folder is None else facts_of(teacher_folder)
    estimated = partial(estimate, facts, plan, width, teacher=teacher, cuda_build=torch.version.cuda is not None)
    strategy = parallel.choose(plan, estimated(), group)
    mesh = parallel.mesh(plan, group)
    stored = stored_dtype(inputs.base)
    weights, is_shared = numerics.weights_dtype(plan.method.type, stored), strategy.is_sharded
    options = _load_options(plan, task, numerics, stored, is_shared or mesh is not None)
    model = _load(plan, task, inputs.base, options)
    packed = training.packing and task.supports_packing and packs_exactly(model)
    model = parallel.shard_tensors(model, mesh, weights)
    prepared = methods.apply(model, plan, numerics, task, inputs.first_batches)
    bare: nn.Module = prepared.model.train()
    if not is_shared:  # FSDP moves each rank's share alone: the whole may not fit
        bare = bare.to(numerics.device)
    reference = task.freeze_reference(bare, is_shared)
    within = parallel.shards(plan, strategy)
    wrapped = parallel.wrap(bare, group, strategy, numerics, mesh, weights, within)
    if is_shared and reference is not None:
        parallel.share_out(reference, group, numerics, mesh, numerics.frozen_dtype(stored), within)
    optimizer = make_optimizer(bare, training, numerics.device)
    trained = sum(parameter.numel() for parameter in bare.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in bare.parameters())
    log(
        f"{plan.method.type}: {trained:,} of {total:,} parameters are trained ({trained / total:.2%}), "
        f"{numerics.name} on {numerics.device}, {group.world_size} process(es), {strategy}, "
        f"{'without padding' if packed else 'padded'}; memory estimate per process "
        f"{estimated(strategy=strategy)}"
    )
    return Assembly(
        numerics,
        bare,
        wrapped,
        optimizer,
        numerics.scaler(),
        _loss(plan, task, teacher_folder, numerics),
        packed,
        prepared.removed_layers,
        ModelSize(total, trained, str(strategy)),
    )


def _load_options(
    plan: TrainingPlan, task: Task, numerics: Numerics, stored: torch.dtype, is_shared: bool
) -> dict[str, Any]:
    """Return how to load the model; where ranks will share it out, so that it costs little until then.

    In the format of the files, weights take no memory: they are read where they lie. What changes or tries out the
    whole model needs the format that is trained in. A 4-bit base stays on the CPU.
    """
    method, options = plan.method, load_options(plan, numerics, stored)
    if is_shared and method.type is MethodType.QLORA:
        options["device_map"] = {"": torch.device("cpu")}
    is_changed = method.type not in {MethodType.FULL, MethodType.LORA} or method.qat or method.pruning
    is_tried = isinstance(task, VisionChat) or plan.model_init is Init.RANDOM
    if is_shared and not is_changed and not is_tried:
        options["dtype"] = stored
    return options


def _load(plan: TrainingPlan, task: Task, base: Path, options: dict[str, Any]) -> nn.Module:
    """Load the model and set its dropout and what it keeps for the backward pass."""
    torch.manual_seed(plan.training.seed)
    model = task.load_model(base, **options)
    if plan.training.dropout is not None:
        apply_dropout(model, plan.training.dropout)
    if plan.training.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model


def _fetch_teacher(plan: TrainingPlan, store: ObjectStore, scratch: Path) -> Path | None:
    """Return the folder of the teacher, where there is one."""
    settings = plan.method.distillation
    if settings is None:
        return None
    return fetch_model(store, settings.teacher_uri, scratch / "teacher", "spec.method.distillation.teacherUri")


def _loss(
    plan: TrainingPlan, task: Task, teacher: Path | None, numerics: Numerics
) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """The task's loss; with a teacher, the distilled one."""
    settings = plan.method.distillation
    if settings is None or teacher is None:
        return task.loss
    distiller = Distiller.load(teacher, task, settings, numerics)
    return lambda model, batch: distiller.loss(task, model, batch)
