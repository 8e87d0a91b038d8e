"""How far each of `spec.adapters` has come, what is to be written for them, and what the status says of it.

An adapter is converted once for each state of adapter and model by a Job of its own. What a revision's servers are to
have stands in a ConfigMap that they have mounted, so a change of the list is no new revision. `decide` calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.adapters import AdapterPlan, AdapterSet, ServedAdapter
from tunesmith_api.keys import DeploymentCondition, Reason
from tunesmith_api.model import digest_of
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.adapters import ADAPTER_ENGINES, AdapterPhase, AdapterStatus
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.objects import ConfigMapView
from tunesmith_operator.core.kubernetes.resources import CONFIG_MAP, JOB
from tunesmith_operator.core.kubernetes.workloads import JobView
from tunesmith_operator.core.modeldeployment.adapterchildren import adapter_job, adapter_plan, adapter_set
from tunesmith_operator.core.modeldeployment.adaptersource import AdapterSource
from tunesmith_operator.core.modeldeployment.observed import Children, revision_label
from tunesmith_operator.core.modeldeployment.revisions import History
from tunesmith_operator.core.modeldeployment.source import SourceAbsent
from tunesmith_operator.core.modeldeployment.template import Template, stored_template
from tunesmith_operator.core.pods.crashes import first_crash
from tunesmith_operator.core.pods.startup import Patience, examine
from tunesmith_operator.core.reconcile.children import Keeper
from tunesmith_operator.core.reconcile.decision import Action, Create, Delete
from tunesmith_operator.core.reconcile.progress import ServersTarget
from tunesmith_operator.core.status.conditions import FALSE, TRUE, Finding, find

__all__ = [
    "AdapterStates",
    "adapter_actions",
    "adapter_states",
    "adapters_ready",
    "adapters_target",
    "templates_of",
    "with_statuses",
]

Sources = Mapping[str, AdapterSource | SourceAbsent]
MOST_ASKED: Final = 64
_SERVING: Final = (RevisionPhase.ROLLING_OUT, RevisionPhase.ACTIVE)


@dataclass(frozen=True, slots=True)
class State:
    """One adapter for one revision. `served` is what its servers are to have under this name now, if anything."""

    name: str
    phase: AdapterPhase
    source: AdapterSource | None = None
    key: str = ""
    reason: str = ""
    message: str = ""
    served: ServedAdapter | None = None


@dataclass(frozen=True, slots=True)
class AdapterStates:
    """All adapters for the revisions that have servers, or are about to: by the number of the revision."""

    by_revision: Mapping[int, tuple[State, ...]]

    def of(self, revision: Revision) -> tuple[State, ...]:
        """The adapters of a revision, in the order of the spec."""
        return self.by_revision.get(revision.number, ())

    def awaited(self, revision: Revision, children: Children, patience: timedelta, now: datetime) -> datetime | None:
        """Until when servers are not started yet, as adapters are being converted: who asks for one finds it there."""
        ends = []
        for state in self.of(revision):
            if state.phase is AdapterPhase.CONVERTING:
                job = children.adapter_jobs.get(state.key)
                begun = job.created if job is not None and job.created is not None else now
                ends.append(begun + patience)
        return max((end for end in ends if end > now), default=None)


def adapter_states(
    deployment: ModelDeployment,
    sources: Sources,
    history: History,
    templates: Mapping[int, Template],
    children: Children,
) -> AdapterStates:
    """How far the adapters are. `templates`: of the revisions that have an artefact and aren't given up."""
    found = {}
    for revision in _revisions(history):
        template = templates.get(revision.number)
        if template is None or revision.phase not in _SERVING or not revision.model_digest:
            continue
        known = _stored_set(children, revision)
        found[revision.number] = tuple(
            _state(deployment, it.name, sources[it.name], revision, template, known, children)
            for it in deployment.spec.adapters
        )
    return AdapterStates(found)


def templates_of(
    deployment: ModelDeployment, history: History, children: Children, target: Template | None
) -> dict[int, Template]:
    """What the revisions that may have servers are made of; of a deployment without adapters nobody asks."""
    if not deployment.spec.adapters and not children.adapter_sets and not children.adapter_jobs:
        return {}
    found = {}
    for revision in _revisions(history):
        if target is not None and target.hash == revision.hash:
            template: Template | None = target
        else:
            template = stored_template(deployment, children.config_maps.get(revision_label(revision.number)))
        if template is not None:
            found[revision.number] = template
    return found


def _revisions(history: History) -> tuple[Revision, ...]:
    both = {it.number: it for it in (history.current, history.latest) if it is not None}
    return tuple(both[number] for number in sorted(both))


def _stored_set(children: Children, revision: Revision) -> dict[str, ServedAdapter]:
    """What the revision's servers were last told, by name."""
    view = children.adapter_sets.get(revision_label(revision.number))
    try:
        found = AdapterSet.from_json(view.data.get(keys.ADAPTERS_FILE, "")) if view is not None else AdapterSet()
    except ValidationError:
        return {}
    return {it.name: it for it in found.adapters}


