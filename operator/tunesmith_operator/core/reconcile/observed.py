"""All that the watches know of one custom resource's objects; the engine's store builds it from its indexes.

Each kind's `observed` module sorts these objects into the children that the resource owns, and orphans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tunesmith_operator.core.kubernetes.objects import ChildView, ConfigMapView, RejectionView, ServiceView, SpecView
from tunesmith_operator.core.kubernetes.workloads import DeploymentView, JobView
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.progress import ProgressSample, QuotaSample, ServersSample

__all__ = ["ObservedObjects", "owned_by"]

V = TypeVar("V", bound=ChildView)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedObjects:
    """All objects that carry the custom resource's label, whoever owns them, and the last progress report."""

    services: tuple[ServiceView, ...] = ()
    config_maps: tuple[ConfigMapView, ...] = ()
    network_policies: tuple[SpecView, ...] = ()
    jobs: tuple[JobView, ...] = ()
    deployments: tuple[DeploymentView, ...] = ()
    pods: tuple[PodView, ...] = ()
    rejections: tuple[RejectionView, ...] = ()
    progress: ProgressSample | None = None
    servers: ServersSample | None = None
    quota: QuotaSample | None = None
    disruption_budgets: tuple[SpecView, ...] = ()
    answers: Mapping[str, str] = field(default_factory=dict)
    """What the API server made of the operator's own writes, by child, where that isn't what was written."""

    def orphans(self, uid: str) -> tuple[ChildView, ...]:
        """Objects that a previous custom resource of the same name owns, other than pods."""
        found: tuple[ChildView, ...] = (
            *self.services,
            *self.config_maps,
            *self.network_policies,
            *self.disruption_budgets,
            *self.jobs,
            *self.deployments,
        )
        return tuple(child for child in found if child.owner_uid != uid)


def owned_by(uid: str, objects: Iterable[V]) -> tuple[V, ...]:
    """The objects whose controller has that uid."""
    return tuple(it for it in objects if it.owner_uid == uid)
