"""The nearest settings by which a plan fits: those that leave the result alone first, then more workers, then others.

Whoever refuses or warns for want of memory asks, and says what to change in the words of the spec.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.training import Optim, Strategy

__all__ = ["Remedy", "remedies"]

MOST_WORKERS = 64
_CHEAPER = {MethodType.FULL: MethodType.LORA, MethodType.LORA: MethodType.QLORA, MethodType.DORA: MethodType.QLORA}
"""Method → the one that takes less, as far as there is one."""


@dataclass(frozen=True)
class Remedy:
    """What to change so that a plan fits."""

    plan: TrainingPlan
    changes: dict[str, Any] = field(default_factory=dict)
    """Field of the spec → value."""

    def with_training(self, name: str, **values: Any) -> Remedy:
        """The same with one setting of spec.training more."""
        (value,) = values.values()
        training = self.plan.training.model_copy(update=values)
        return Remedy(self.plan.model_copy(update={"training": training}), {**self.changes, f"training.{name}": value})

    def with_plan(self, name: str, value: Any, **values: Any) -> Remedy:
        """The same with one setting of another part more."""
        return Remedy(self.plan.model_copy(update=values), {**self.changes, name: value})


def remedies(plan: TrainingPlan, fits: Callable[[TrainingPlan], bool]) -> list[Remedy]:
    """Return the nearest change of each kind by which a plan fits; none of a kind by which it doesn't.

    Args:
        plan: one that doesn't fit.
        fits: whether another one does.
    """
    own = Remedy(plan)
    kinds = (_smaller_steps(own), _eight_bits(own), _more_workers(own), _other_methods(own))
    found = (next((remedy for remedy in kind if fits(remedy.plan)), None) for kind in kinds)
    return [remedy for remedy in found if remedy is not None]


def _smaller_steps(own: Remedy) -> Iterator[Remedy]:
    """Fewer examples at a time, then activations computed again: to the same result."""
    yield from _halved(own)
    if not own.plan.training.gradient_checkpointing:
        again = own.with_training("gradientCheckpointing", gradient_checkpointing=True)
        yield again
        yield from _halved(again)


def _halved(own: Remedy) -> Iterator[Remedy]:
    training, ranks = own.plan.training, max(1, own.plan.world_size // own.plan.tensor_parallel)
    size = min(training.micro_batch_size, -(-training.global_batch_size // ranks))  # more has no effect
    while size > 1:
        size //= 2
        yield own.with_training("microBatchSize", micro_batch_size=size)


def _eight_bits(own: Remedy) -> Iterator[Remedy]:
    """An optimizer that keeps a quarter of its state."""
    if own.plan.training.optim is Optim.ADAMW_TORCH:
        short = own.with_training("optim", optim=Optim.ADAMW_8BIT)
        yield short
        yield from _smaller_steps(short)


def _more_workers(own: Remedy) -> Iterator[Remedy]:
    """More workers that share weights, gradients and optimizer state out."""
    plan = own.plan
    shared = own
    if plan.strategy in {Strategy.DDP, Strategy.HSDP} and plan.tensor_parallel == 1:
        # more workers alone would have more copies, of all or of a worker's shares
        shared = own.with_plan("parallelism.strategy", Strategy.FSDP, strategy=Strategy.FSDP)
        if plan.world_size > 1:
            yield shared
    replicas, processes = plan.replicas, plan.processes_per_worker
    while (replicas := 2 * replicas) <= MOST_WORKERS and replicas * processes <= plan.training.global_batch_size:
        more = shared.with_plan("workers.replicas", replicas, replicas=replicas)
        yield more
        yield from _smaller_steps(more)


def _other_methods(own: Remedy) -> Iterator[Remedy]:
    """Adapters in place of all weights, then over weights of 4 bits: another result."""
    method = own.plan.method
    if method.qat is not None or method.pruning is not None or own.plan.model_init is Init.RANDOM:
        return  # those change or make all weights
    kind, found = method.type, own
    while (cheaper := _CHEAPER.get(kind)) is not None:
        if cheaper is MethodType.QLORA and own.plan.tensor_parallel > 1:
            return
        kind = cheaper
        changed = method.model_copy(update={"type": cheaper})
        found = own.with_plan("method.type", cheaper, method=changed)
        yield found
        yield from _smaller_steps(found)
