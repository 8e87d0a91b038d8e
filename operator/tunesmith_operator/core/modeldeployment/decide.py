"""One ModelDeployment, observed → what to do about it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta

from tunesmith_api.keys import DeploymentCondition, Reason
from tunesmith_api.v1alpha1 import ModelDeployment, ModelDeploymentStatus
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.resources import CONFIG_MAP, DEPLOYMENT, JOB
from tunesmith_operator.core.kubernetes.workloads import DeploymentView
from tunesmith_operator.core.modeldeployment.children import (
    config_map,
    network_policy,
    quantize_job,
    server_deployment,
    service,
)
from tunesmith_operator.core.modeldeployment.observed import Children, Observed, children_of, revision_label
from tunesmith_operator.core.modeldeployment.policies import violation
from tunesmith_operator.core.modeldeployment.revisions import (
    History,
    advance,
    failed_in_rollout,
    history_of,
    quantize_startup,
    with_target,
)
from tunesmith_operator.core.modeldeployment.source import SourceAbsent, SourceModel
from tunesmith_operator.core.modeldeployment.status import (
    not_carried_out,
    refused_status,
    serving_status,
    waiting_status,
)
from tunesmith_operator.core.modeldeployment.template import Template, stored_template, template_of
from tunesmith_operator.core.pods.startup import Startup, StartupProblem, examine
from tunesmith_operator.core.reconcile.children import (
    ORPHANS_SECONDS,
    Keeper,
    orphans_message,
    seconds_until,
    soonest,
)
from tunesmith_operator.core.reconcile.decision import Action, Decision, Delete, Patch, conclude
from tunesmith_operator.core.reconcile.settled import state_of, unless_settled
from tunesmith_operator.core.status.conditions import FALSE, find
from tunesmith_operator.core.text import parse_time

__all__ = ["decide"]


def decide(observed: Observed, now: datetime, config: Config) -> Decision:
    """Deterministic: the same observation gives the same decision, and one that has been carried out gives no more."""
    owner, source = observed.deployment, observed.source
    if owner.metadata.deletion_timestamp is not None:
        return Decision()
    children = children_of(observed)
    broken, history = violation(owner), history_of(owner, children)
    if history.latest is None and broken is not None:
        return _report(owner, refused_status(owner, broken, now))
    if history.latest is None and isinstance(source, SourceAbsent):
        return _report(owner, waiting_status(owner, source.reason, source.message, now))
    if history.latest is None and children.orphans:
        message = orphans_message("deployment of this name", children.orphans)
        status = waiting_status(owner, Reason.PENDING, message, now)
        return replace(_report(owner, status), requeue_after=ORPHANS_SECONDS)
    # what can't be accepted changes nothing: the revisions that there are go on as they were made
    template = template_of(owner, source, config) if isinstance(source, SourceModel) and broken is None else None
    if template is not None:
        history = with_target(history, template, now)
    assert history.latest is not None
    history = history.with_revision(advance(owner, history.latest, children, now))
    startup = _startup(owner, history, children, now)
    absent = source if isinstance(source, SourceAbsent) else None
    status = serving_status(owner, history, children, startup.problem, absent, now)
    if broken is not None:
        status = not_carried_out(owner, status, broken, now)
    carried_out = owner.status.observed_generation == owner.metadata.generation
    keeper = Keeper(children.answers, settled=carried_out or broken is not None)
    case = (_case(owner, history, children), template.hash if template is not None else None, config)
    actions = unless_settled(case, lambda: _actions(owner, history, children, template, keeper, config))
    retired, wait = _retired(status, history, children, config, now)
    decision = _report(owner, status, [*actions, *retired])
    return replace(decision, requeue_after=soonest(wait, seconds_until(startup.deadline, now)))


def _report(owner: ModelDeployment, status: ModelDeploymentStatus, actions: Iterable[Action] = ()) -> Decision:
    return conclude(owner, DeploymentCondition.READY, status, actions)


def _startup(owner: ModelDeployment, history: History, children: Children, now: datetime) -> Startup:
    latest = history.latest
    assert latest is not None
    label = revision_label(latest.number)
    if latest.phase is RevisionPhase.QUANTIZING:
        return quantize_startup(owner, children, label, now)
    if latest.phase not in (RevisionPhase.ROLLING_OUT, RevisionPhase.ACTIVE):
        return Startup()
    child = children.deployments.get(label)
    if child is not None and child.replica_failure:
        text = f"the API server refuses the pods: {child.replica_failure}."
        return Startup(problem=StartupProblem(Reason.POD_REJECTED, text, None))
    # the Deployment's own deadline bounds the rollout: here only the cause is looked for
    found = examine(children.server_pods(label), (), timedelta(days=3650), now)
    return Startup(problem=found.problem)


def _actions(
    owner: ModelDeployment,
    history: History,
    children: Children,
    template: Template | None,
    keeper: Keeper,
    config: Config,
) -> Iterator[Action]:
    """Children in dependency order. The Service comes last: it is switched when the Deployment behind it is proven."""
    latest, current = history.latest, history.current
    assert latest is not None
    yield from keeper.keep(network_policy(owner, config), children.network_policy)
    for revision in (latest, current) if current is not None and current.number != latest.number else (latest,):
        yield from _revision_children(owner, revision, children, template, keeper, config)
    yield from _stop_failed(latest, children)
    yield from keeper.keep(service(owner, (current or latest).number), children.service)


def _case(owner: ModelDeployment, history: History, children: Children) -> Hashable:
    """All that `_actions` looks at, but for the target and the configuration."""
    meta = owner.metadata
    identity = (meta.namespace, meta.name, meta.uid, owner.spec.model_dump_json())
    revisions = tuple(
        (it.number, it.hash, it.phase, it.reason) for it in (history.latest, history.current) if it is not None
    )
    by_revision = (children.config_maps, children.jobs, children.deployments)
    around = tuple((label, state_of(it)) for group in by_revision for label, it in group.items())
    ending = tuple(label for label, job in children.jobs.items() if job.ending)
    single = (state_of(children.service), state_of(children.network_policy))
    return (identity, revisions, around, ending, single, tuple(children.answers.items()))


def _revision_children(
    owner: ModelDeployment,
    revision: Revision,
    children: Children,
    target: Template | None,
    keeper: Keeper,
    config: Config,
) -> Iterator[Action]:
    label, number = revision_label(revision.number), revision.number
    if revision.phase is RevisionPhase.FAILED:
        return
    plan, servers = children.config_maps.get(label), children.deployments.get(label)
    template = target if target is not None and target.hash == revision.hash else stored_template(owner, plan)
    if template is None:
        # its template was lost, or is of another version of Tunesmith: its pods stay as they are
        if revision.phase is RevisionPhase.ACTIVE:
            yield from _scale(servers, owner.spec.replicas)
        return
    wanted = config_map(template, number)
    if plan is None or plan.spec_hash == wanted.hash:
        # a plan stays as it was written, whatever a newer operator would write
        yield from keeper.keep(wanted, plan)
    if revision.phase is not RevisionPhase.QUANTIZING:
        yield from keeper.keep(server_deployment(template, number, config), servers)
        return
    job = children.jobs.get(label)
    if job is None or not (job.ending or job.deleting):
        yield from keeper.keep(quantize_job(template, number, config), job)


def _stop_failed(latest: Revision, children: Children) -> Iterator[Action]:
    """A failed revision costs nothing: its Job is suspended, its Deployment has no replicas.

    Both stay, for those who look for the cause; deleting them means trying again.
    """
    if latest.phase is not RevisionPhase.FAILED:
        return
    label = revision_label(latest.number)
    job = children.jobs.get(label)
    if failed_in_rollout(latest):
        yield from _scale(children.deployments.get(label), 0)
    elif job is not None and not job.ending and not job.suspended:
        yield Patch(JOB, job.namespace, job.name, job.uid, {"spec": {"suspend": True}})


def _scale(child: DeploymentView | None, replicas: int) -> Iterator[Action]:
    if child is not None and child.desired != replicas and not child.deleting:
        yield Patch(DEPLOYMENT, child.namespace, child.name, child.uid, {"spec": {"replicas": replicas}})


def _retired(
    status: ModelDeploymentStatus, history: History, children: Children, config: Config, now: datetime
) -> tuple[list[Action], float | None]:
    """Delete the children of revisions that neither answer nor are on their way.

    Those of the previous revision stay a moment after another has taken over, until every node sends requests there.
    """
    kept = {revision_label(it.number) for it in (history.current, history.latest) if it is not None}
    by_resource = ((DEPLOYMENT, children.deployments), (JOB, children.jobs), (CONFIG_MAP, children.config_maps))
    old: list[Action] = [
        Delete(resource, child.namespace, child.name, child.uid)
        for resource, by_revision in by_resource
        for label, child in by_revision.items()
        if label not in kept and not child.deleting
    ]
    progressing = find(status.conditions, DeploymentCondition.PROGRESSING)
    if not old or progressing is None or progressing.status != FALSE:
        return old, None
    switched = parse_time(progressing.last_transition_time)
    left = config.retire_delay_seconds - (now - switched).total_seconds() if switched is not None else 0.0
    return ([], left) if left > 0 else (old, None)
