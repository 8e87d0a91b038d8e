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
from tunesmith_operator.core.modeldeployment.activator import activator_actions
from tunesmith_operator.core.modeldeployment.adapters import (
    adapter_actions,
    adapter_states,
    adapters_target,
    templates_of,
    with_statuses,
)
from tunesmith_operator.core.modeldeployment.calibration import cannot_be_calibrated
from tunesmith_operator.core.modeldeployment.children import (
    config_map,
    disruption_budget,
    network_policy,
    quantize_job,
    selector,
    server_deployment,
    service,
)
from tunesmith_operator.core.modeldeployment.engines import engine_for, rehearsed_for_nothing
from tunesmith_operator.core.modeldeployment.fallback import with_fallback
from tunesmith_operator.core.modeldeployment.heldout import cannot_be_evaluated
from tunesmith_operator.core.modeldeployment.images import image_missing
from tunesmith_operator.core.modeldeployment.memory import with_memory
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
from tunesmith_operator.core.modeldeployment.rollback import earlier_template, unknown_revision
from tunesmith_operator.core.modeldeployment.scaling import Scaling, poll_target, scaling_of
from tunesmith_operator.core.modeldeployment.source import Source, SourceAbsent, SourceModel
from tunesmith_operator.core.modeldeployment.status import (
    not_carried_out,
    refused_status,
    serving_status,
    waiting_status,
    with_remark,
)
from tunesmith_operator.core.modeldeployment.template import Template, stored_template, template_of
from tunesmith_operator.core.modeldeployment.traffic import Traffic, servers_target, traffic_of
from tunesmith_operator.core.pods.startup import Patience, Startup, StartupProblem, examine
from tunesmith_operator.core.reconcile.children import (
    ORPHANS_SECONDS,
    Keeper,
    orphans_message,
    seconds_until,
    soonest,
)
from tunesmith_operator.core.reconcile.decision import Action, Decision, Delete, Patch, conclude
from tunesmith_operator.core.reconcile.rules import Violation
from tunesmith_operator.core.reconcile.settled import state_of, unless_settled
from tunesmith_operator.core.status.conditions import FALSE, find
from tunesmith_operator.core.status.transitions import EventNote, transitions
from tunesmith_operator.core.text import parse_time

__all__ = ["decide"]

_UNREMARKABLE = frozenset({Reason.QUANTIZING, Reason.ROLLING_OUT, Reason.ROLLED_OUT})
_UNREMARKABLE_OF_ADAPTERS = frozenset({Reason.QUANTIZING, Reason.ADAPTERS_LOADING, Reason.SOURCE_NOT_READY})


def decide(observed: Observed, now: datetime, config: Config) -> Decision:
    """Deterministic: the same observation gives the same decision, and one that has been carried out gives no more."""
    owner, source = observed.deployment, observed.source
    if owner.metadata.deletion_timestamp is not None:
        return Decision()
    children = children_of(observed)
    broken, history = _obstacle(owner, source, children, config), history_of(owner, children)
    if history.latest is None and broken is not None:
        return _report(owner, refused_status(owner, broken, now))
    if history.latest is None and isinstance(source, SourceAbsent) and owner.spec.rollout.rollback_to is None:
        return _report(owner, waiting_status(owner, source.reason, source.message, now))
    if history.latest is None and children.orphans:
        message = orphans_message("deployment of this name", children.orphans)
        status = waiting_status(owner, Reason.PENDING, message, now)
        return replace(_report(owner, status), requeue_after=ORPHANS_SECONDS)
    # what can't be accepted changes nothing: the revisions that there are go on as they were made
    template = _target(observed, children, history, config) if broken is None else None
    retire_delay = timedelta(seconds=config.retire_delay_seconds)
    if template is not None:
        history = with_target(history, template, now, retire_delay)
    assert history.latest is not None
    scaling = scaling_of(owner, history, children, now, retire_delay)
    owner = scaling.deployment
    history = history.with_revision(advance(owner, history, children, now))
    latest = history.latest
    assert latest is not None
    startup = _startup(owner, history, children, now)
    absent = source if isinstance(source, SourceAbsent) else None
    made_from = templates_of(owner, history, children, template)
    adapters = adapter_states(owner, observed.adapters, history, made_from, children)
    held = adapters.awaited(latest, children, _patience(owner), now)
    traffic = traffic_of(owner, latest, history.current, children, now, retire_delay)
    shown = with_statuses(owner, adapters, history, children)
    status = serving_status(owner, history, children, traffic, startup.problem, absent, shown, scaling, now)
    if broken is not None:
        status = not_carried_out(owner, status, broken, now)
    elif (remark := _remark(owner, source)) is not None:
        status = with_remark(owner, status, remark, now)
    carried_out = owner.status.observed_generation == owner.metadata.generation
    keeper = Keeper(children.answers, settled=carried_out or broken is not None)
    case = (_case(owner, history, children, scaling), traffic, template and template.hash, held is not None, config)
    actions = unless_settled(
        case, lambda: _actions(owner, history, children, traffic, scaling, template, keeper, config, held is not None)
    )
    loaded = adapter_actions(owner, adapters, history, made_from, children, keeper, config)
    retired, wait = _retired(status, history, children, config, now)
    decision = _report(owner, status, [*loaded, *actions, *retired])
    moments = (startup.deadline, traffic.next_look, scaling.next_look, held)
    looks = (wait, *(seconds_until(it, now) for it in moments))
    asked = servers_target(owner, latest, history.current, children) or adapters_target(history, adapters, children)
    return replace(
        decision,
        events=(*decision.events, *_taken_back(owner, status, history), *_about_adapters(owner, status)),
        requeue_after=soonest(*looks),
        poll=poll_target(scaling, asked, history, children),
    )