def _state(
    deployment: ModelDeployment,
    name: str,
    source: AdapterSource | SourceAbsent,
    revision: Revision,
    template: Template,
    stored: Mapping[str, ServedAdapter],
    children: Children,
) -> State:
    before = stored.get(name)
    kept = " What it was before is served meanwhile." if before is not None else ""
    if template.plan.engine not in ADAPTER_ENGINES:
        engines = " or ".join(ADAPTER_ENGINES)
        message = f"the engine {template.plan.engine} serves no adapters: set spec.engine.type {engines}"
        return State(name, AdapterPhase.FAILED, reason=Reason.ADAPTER_INVALID, message=message)
    if isinstance(source, SourceAbsent):
        waits = source.reason is Reason.SOURCE_NOT_READY
        phase = AdapterPhase.PENDING if waits else AdapterPhase.FAILED
        return State(name, phase, reason=source.reason, message=f"{source.message}.{kept}", served=before)
    key = digest_of([source.uri, source.digest, revision.model_digest, template.plan.engine.value])[:10]
    known = next((it for it in _all_stored(children) if it.key == key), None)
    if known is not None:
        served = known.model_copy(update={"name": name})
        return State(name, AdapterPhase.LOADING, source, key, served=served)
    job = children.adapter_jobs.get(key)
    made = _made(job, children, name, key)
    if made is not None:
        return State(name, AdapterPhase.LOADING, source, key, served=made)
    if job is not None and job.failed is not None:
        reason, cause = _failure(job, children)
        again = f"Correct the cause, then try again with: kubectl delete job -n {job.namespace} {job.name}"
        message = f"{cause.rstrip('.')}. {again}.{kept}"
        return State(name, AdapterPhase.FAILED, source, key, reason, message, served=before)
    message = f"it is being converted.{kept}"
    if job is not None and (problem := _problem(deployment, job, children)):
        message = f"{problem}{kept}"
    return State(name, AdapterPhase.CONVERTING, source, key, Reason.QUANTIZING, message, served=before)


def _all_stored(children: Children) -> Iterator[ServedAdapter]:
    for view in children.adapter_sets.values():
        try:
            yield from AdapterSet.from_json(view.data.get(keys.ADAPTERS_FILE, "")).adapters
        except ValidationError:
            continue


def _made(job: JobView | None, children: Children, name: str, key: str) -> ServedAdapter | None:
    if job is None or not job.complete:
        return None
    for pod in children.pods:
        if pod.owner_uid == job.uid and pod.phase == "Succeeded" and pod.report is not None and pod.report.model:
            model = pod.report.model
            return ServedAdapter(
                name=name, key=key, uri=model.uri, digest=model.digest, source_digest=model.base_digest
            )
    return None


def _failure(job: JobView, children: Children) -> tuple[str, str]:
    crash = first_crash(it for it in children.pods if it.owner_uid == job.uid)
    if crash is None:
        return Reason.QUANTIZATION_FAILED, job.failed.message if job.failed is not None else ""
    report = crash.pod.report
    return (report.reason, report.message) if report is not None else (Reason.QUANTIZATION_FAILED, crash.message)


def _problem(deployment: ModelDeployment, job: JobView, children: Children) -> str:
    """Why the Job's pod doesn't start, where it doesn't."""
    pods = tuple(it for it in children.pods if it.owner_uid == job.uid)
    refused = tuple(it for it in children.rejections if it.job_uid == job.uid)
    # when it is given up is not said here: the other adapters and the model are served all the same
    created = job.created
    if created is None:
        return ""
    patience = Patience(timedelta(seconds=deployment.spec.rollout.progress_deadline_seconds))
    problem = examine(pods, refused, patience, created).problem
    return problem.message if problem is not None else ""


# ---- writing


def adapter_actions(
    deployment: ModelDeployment,
    states: AdapterStates,
    history: History,
    templates: Mapping[int, Template],
    children: Children,
    keeper: Keeper,
    config: Config,
) -> Iterator[Action]:
    """Lists for the servers, Jobs for what isn't converted yet, and an end to those that nobody needs."""
    needed = set()
    for revision in _revisions(history):
        found, template = states.of(revision), templates.get(revision.number)
        needed |= {it.key for it in found if it.key}
        if template is None or revision.number not in states.by_revision:
            continue
        view = children.adapter_sets.get(revision_label(revision.number))
        if found or view is not None:
            served = tuple(it.served for it in found if it.served is not None)
            yield from keeper.keep(adapter_set(deployment, revision.number, AdapterSet(adapters=served)), view)
        for state in found:
            yield from _conversion(revision, state, template, children, config)
    # pods of a revision that has just retired still get requests for a moment
    kept = {revision_label(it.number) for it in _revisions(history)} | children.deployments.keys()
    unused: list[tuple[Mapping[str, ConfigMapView | JobView], set[str]]] = [
        (children.adapter_jobs, needed),
        (children.adapter_plans, needed),
        (children.adapter_sets, kept),
    ]
    for group, wanted in unused:
        for label, child in group.items():
            if label not in wanted and not child.deleting:
                resource = JOB if isinstance(child, JobView) else CONFIG_MAP
                yield Delete(resource, child.namespace, child.name, child.uid)


