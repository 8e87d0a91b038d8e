"""What all parts of one rank's run know from the start. Made by `run`."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api.plan import TrainingPlan
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.pod.environment import PodEnvironment

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """A plan, and where one rank carries it out."""

    plan: TrainingPlan
    pod: PodEnvironment
    group: Group
    store: ObjectStore
    run_digest: str
    """Of the plan and its inputs: checkpoints and models of other runs are none of this one."""
