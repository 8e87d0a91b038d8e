"""One ModelDeployment, observed → what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta

from tunesmith_api.keys import DeploymentCondition, Reason
from tunesmith_api.v1alpha1 import ModelDeployment, ModelDeploymentStatus
from tunesmith_api.v1alpha1.modeldeployment import Revision, RevisionPhase
from tunesmith_operator.core.conditions import FALSE, find
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.decision import Action, Apply, Decision, Delete, Patch
from tunesmith_operator.core.manifest import Manifest
from tunesmith_operator.core.modeldeployment.children import (
    config_map,
    network_policy,
    quantize_job,
    server_deployment,
    service,
)
from tunesmith_operator.core.modeldeployment.observed import Family, Observed, family, revision_label
from tunesmith_operator.core.modeldeployment.plan import Template, template
from tunesmith_operator.core.modeldeployment.policies import violation
from tunesmith_operator.core.modeldeployment.revisions import (
    History,
    advance,
    failed_in_rollout,
    history,
    quantize_startup,
    target,
)
from tunesmith_operator.core.modeldeployment.status import refused_status, serving_status, waiting_status
from tunesmith_operator.core.resources import CONFIG_MAP, DEPLOYMENT, JOB
from tunesmith_operator.core.source import SourceAbsent, SourceModel
from tunesmith_operator.core.text import parse_time
from tunesmith_operator.core.transitions import transitions
from tunesmith_operator.core.troubles import Startup, Trouble, examine
from tunesmith_operator.core.views import ChildView, DeploymentView

__all__ = ["decide"]

_QUIET = frozenset({Reason.PENDING})


def decide(observed: Observed, now: datetime, config: Config) -> Decision:
    """Deterministic: the same observation gives the same decision, and one that has been carried out gives no more."""
    owner, source = observed.deployment, observed.source
    if owner.metadata.deletion_timestamp is not None:
        return Decision()
    kin = family(observed)
    if (problem := violation(owner)) is not None:
        return _settle(owner, (), refused_status(owner, problem, now))
    past = history(owner, kin)
    if past.latest is None and isinstance(source, SourceAbsent):
        return _settle(owner, (), waiting_status(owner, source.reason, source.message, now))
    if past.latest is None and kin.leftovers:
        names = ", ".join(sorted({child.name for child in kin.leftovers})[:3])
        message = f"Waiting until what an earlier deployment of this name left behind is gone: {names}."
        return replace(_settle(owner, (), waiting_status(owner, Reason.PENDING, message, now)), requeue_after=5.0)
    made = template(owner, source, config) if isinstance(source, SourceModel) else None
    if made is not None:
        past = target(past, made, now)
    assert past.latest is not None
    past = past.with_revision(advance(owner, past.latest, kin, now))
    startup = _startup(owner, past, kin, now)
    absent = source if isinstance(source, SourceAbsent) else None
    status = serving_status(owner, past, kin, startup.trouble, absent, now)
    actions = list(_actions(owner, past, kin, made, config))
    orphans, wait = _orphans(status, past, kin, config, now)
    decision = _settle(owner, [*actions, *orphans], status)
    return replace(decision, requeue_after=_soonest(wait, _until(startup.deadline, now)))


def _startup(owner: ModelDeployment, past: History, kin: Family, now: datetime) -> Startup:
    latest = past.latest
    assert latest is not None
    label = revision_label(latest.number)
    if latest.phase is RevisionPhase.QUANTIZING:
        return quantize_startup(owner, kin, label, now)
    if latest.phase not in (RevisionPhase.ROLLING_OUT, RevisionPhase.ACTIVE):
        return Startup()
    child = kin.deployments.get(label)
    if child is not None and child.replica_failure:
        text = f"the API server refuses the pods: {child.replica_failure}."
        return Startup(trouble=Trouble(Reason.POD_REJECTED, text, None))
    # the Deployment's own deadline bounds the rollout: here only the cause is looked for
    found = examine(kin.server_pods(label), (), timedelta(days=3650), now)
    return Startup(trouble=found.trouble)


def _stale(manifest: Manifest, child: ChildView | None) -> Iterator[Action]:
    if child is None or child.spec_hash != manifest.hash:
        yield Apply(manifest, ours=child is not None)


def _actions(
    owner: ModelDeployment, past: History, kin: Family, made: Template | None, config: Config
) -> Iterator[Action]:
    """Children in dependency order. The Service comes last: it is switched when the Deployment behind it is proven."""
    latest, current = past.latest, past.current
    assert latest is not None
    yield from _stale(network_policy(owner), kin.network_policy)
    if made is not None and made.hash == latest.hash:
        yield from _target_children(made, latest, kin, config)
    yield from _stop_failed(latest, kin)
    if current is not None and (made is None or current.number != latest.number or made.hash != latest.hash):
        yield from _scale(kin.deployments.get(revision_label(current.number)), owner.spec.replicas)
    yield from _stale(service(owner, (current or latest).number), kin.service)


def _target_children(made: Template, latest: Revision, kin: Family, config: Config) -> Iterator[Action]:
    label, number = revision_label(latest.number), latest.number
    if latest.phase is RevisionPhase.FAILED:
        return
    if label not in kin.config_maps:
        yield Apply(config_map(made, number))
    if latest.phase is RevisionPhase.QUANTIZING:
        if label not in kin.jobs:
            yield Apply(quantize_job(made, number, config))
        return
    yield from _stale(server_deployment(made, number, config), kin.deployments.get(label))


def _stop_failed(latest: Revision, kin: Family) -> Iterator[Action]:
    """A failed revision costs nothing: its Job is suspended, its Deployment has no replicas.

    Both stay, for those who look for the cause; deleting them means trying again.
    """
    if latest.phase is not RevisionPhase.FAILED:
        return
    label = revision_label(latest.number)
    job = kin.jobs.get(label)
    if failed_in_rollout(latest):
        yield from _scale(kin.deployments.get(label), 0)
    elif job is not None and not job.ending and not job.suspended:
        yield Patch(JOB, job.namespace, job.name, {"spec": {"suspend": True}})


def _scale(child: DeploymentView | None, replicas: int) -> Iterator[Action]:
    if child is not None and child.desired != replicas and not child.deleting:
        yield Patch(DEPLOYMENT, child.namespace, child.name, {"spec": {"replicas": replicas}})


def _orphans(
    status: ModelDeploymentStatus, past: History, kin: Family, config: Config, now: datetime
) -> tuple[list[Action], float | None]:
    """Children of revisions that neither answer nor are on their way.

    The predecessor of a revision that has just taken over stays a moment, until every node sends requests elsewhere.
    """
    kept = {revision_label(it.number) for it in (past.current, past.latest) if it is not None}
    kinds = ((DEPLOYMENT, kin.deployments), (JOB, kin.jobs), (CONFIG_MAP, kin.config_maps))
    old: list[Action] = [
        Delete(resource, child.namespace, child.name, child.uid)
        for resource, children in kinds
        for label, child in children.items()
        if label not in kept and not child.deleting
    ]
    progressing = find(status.conditions, DeploymentCondition.PROGRESSING)
    if not old or progressing is None or progressing.status != FALSE:
        return old, None
    switched = parse_time(progressing.last_transition_time)
    left = config.retire_delay_seconds - (now - switched).total_seconds() if switched is not None else 0.0
    return ([], left) if left > 0 else (old, None)


def _until(moment: datetime | None, now: datetime) -> float | None:
    return max(1.0, (moment - now).total_seconds()) if moment is not None else None


def _soonest(*waits: float | None) -> float | None:
    return min((wait for wait in waits if wait is not None), default=None)


def _settle(owner: ModelDeployment, actions: Iterable[Action], status: ModelDeploymentStatus) -> Decision:
    events = transitions(DeploymentCondition.READY, owner.status.conditions, status.conditions, _QUIET)
    return Decision(actions=tuple(actions), status=status, events=events)
