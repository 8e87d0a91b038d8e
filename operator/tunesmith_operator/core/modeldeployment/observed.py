"""Everything known about one ModelDeployment at one moment, and which of the objects are its children."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment, Storage
from tunesmith_operator.core.kubernetes.manifest import Owner
from tunesmith_operator.core.kubernetes.objects import ChildView, ConfigMapView, RejectionView, ServiceView, SpecView
from tunesmith_operator.core.kubernetes.resources import FINETUNEJOB, MODELDEPLOYMENT, Key
from tunesmith_operator.core.kubernetes.workloads import DeploymentView, JobView
from tunesmith_operator.core.modeldeployment.adaptersource import AdapterSource, job_names, source_of
from tunesmith_operator.core.modeldeployment.source import (
    Source,
    SourceAbsent,
    SourceModel,
    Wanted,
    of_finetunejob,
)
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.kind import Lookup
from tunesmith_operator.core.reconcile.observed import ObservedObjects, owned_by
from tunesmith_operator.core.reconcile.progress import ServersSample

__all__ = [
    "ActivatorChildren",
    "Children",
    "Observed",
    "children_of",
    "observe",
    "owner_of",
    "references",
    "revision_label",
    "revision_name",
]

V = TypeVar("V", bound=ChildView)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The custom resource, its source, and its objects."""

    deployment: ModelDeployment
    source: Source
    objects: ObservedObjects
    adapters: Mapping[str, AdapterSource | SourceAbsent] = field(default_factory=dict)
    """Where each of spec.adapters comes from, by name."""


def observe(deployment: ModelDeployment, objects: ObservedObjects, lookup: Lookup) -> Observed:
    """Find the model that is to be served: a folder, or what a FineTuneJob leaves."""
    source, storage = deployment.spec.source, deployment.spec.storage
    namespace = deployment.metadata.namespace

    def job_of(name: str) -> FineTuneJob | None:
        return lookup(Key(FINETUNEJOB.kind, namespace, name))

    adapters = {it.name: source_of(it, namespace, job_of) for it in deployment.spec.adapters}
    if source.fine_tune_job_ref is None:
        model = SourceModel(source.uri or "", "", storage or Storage())
        return Observed(deployment=deployment, source=model, objects=objects, adapters=adapters)
    name, digest = source.fine_tune_job_ref.name, source.fine_tune_job_ref.digest
    wanted = Wanted(deployment.spec.engine.type, deployment.spec.quantization.method)
    found = of_finetunejob(name, namespace, job_of(name), storage, digest, wanted)
    return Observed(deployment=deployment, source=found, objects=objects, adapters=adapters)


