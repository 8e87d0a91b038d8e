"""What a FineTuneJob would take and make: its memory, what to change where that isn't there, its children.

`command` asks; `page` shows it to people, `document` to programs. The children are the operator's own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tunesmith_api.memory.estimate import MemoryEstimate, base_parameters, trained
from tunesmith_api.memory.placement import Capacity, Models, PodNeed, enough_host, need_of
from tunesmith_api.memory.remedies import remedies
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_cli.plan.capacity import shown
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.finetunejob.training_plan import training_plan
from tunesmith_operator.core.kubernetes.manifest import JSON

__all__ = ["Forecast", "forecast", "parts_of"]

UNSET_UID = "00000000-0000-0000-0000-000000000000"
"""The API server gives each object its own, which is a part of its children."""
TRAINER_IMAGE = "tunesmith-trainer"
"""The one that an operator was installed with has the name of its registry."""


@dataclass(frozen=True)
class Forecast:
    """All that is known before anything is started."""

    job: FineTuneJob
    plan: TrainingPlan
    capacity: Capacity
    models: Models | None
    need: PodNeed | None
    """None where the model isn't known."""
    changes: tuple[dict[str, Any], ...]
    """Each makes it fit: field below `spec` → value."""
    children: tuple[JSON, ...]
    """In the order in which they are written."""

    @property
    def fits(self) -> bool | None:
        """Whether each worker has the memory that it needs; None where that isn't known."""
        return None if self.need is None else self.need.fits(self.capacity)

    @property
    def gpus(self) -> int:
        """GPUs of all workers together."""
        return self.plan.replicas * self.plan.gpus_per_worker

    def document(self) -> JSON:
        """The same for programs."""
        memory: JSON = {"fits": self.fits}
        if self.need is not None:
            memory |= {
                "strategy": self.need.strategy.value,
                "process": parts_of(self.need.process) | {"total": self.need.process.total},
                "workerBytes": self.need.host,
                "workerLimitBytes": self.capacity.host,
                "gpuBytes": self.need.process.total if self.need.has_gpus else None,
                "gpuLimitBytes": self.capacity.gpu,
            }
        return {
            "name": self.job.metadata.name,
            "model": self._model(),
            "memory": memory,
            "changes": [{f"spec.{name}": value for name, value in change.items()} for change in self.changes],
            "workers": self.plan.replicas,
            "processes": self.plan.world_size,
            "gpus": self.gpus,
            "children": list(self.children),
        }

    def _model(self) -> JSON:
        known: JSON = {"uri": self.plan.model_uri}
        if self.models is not None:
            facts = self.models.student
            known |= {
                "parameters": base_parameters(facts, self.plan),
                "trainedParameters": trained(facts, self.plan),
                "layers": facts.layers,
                "vocabulary": facts.vocabulary,
                "fromHeaders": facts.is_measured,
            }
        return known


def parts_of(estimate: MemoryEstimate) -> dict[str, int]:
    """An estimate's parts by their names."""
    return {field.name: int(getattr(estimate, field.name)) for field in fields(estimate)}


def forecast(job: FineTuneJob, models: Models | None, capacity: Capacity) -> Forecast:
    """Work out what the job would take and make. `models` is None where their sizes aren't known."""
    plan = training_plan(job, attempt=1)
    need = None if models is None else need_of(models, plan, capacity)
    changes: tuple[dict[str, Any], ...] = ()
    if models is not None and need is not None and need.fits(capacity) is False:
        changes = tuple(_changes(models, plan, need, capacity))
    return Forecast(job, plan, capacity, models, need, changes, _children(job))


def _changes(models: Models, plan: TrainingPlan, need: PodNeed, capacity: Capacity) -> list[dict[str, Any]]:
    """What to change so that it fits: settings, or the workers' memory."""

    def fits(changed: TrainingPlan) -> bool:
        return need_of(models, changed, capacity).fits(capacity) is not False

    found = [remedy.changes for remedy in remedies(plan, fits)]
    gpus_do = not need.has_gpus or capacity.gpu is None or need.process.fits(capacity.gpu)
    if need.host > capacity.host and gpus_do:
        found.append({"workers.resources.memory": shown(enough_host(models, plan, capacity))})
    return found


def _children(job: FineTuneJob) -> tuple[JSON, ...]:
    metadata = job.metadata.model_copy(update={"uid": UNSET_UID})
    made = build(job.model_copy(update={"metadata": metadata}), Config(TRAINER_IMAGE, TRAINER_IMAGE), attempt=1)
    return tuple(it.body for it in (made.service, made.network_policy, made.config_map, made.secret, made.job))
