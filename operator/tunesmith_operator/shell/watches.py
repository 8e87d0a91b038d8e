"""What is watched, how it is indexed, and whose key each change adds to the queue, for every registered kind.

Kopf calls these handlers; they branch on nothing and write nothing. Children are filtered by the API server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import kopf

from tunesmith_api import keys
from tunesmith_operator.core.kinds import KINDS, owner_key
from tunesmith_operator.core.kubernetes.objects import ChildView, RejectionView
from tunesmith_operator.core.kubernetes.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    JOB,
    NETWORK_POLICY,
    POD,
    SERVICE,
    Key,
    Resource,
)
from tunesmith_operator.core.reconcile.kind import Kind
from tunesmith_operator.engine.store import VIEWS, Indexes
from tunesmith_operator.engine.workqueue import WorkQueue

__all__ = ["WATCHED", "configure", "indexes_of", "register"]

Raw = Mapping[str, Any]
WATCHED: tuple[Resource, ...] = (*(kind.resource for kind in KINDS), *VIEWS, EVENT)


def _selector(resource: Resource) -> tuple[str, ...]:
    return (
        (resource.group, resource.version, resource.plural) if resource.group else (resource.version, resource.plural)
    )


def configure(settings: kopf.OperatorSettings) -> None:
    """Kopf as a pure informer: server-side selectors, no events posted, no cluster-scope scanning, no peering."""
    for resource in VIEWS:
        settings.watching.label_selectors[_selector(resource)] = f"{keys.LABEL_MANAGED_BY}={keys.MANAGED_BY}"
    # the Job controller says in Events alone that it may not create pods
    settings.watching.field_selectors[_selector(EVENT)] = "involvedObject.kind=Job,reason=FailedCreate"
    settings.watching.chunk_size = 500
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    # no handler here needs either; should one ever, nothing of kopf's own name is left on people's objects
    settings.persistence.finalizer = f"{keys.GROUP}/unused"
    settings.process.ultimate_exiting_timeout = 25


def indexes_of(found: Mapping[str, Any]) -> Indexes:
    """The live indexes among the arguments that kopf passes to a startup handler."""
    return Indexes(
        custom={kind.resource: found[kind.resource.plural] for kind in KINDS},
        services=found[SERVICE.plural],
        config_maps=found[CONFIG_MAP.plural],
        network_policies=found[NETWORK_POLICY.plural],
        jobs=found[JOB.plural],
        deployments=found[DEPLOYMENT.plural],
        pods=found[POD.plural],
        rejections=found[EVENT.plural],
    )


def register(registry: kopf.OperatorRegistry, queue: WorkQueue[Key]) -> None:
    """Index and watch everything."""
    for kind in KINDS:
        _register_custom(registry, queue, kind)
    for resource, view in VIEWS.items():
        _register_child(registry, queue, resource, view)
    _register_events(registry, queue)


def _references_index(kind: Kind[Any, Any]) -> str:
    return f"{kind.resource.plural}_references"


def _register_custom(registry: kopf.OperatorRegistry, queue: WorkQueue[Key], kind: Kind[Any, Any]) -> None:
    selector = _selector(kind.resource)

    @kopf.index(*selector, id=kind.resource.plural, registry=registry)
    def index_custom(namespace: str, name: str, body: Raw, **_: Any) -> dict[Key, dict[str, Any]]:
        return {kind.key(namespace, name): dict(body)}

    @kopf.index(*selector, id=_references_index(kind), registry=registry)
    def index_references(namespace: str, name: str, spec: Raw, **_: Any) -> dict[Key, Key]:
        return {referenced: kind.key(namespace, name) for referenced in kind.references(namespace, spec)}

    @kopf.on.event(*selector, registry=registry)
    async def custom_changed(namespace: str, name: str, **found: Any) -> None:
        key = kind.key(namespace, name)
        queue.add(key)
        for other in KINDS:
            for referring in found[_references_index(other)].get(key, ()):
                queue.add(referring)


def _register_child(
    registry: kopf.OperatorRegistry, queue: WorkQueue[Key], resource: Resource, view: type[ChildView]
) -> None:
    @kopf.index(*_selector(resource), id=resource.plural, registry=registry)
    def index_child(namespace: str, labels: Raw, body: Raw, **_: Any) -> dict[Key, ChildView]:
        key = owner_key(namespace, labels)
        return {key: view.of(body)} if key is not None else {}

    @kopf.on.event(*_selector(resource), registry=registry)
    async def child_changed(namespace: str, labels: Raw, **_: Any) -> None:
        key = owner_key(namespace, labels)
        if key is not None:
            queue.add(key)


def _register_events(registry: kopf.OperatorRegistry, queue: WorkQueue[Key]) -> None:
    @kopf.index(*_selector(JOB), id="job_owners", registry=registry)
    def index_job_owners(namespace: str, uid: str, labels: Raw, **_: Any) -> dict[str, Key]:
        key = owner_key(namespace, labels)
        return {uid: key} if key is not None else {}

    @kopf.index(*_selector(EVENT), id=EVENT.plural, registry=registry)
    def index_rejections(body: Raw, **_: Any) -> dict[str, RejectionView]:
        view = RejectionView.of(body)
        return {view.job_uid: view}

    @kopf.on.event(*_selector(EVENT), registry=registry)
    async def rejection_seen(body: Raw, job_owners: Any, **_: Any) -> None:
        for key in job_owners.get(body["involvedObject"].get("uid", ""), ()):
            queue.add(key)