def references(namespace: str, spec: Mapping[str, Any]) -> Iterable[Key]:
    """The FineTuneJobs that a spec names: their ends are what the deployment waits for."""
    source = spec.get("source")
    reference = source.get("fineTuneJobRef") if isinstance(source, Mapping) else None
    name = reference.get("name") if isinstance(reference, Mapping) else None
    names = [name] if isinstance(name, str) and name else []
    return tuple(Key(FINETUNEJOB.kind, namespace, it) for it in dict.fromkeys([*names, *job_names(spec)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivatorChildren:
    """What belongs to the activator."""

    service: ServiceView | None = None
    network_policy: SpecView | None = None
    disruption_budget: SpecView | None = None
    deployment: DeploymentView | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """The objects that are really this deployment's, by revision label where they belong to one."""

    service: ServiceView | None
    network_policy: SpecView | None
    disruption_budget: SpecView | None
    config_maps: dict[str, ConfigMapView]
    jobs: dict[str, JobView]
    deployments: dict[str, DeploymentView]
    pods: tuple[PodView, ...]
    rejections: tuple[RejectionView, ...]
    orphans: tuple[ChildView, ...]
    answers: Mapping[str, str] = field(default_factory=dict)
    servers: ServersSample | None = None
    adapter_jobs: dict[str, JobView] = field(default_factory=dict)
    adapter_plans: dict[str, ConfigMapView] = field(default_factory=dict)
    """By what names an adapter and the model that it is for."""
    adapter_sets: dict[str, ConfigMapView] = field(default_factory=dict)
    """The adapters of a revision's servers, by its label."""
    activator: ActivatorChildren = field(default_factory=ActivatorChildren)

    @property
    def asleep(self) -> bool:
        """Whether the deployment's Service leads to the activator."""
        found = self.service.selector if self.service is not None else {}
        return found.get(keys.LABEL_COMPONENT) == keys.COMPONENT_ACTIVATOR

    @property
    def led_to(self) -> Mapping[str, str]:
        """Labels of the server pods that requests reach, be it through the activator."""
        way = self.activator.service if self.asleep else self.service
        return way.selector if way is not None else {}

    @property
    def activator_pods(self) -> tuple[PodView, ...]:
        """Pods that hold requests while no server answers."""
        return tuple(it for it in self.pods if _of_activator(it))

    def quantize_pods(self, label: str) -> tuple[PodView, ...]:
        """Pods of a revision's quantize Job."""
        job = self.jobs.get(label)
        return tuple(pod for pod in self.pods if job is not None and pod.owner_uid == job.uid)

    def server_pods(self, label: str) -> tuple[PodView, ...]:
        """Pods of a revision's Deployment."""
        return tuple(
            pod
            for pod in self.pods
            if pod.labels.get(keys.LABEL_REVISION) == label
            and pod.labels.get(keys.LABEL_COMPONENT) == keys.COMPONENT_SERVER
        )


def revision_label(number: int) -> str:
    """Value of the revision label, and suffix of names: r2."""
    return f"r{number}"


def revision_name(deployment: ModelDeployment, number: int) -> str:
    """Name of a revision and of its Deployment."""
    return f"{deployment.metadata.name}-{revision_label(number)}"


def owner_of(deployment: ModelDeployment) -> Owner:
    """The ModelDeployment as the owner of its children."""
    meta = deployment.metadata
    return Owner(MODELDEPLOYMENT, meta.namespace, meta.name, meta.uid, keys.LABEL_MODELDEPLOYMENT)


def children_of(observed: Observed) -> Children:
    """Sort the objects into children and orphans."""
    objects, uid = observed.objects, observed.deployment.metadata.uid
    every_job, every_map = owned_by(uid, objects.jobs), owned_by(uid, objects.config_maps)
    jobs, adapter_jobs = _by_revision(every_job), _by_adapter(every_job)
    job_uids = {job.uid for job in (*jobs.values(), *adapter_jobs.values())}
    services, activator_service = _parted(owned_by(uid, objects.services))
    policies, activator_policy = _parted(owned_by(uid, objects.network_policies))
    budgets, activator_budget = _parted(owned_by(uid, objects.disruption_budgets))
    deployments, activator = _parted(owned_by(uid, objects.deployments))
    return Children(
        service=next(iter(services), None),
        network_policy=next(iter(policies), None),
        disruption_budget=next(iter(budgets), None),
        activator=ActivatorChildren(
            service=activator_service,
            network_policy=activator_policy,
            disruption_budget=activator_budget,
            deployment=activator,
        ),
        config_maps=_by_revision(every_map),
        jobs=jobs,
        deployments=_by_revision(deployments),
        pods=objects.pods,
        rejections=tuple(it for it in objects.rejections if it.job_uid in job_uids),
        orphans=objects.orphans(uid),
        answers=objects.answers,
        servers=objects.servers,
        adapter_jobs=adapter_jobs,
        adapter_plans=_by_adapter(every_map),
        adapter_sets={
            label: it
            for it in every_map
            if _is_adapters(it) and (label := it.labels.get(keys.LABEL_REVISION)) is not None
        },
    )


def _of_activator(child: ChildView) -> bool:
    return child.labels.get(keys.LABEL_COMPONENT) == keys.COMPONENT_ACTIVATOR


def _parted(children: Iterable[V]) -> tuple[list[V], V | None]:
    """The children of the servers, and the activator's one."""
    found = list(children)
    others = [it for it in found if not _of_activator(it)]
    return others, next((it for it in found if _of_activator(it)), None)


def _by_revision(children: Iterable[V]) -> dict[str, V]:
    return {it.labels.get(keys.LABEL_REVISION, ""): it for it in children if not _is_adapters(it)}


def _by_adapter(children: Iterable[V]) -> dict[str, V]:
    return {label: it for it in children if (label := it.labels.get(keys.LABEL_ADAPTER)) is not None}


def _is_adapters(child: ChildView) -> bool:
    return child.labels.get(keys.LABEL_COMPONENT) == keys.COMPONENT_ADAPTERS