def _obstacle(owner: ModelDeployment, source: Source, children: Children, config: Config) -> Violation | None:
    """Why the spec can't be carried out, whatever the cluster is like."""
    broken = violation(owner) or unknown_revision(owner, children)
    if broken is not None or owner.spec.rollout.rollback_to is not None:
        return broken
    unservable = image_missing(owner, config)
    if unservable is None and isinstance(source, SourceModel):
        return cannot_be_evaluated(owner, source) or cannot_be_calibrated(owner, source)
    return unservable


def _remark(owner: ModelDeployment, source: Source) -> str | None:
    """What a spec that can be carried out may not have meant."""
    if not isinstance(source, SourceModel) or owner.spec.rollout.rollback_to is not None:
        return None
    method = owner.spec.quantization.method
    return rehearsed_for_nothing(method, engine_for(owner.spec.engine.type, method, source.task), source.rehearsed)


def _target(observed: Observed, children: Children, history: History, config: Config) -> Template | None:
    """What the newest revision is to be: what the spec says, its fallback, or an earlier one that it goes back to."""
    owner, source = observed.deployment, observed.source
    if owner.spec.rollout.rollback_to is not None:
        return earlier_template(owner, children)
    if not isinstance(source, SourceModel):
        return None
    return with_fallback(template_of(owner, source, config), owner, source, config, history.revisions)


def _taken_back(owner: ModelDeployment, status: ModelDeploymentStatus, history: History) -> tuple[EventNote, ...]:
    """An event where a new revision fails or waits: `Ready` is about the one that answers, and doesn't move."""
    if history.current is None:
        return ()
    return transitions(DeploymentCondition.PROGRESSING, owner.status.conditions, status.conditions, _UNREMARKABLE)


def _about_adapters(owner: ModelDeployment, status: ModelDeploymentStatus) -> tuple[EventNote, ...]:
    """An event where an adapter can't be served, or all are: `Ready` is about the model alone."""
    before, after = owner.status.conditions, status.conditions
    return transitions(DeploymentCondition.ADAPTERS_READY, before, after, _UNREMARKABLE_OF_ADAPTERS)


def _patience(owner: ModelDeployment) -> timedelta:
    return timedelta(seconds=owner.spec.rollout.progress_deadline_seconds)


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
    found = examine(children.server_pods(label), (), Patience(timedelta(days=3650)), now)
    return Startup(problem=found.problem)


def _actions(
    owner: ModelDeployment,
    history: History,
    children: Children,
    traffic: Traffic,
    scaling: Scaling,
    template: Template | None,
    keeper: Keeper,
    config: Config,
    held: bool,
) -> Iterator[Action]:
    """Children in dependency order. The Service comes last: it is switched when the Deployment behind it is proven."""
    latest, current = history.latest, history.current
    assert latest is not None
    yield from keeper.keep(network_policy(owner, config), children.network_policy)
    for revision in (latest, current) if current is not None and current.number != latest.number else (latest,):
        if held and revision is latest and revision_label(revision.number) not in children.deployments:
            continue
        yield from _revision_children(owner, revision, children, traffic, template, keeper, config)
    yield from _stop_failed(latest, traffic, children)
    yield from keeper.keep(disruption_budget(owner, traffic.selected), children.disruption_budget)
    led_to = selector(owner, traffic.selected)
    yield from activator_actions(owner, scaling.activation, led_to, scaling.asleep, children, keeper, config)
    yield from keeper.keep(service(owner, traffic.selected, scaling.asleep), children.service)


