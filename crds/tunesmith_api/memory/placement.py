"""What a pod needs for its training processes together, on the host and on each GPU, and whether that is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tunesmith_api.memory.estimate import (
    FLOAT,
    MemoryEstimate,
    activation_bytes,
    base_parameters,
    estimate,
)
from tunesmith_api.memory.facts import ModelFacts
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.training import Strategy

__all__ = ["Capacity", "Models", "PodNeed", "enough_host", "need_of", "strategy_of"]

RAY = 600 << 20
"""Bytes of Ray, driver and supervisor beside the training processes, in the pod that has most of them."""
HOST_RUNTIME = 2 << 30
"""An allowance, not measured: what a process with a GPU takes of the host for Python, torch and CUDA's libraries."""
WRITTEN_AT_ONCE = 5_000_000_000
"""Bytes of the largest file of a model that is written from a GPU."""


@dataclass(frozen=True)
class Capacity:
    """Bytes that a pod has. None: not known."""

    host: int
    gpu: int | None = None
    """Of each GPU."""


@dataclass(frozen=True)
class Models:
    """The models of a plan, as far as they are known."""

    student: ModelFacts
    teacher: ModelFacts | None = None


@dataclass(frozen=True)
class PodNeed:
    """Bytes that a pod needs, and how the model is shared out then."""

    strategy: Strategy
    processes: int
    process: MemoryEstimate
    host: int
    has_gpus: bool

    def fits(self, capacity: Capacity) -> bool | None:
        """Whether a pod of this capacity can hold it; None where the GPUs' memory decides and isn't known."""
        if self.host > capacity.host:
            return False
        if not self.has_gpus:
            return True
        return None if capacity.gpu is None else self.process.fits(capacity.gpu)


def strategy_of(plan: TrainingPlan, ranks: int, fits: Callable[[], bool]) -> Strategy:
    """Resolve strategy Auto: DDP where a replica for each process fits into its memory, else FSDP."""
    data_ranks = ranks // plan.tensor_parallel
    if data_ranks <= 1:
        return Strategy.DDP
    if plan.strategy is Strategy.HSDP and plan.replicas == 1:
        return Strategy.FSDP
    if plan.strategy is not Strategy.AUTO:
        return plan.strategy
    if plan.tensor_parallel > 1:
        return Strategy.FSDP
    return Strategy.DDP if fits() else Strategy.FSDP


def need_of(models: Models, plan: TrainingPlan, capacity: Capacity) -> PodNeed:
    """What a pod of the plan needs, with the strategy that its trainer would choose in pods of this capacity.

    Where a GPU's memory isn't known, Auto counts as DDP.
    """
    width, processes = activation_bytes(plan), plan.processes_per_worker
    # which torch an image has isn't known here
    estimated = partial(estimate, models.student, plan, width, teacher=models.teacher, cuda_build=True)
    whole = estimated(strategy=Strategy.DDP)
    has_gpus = bool(plan.gpus_per_worker)
    size = capacity.gpu if has_gpus else capacity.host // processes
    strategy = strategy_of(plan, plan.world_size, lambda: size is None or whole.fits(size))
    process = whole if strategy is Strategy.DDP else estimated(strategy=strategy)
    host = _host_beside_gpus(models, plan, width, strategy, processes) if has_gpus else _host(process, processes)
    return PodNeed(strategy, processes, process, host + RAY, has_gpus)


def enough_host(models: Models, plan: TrainingPlan, capacity: Capacity) -> int:
    """Return how many bytes of the host a pod of the plan has to have, as it is: whole gibibytes, from one on."""
    size = _whole(need_of(models, plan, capacity).host)
    while (host := need_of(models, plan, replace(capacity, host=size)).host) > size:
        size = _whole(host)  # with more memory Auto may share the model out less
    return size


def _whole(size: int) -> int:
    unit = 1 << (30 if size > 1 << 30 else 20)
    return -(-size // unit) * unit


def _host(process: MemoryEstimate, processes: int) -> int:
    """Of processes on CPUs only the first one puts the model together; the others wait with what they hold."""
    return max(processes * process.step, process.saving + (processes - 1) * process.step)


def _host_beside_gpus(models: Models, plan: TrainingPlan, width: int, strategy: Strategy, processes: int) -> int:
    """A model passes through the host when it is loaded, and is put together there where no GPU has all of it."""
    loaded = base_parameters(models.student, plan)
    is_shared = strategy.is_sharded or plan.tensor_parallel > 1
    is_short = plan.method.has_adapters and models.student.stored_bytes == width == 2
    in_pieces = is_shared or plan.method.type is MethodType.QLORA  # read where they lie, and sent piece by piece
    loading = 0 if in_pieces else processes * loaded * (2 if is_short else FLOAT)
    saving = 0 if plan.publishes_adapter_only else loaded * FLOAT if in_pieces else min(loaded * FLOAT, WRITTEN_AT_ONCE)
    return processes * HOST_RUNTIME + max(loading, saving)