def _conversion(
    revision: Revision, state: State, template: Template, children: Children, config: Config
) -> Iterator[Action]:
    if state.phase is not AdapterPhase.CONVERTING or state.source is None:
        return
    plan = AdapterPlan(
        name=state.name, uri=state.source.uri, digest=state.source.digest, base_digest=revision.model_digest
    )
    if state.key not in children.adapter_plans:
        yield Create(adapter_plan(template, revision.number, state.key, plan))
    job = children.adapter_jobs.get(state.key)
    if job is None:
        yield Create(adapter_job(template, state.key, plan, config))
    elif job.complete and not job.deleting:
        # what it made went with its pod: it finds that again
        yield Delete(JOB, job.namespace, job.name, job.uid)


# ---- what servers say


def adapters_target(history: History, states: AdapterStates, children: Children) -> ServersTarget | None:
    """The pods that are asked whether they have taken up their list; None where all are known to have it."""
    revision = _shown(history)
    if revision is None or not _unheard(history, states, children):
        return None
    pods = children.server_pods(revision_label(revision.number))
    found = sorted((pod.uid, pod.ip) for pod in pods if pod.ip and not pod.finished and not pod.deleting)
    return ServersTarget(_window(revision), tuple(found[:MOST_ASKED]), keys.PORT_HEALTH) if found else None


def _window(revision: Revision) -> str:
    return f"{revision.name}/adapters"


def _shown(history: History) -> Revision | None:
    """The revision whose adapters the status is about: the one that answers, or will be the first to."""
    return history.current or history.latest


def _unheard(history: History, states: AdapterStates, children: Children) -> bool:
    revision = _shown(history)
    loading = [it for it in states.of(revision) if it.served is not None] if revision is not None else []
    return bool({f"{it.served.name}@{it.served.digest}" for it in loading if it.served} - _heard(history, children))


def _heard(history: History, children: Children) -> frozenset[str]:
    """`name@digest` of the adapters that all pods of the revision have said they serve."""
    sample, revision = children.servers, _shown(history)
    if sample is None or revision is None or sample.window != _window(revision):
        return frozenset()
    return sample.adapters


# ---- the status


def with_statuses(
    deployment: ModelDeployment, states: AdapterStates, history: History, children: Children
) -> list[AdapterStatus]:
    """One entry for each of spec.adapters. What has been heard of a revision's servers once is not asked again."""
    revision = _shown(history)
    before = {it.name: it for it in deployment.status.adapters}
    shown = {it.name: it for it in states.of(revision)} if revision is not None else {}
    heard = _heard(history, children)
    result = []
    for adapter in deployment.spec.adapters:
        state = shown.get(adapter.name)
        if state is None or revision is None:
            message = "it waits until the model is made, which it has to fit."
            waiting = AdapterStatus(name=adapter.name, reason=Reason.QUANTIZING.value, message=message)
            result.append(before.get(adapter.name, waiting))
            continue
        served, phase, reason, message = state.served, state.phase, state.reason, state.message
        if phase is AdapterPhase.LOADING and served is not None:
            known = before.get(adapter.name)
            same = known is not None and known.phase is AdapterPhase.SERVED
            same = (
                same
                and known is not None
                and known.artifact_digest == served.digest
                and known.revision == revision.name
            )
            if same or f"{served.name}@{served.digest}" in heard:
                phase, reason, message = AdapterPhase.SERVED, "", ""
            else:
                reason = Reason.ADAPTERS_LOADING
                message = "servers load it when their list reaches them, within about a minute."
        result.append(
            AdapterStatus(
                name=adapter.name,
                phase=phase,
                reason=str(reason),
                message=message,
                uri=state.source.uri if state.source is not None else "",
                digest=served.source_digest if served is not None else state.source.digest if state.source else "",
                artifact_uri=served.uri if served is not None else "",
                artifact_digest=served.digest if served is not None else "",
                revision=revision.name,
            )
        )
    return result


def adapters_ready(deployment: ModelDeployment, statuses: Sequence[AdapterStatus]) -> tuple[Finding, ...]:
    """The condition about all of them; none where there never was an adapter."""
    type_ = DeploymentCondition.ADAPTERS_READY
    if not statuses:
        if find(deployment.status.conditions, type_) is None:
            return ()
        return (Finding(type_, TRUE, Reason.ADAPTERS_SERVED, "There are no adapters in spec.adapters."),)
    served = sum(it.phase is AdapterPhase.SERVED for it in statuses)
    if served == len(statuses):
        names = ", ".join(it.name for it in statuses)
        return (Finding(type_, TRUE, Reason.ADAPTERS_SERVED, f"Served: {names}."),)
    failed = [it for it in statuses if it.phase is AdapterPhase.FAILED]
    first = next(iter(failed), None) or next(it for it in statuses if it.phase is not AdapterPhase.SERVED)
    others = f" {served} of {len(statuses)} are served."
    message = f"{first.name}: {first.message}{others}"
    return (Finding(type_, FALSE, Reason(first.reason), message),)