def _case(owner: ModelDeployment, history: History, children: Children, scaling: Scaling) -> Hashable:
    """All that `_actions` looks at, but for the target and the configuration."""
    meta = owner.metadata
    identity = (meta.namespace, meta.name, meta.uid, owner.spec.model_dump_json())
    revisions = tuple(
        (it.number, it.hash, it.phase, it.reason, it.memory_bytes)
        for it in (history.latest, history.current)
        if it is not None
    )
    by_revision = (children.config_maps, children.jobs, children.deployments)
    around = tuple((label, state_of(it)) for group in by_revision for label, it in group.items())
    ending = tuple(label for label, job in children.jobs.items() if job.ending)
    held = children.activator
    both = (children.service, children.network_policy, children.disruption_budget)
    single = tuple(map(state_of, (*both, held.service, held.network_policy, held.disruption_budget, held.deployment)))
    activated = (scaling.asleep, scaling.activation.api.model_dump_json(), scaling.activation.parallel_requests)
    return (identity, revisions, around, ending, single, activated, tuple(children.answers.items()))


def _revision_children(
    owner: ModelDeployment,
    revision: Revision,
    children: Children,
    traffic: Traffic,
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
        if revision.phase is not RevisionPhase.QUANTIZING:
            yield from _scale(servers, traffic.wanted(label))
        return
    wanted = config_map(template, number)
    if plan is None or plan.spec_hash == wanted.hash:
        # a plan stays as it was written, whatever a newer operator would write
        yield from keeper.keep(wanted, plan)
    if revision.phase is not RevisionPhase.QUANTIZING:
        replicas = traffic.wanted(label)
        sized = with_memory(template, revision)
        if servers is not None and sized.pods.resources.memory is None:
            # how much they were given was in a status that is lost, with the report that said so
            yield from _scale(servers, replicas)
        elif replicas is not None:
            yield from keeper.keep(server_deployment(sized, number, replicas, config), servers)
        return
    job = children.jobs.get(label)
    if job is None or not (job.ending or job.deleting):
        yield from keeper.keep(quantize_job(template, number, config), job)


def _stop_failed(latest: Revision, traffic: Traffic, children: Children) -> Iterator[Action]:
    """A failed revision costs nothing: its Job is suspended or ended, its Deployment has no replicas.

    Both stay, for those who look for the cause; deleting them means trying again.
    """
    if latest.phase is not RevisionPhase.FAILED:
        return
    label = revision_label(latest.number)
    job = children.jobs.get(label)
    if failed_in_rollout(latest):
        yield from _scale(children.deployments.get(label), traffic.wanted(label))
    elif job is not None and not job.ending and not job.suspended:
        # of a Job in a queue `suspend` is Kueue's, which would start it again: its time is up instead
        stop: dict[str, int | bool] = {"activeDeadlineSeconds": 1} if job.queue else {"suspend": True}
        if job.active_deadline_seconds != stop.get("activeDeadlineSeconds", 0):
            yield Patch(JOB, job.namespace, job.name, job.uid, {"spec": stop})


def _scale(child: DeploymentView | None, replicas: int | None) -> Iterator[Action]:
    if child is not None and replicas is not None and child.desired != replicas and not child.deleting:
        yield Patch(DEPLOYMENT, child.namespace, child.name, child.uid, {"spec": {"replicas": replicas}})


def _retired(
    status: ModelDeploymentStatus, history: History, children: Children, config: Config, now: datetime
) -> tuple[list[Action], float | None]:
    """Delete the children of revisions that neither answer nor are on their way; plans stay as long as the history.

    Those of the previous revision stay a moment after another has taken over, until every node sends requests there.
    """
    kept = {revision_label(it.number) for it in (history.current, history.latest) if it is not None}
    listed = kept | {revision_label(it.number) for it in status.revisions}
    by_resource = (
        (DEPLOYMENT, children.deployments, kept),
        (JOB, children.jobs, kept),
        (CONFIG_MAP, children.config_maps, listed),
    )
    old: list[Action] = [
        Delete(resource, child.namespace, child.name, child.uid)
        for resource, by_revision, needed in by_resource
        for label, child in by_revision.items()
        if label not in needed and not child.deleting
    ]
    progressing = find(status.conditions, DeploymentCondition.PROGRESSING)
    if not old or progressing is None or progressing.status != FALSE:
        return old, None
    switched = parse_time(progressing.last_transition_time)
    left = config.retire_delay_seconds - (now - switched).total_seconds() if switched is not None else 0.0
    return ([], left) if left > 0 else (old, None)
