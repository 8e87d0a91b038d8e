"""Revisions: which there are, which one the spec asks for, and how far each has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_operator.core.kubernetes.objects import ConfigMapView
from tunesmith_operator.core.kubernetes.workloads import DeploymentView, JobView
from tunesmith_operator.core.modeldeployment.gate import held_back, judged
from tunesmith_operator.core.modeldeployment.memory import with_need
from tunesmith_operator.core.modeldeployment.observed import Children, revision_label, revision_name
from tunesmith_operator.core.modeldeployment.template import Template, stored_template
from tunesmith_operator.core.modeldeployment.traffic import place_of, takeover_of, verdict_of, with_place
from tunesmith_operator.core.pods.crashes import first_crash
from tunesmith_operator.core.pods.quota import quota_problem
from tunesmith_operator.core.pods.startup import STORAGE_SECRET, Patience, SecretUse, Startup, examine
from tunesmith_operator.core.text import duration, parse_time, rfc3339, shortened

__all__ = ["History", "advance", "failed_in_rollout", "history_of", "quantize_startup", "trim"]

MAX_MESSAGE = 1024
_IN_PROGRESS = (RevisionPhase.QUANTIZING, RevisionPhase.ROLLING_OUT)
_NO_PLACE = {"weight": 0, "step_index": None, "step_time": None}


@dataclass(frozen=True, slots=True)
class History:
    """All revisions, oldest first; the one that answers, if any; and the newest, if any."""

    revisions: tuple[Revision, ...]
    current: Revision | None
    latest: Revision | None

    def with_revision(self, changed: Revision) -> History:
        """The same with one revision replaced or added; an ACTIVE one becomes current and retires the previous one.

        What the newest isn't given of the requests, the current one is.
        """
        by_number = {revision.number: revision for revision in self.revisions} | {changed.number: changed}
        current = self.current
        if current is not None and current.number == changed.number:
            current = changed
        if changed.phase is RevisionPhase.ACTIVE and (current is None or current.number != changed.number):
            if current is not None:
                by_number[current.number] = current.model_copy(update=_NO_PLACE | {"phase": RevisionPhase.RETIRED})
            current = changed
        newest = max(by_number)
        if current is not None:
            weight = 100 if current.number == newest else 100 - by_number[newest].weight
            current = by_number[current.number] = current.model_copy(
                update=_NO_PLACE | {"phase": RevisionPhase.ACTIVE, "weight": weight}
            )
        for number, revision in by_number.items():
            if number != newest and revision.phase in _IN_PROGRESS:
                by_number[number] = revision.model_copy(update=_NO_PLACE | {"phase": RevisionPhase.RETIRED})
        ordered = tuple(by_number[number] for number in sorted(by_number))
        return History(ordered, current, ordered[-1])


def history_of(deployment: ModelDeployment, children: Children) -> History:
    """What the status says, completed from the children where it says nothing (it was lost, or never written)."""
    status = deployment.status
    known = {revision.number: revision for revision in status.revisions}
    for label, config_map in children.config_maps.items():
        rebuilt = _rebuilt(deployment, label, config_map)
        if rebuilt is not None and rebuilt.number not in known:
            known[rebuilt.number] = rebuilt
    ordered = tuple(known[number] for number in sorted(known))
    current = next((revision for revision in ordered if revision.name == status.current_revision), None)
    if current is None and (status.current_revision or not status.revisions):
        current = _selected(children, ordered)
    latest = ordered[-1] if ordered else None
    if latest is not None and latest is not current and not status.revisions and _both_answer(children):
        latest = latest.model_copy(update={"weight": 1})
        ordered = (*ordered[:-1], latest)
    return History(ordered, current, latest)


def _both_answer(children: Children) -> bool:
    return bool(children.led_to) and keys.LABEL_REVISION not in children.led_to


def _selected(children: Children, ordered: Sequence[Revision]) -> Revision | None:
    """The revision that the Service leads to; the oldest that has servers, where it leads to more than one.

    It leads to the newest from the beginning where that is the first: then only its replicas say that it has answered.
    """
    label = children.led_to.get(keys.LABEL_REVISION, "")
    if _both_answer(children):
        label = next(
            (it for it in map(revision_label, (one.number for one in ordered)) if it in children.deployments), ""
        )
    child = children.deployments.get(label)
    found = next((revision for revision in ordered if revision_label(revision.number) == label), None)
    if child is None or found is None or (child.available == 0 and found.number == ordered[-1].number):
        return None
    return found.model_copy(update={"phase": RevisionPhase.ACTIVE})


def _rebuilt(deployment: ModelDeployment, label: str, config_map: ConfigMapView) -> Revision | None:
    digits = label.removeprefix("r")
    try:
        plan = ServingPlan.from_json(config_map.data.get(keys.PLAN_FILE, ""))
    except ValidationError:
        return None
    if not digits.isdecimal():
        return None
    return Revision(
        number=int(digits),
        name=revision_name(deployment, int(digits)),
        hash=config_map.annotations.get(keys.ANNOTATION_REVISION_HASH, ""),
        phase=RevisionPhase.QUANTIZING,
        model_uri=plan.model_uri,
        model_digest=plan.model_digest,
        quantization=plan.quantization,
        artifact_uri=plan.artifact_uri,
        stands_in_for=config_map.annotations.get(keys.ANNOTATION_STANDS_IN_FOR, ""),
        created_time=rfc3339(config_map.created) if config_map.created is not None else None,
    )


def _new_revision(template: Template, number: int, now: datetime) -> Revision:
    """The revision that the spec asks for, about to begin."""
    return Revision(
        number=number,
        name=revision_name(template.deployment, number),
        hash=template.hash,
        phase=RevisionPhase.QUANTIZING,
        model_uri=template.plan.model_uri,
        model_digest=template.plan.model_digest,
        quantization=template.plan.quantization,
        artifact_uri=template.artifact_uri,
        stands_in_for=template.stands_in_for,
        created_time=rfc3339(now),
    )


def with_target(history: History, template: Template, now: datetime, retire_delay: timedelta) -> History:
    """The history with the revision that the spec asks for at its end.

    One that has begun to answer is taken back first: the next is made when no node sends requests to it any longer.
    """
    latest = history.latest
    if latest is None:
        return history.with_revision(_new_revision(template, 1, now))
    if latest.hash == template.hash and latest.reason != Reason.SUPERSEDED:
        return history
    if latest.phase is RevisionPhase.ROLLING_OUT and latest.weight > 0:
        message = "taken back before it had all requests: the spec asks for another revision"
        return history.with_revision(_failed(latest, Reason.SUPERSEDED, message))
    left = parse_time(latest.step_time)
    if latest.phase is RevisionPhase.FAILED and (latest.weight > 0 or (left is not None and now < left + retire_delay)):
        return history
    return history.with_revision(_new_revision(template, latest.number + 1, now))


def failed_in_rollout(revision: Revision) -> bool:
    """Whether a failed revision had its artefact already."""
    return revision.reason == Reason.PROGRESS_DEADLINE_EXCEEDED or revision.step_index is not None


def quantize_startup(deployment: ModelDeployment, children: Children, label: str, now: datetime) -> Startup:
    """How far the start of the quantize pod is."""
    patience = Patience(timedelta(seconds=deployment.spec.rollout.progress_deadline_seconds))
    pods = children.quantize_pods(label)
    job = children.jobs.get(label)
    if job is not None and job.suspended and job.queue and not job.ending:
        # Kueue puts it into the default queue of its namespace
        return Startup(quota_problem(job, job.queue))
    if job is None or job.suspended or job.ending:
        return Startup()
    busy = any(not pod.finished for pod in pods)
    rejections = () if busy else tuple(it for it in children.rejections if it.job_uid == job.uid)
    return examine(pods, rejections, patience, now, _secret_uses(deployment))


def _secret_uses(deployment: ModelDeployment) -> tuple[SecretUse, ...]:
    hub = deployment.spec.hugging_face.secret_ref
    if hub is None:
        return (STORAGE_SECRET,)
    used = SecretUse("huggingFace.secretRef", keys.HUB_SECRET_KEYS, hub.name)
    storage = deployment.spec.storage
    named = storage.secret_ref.name if storage is not None and storage.secret_ref is not None else ""
    return (used, SecretUse(STORAGE_SECRET.field, STORAGE_SECRET.keys, named)) if named else (used,)


def advance(deployment: ModelDeployment, history: History, children: Children, now: datetime) -> Revision:
    """The newest revision as far as its children have brought it.

    A failed one starts again when the child that failed has been deleted; one that the gate holds back is judged again,
    by the limits as they are now.
    """
    revision, current = history.latest, history.current
    assert revision is not None
    label = revision_label(revision.number)
    job, servers = children.jobs.get(label), children.deployments.get(label)
    if revision.phase is RevisionPhase.FAILED:
        rollout = failed_in_rollout(revision)
        if (servers if rollout else job) is not None:
            if held_back(revision):
                return judged(deployment, revision)
            return _taken_back(deployment, revision, current, children, now)
        phase = RevisionPhase.ROLLING_OUT if rollout else RevisionPhase.QUANTIZING
        revision = revision.model_copy(update=_NO_PLACE | {"phase": phase, "reason": "", "message": ""})
    if deployment.spec.rollout.abort == revision.name and revision.phase in _IN_PROGRESS:
        revision = _aborted(revision, servers)
        return _taken_back(deployment, revision, current, children, now)
    if revision.phase is RevisionPhase.QUANTIZING:
        revision = _quantized(deployment, revision, children, job, servers, now)
    if revision.phase is RevisionPhase.ROLLING_OUT and servers is not None:
        revision = _rolled_out(deployment, revision, current, children, servers, now)
        if revision.phase is RevisionPhase.FAILED:
            revision = _taken_back(deployment, revision, current, children, now)
    return revision


def _quantized(
    deployment: ModelDeployment,
    revision: Revision,
    children: Children,
    job: JobView | None,
    servers: DeploymentView | None,
    now: datetime,
) -> Revision:
    if servers is not None and (job is None or not job.complete):
        return revision.model_copy(update={"phase": RevisionPhase.ROLLING_OUT})
    if job is None:
        return revision
    label = revision_label(revision.number)
    pods = children.quantize_pods(label)
    if job.complete:
        reports = [pod.report for pod in pods if pod.phase == "Succeeded" and pod.report is not None]
        made = _made(revision, reports[0]) if reports else revision.model_copy(update={"evaluation": None})
        template = stored_template(deployment, children.config_maps.get(label))
        sized = with_need(made, template, reports[0].model if reports else None, servers is not None)
        if servers is not None:  # they have passed the gate already: the status that said so was lost
            return sized.model_copy(update={"phase": RevisionPhase.ROLLING_OUT})
        return sized if sized.phase is RevisionPhase.FAILED else judged(deployment, sized)
    again = f"Then try again with: kubectl delete job -n {job.namespace} {job.name}"
    if job.failed is not None:
        crash = first_crash(pods)
        report = crash.pod.report if crash is not None else None
        reason = report.reason if report is not None else Reason.QUANTIZATION_FAILED
        cause = crash.message if crash is not None else job.failed.message
        return _failed(revision, reason, f"quantization failed: {cause}. {again}")
    expired = quantize_startup(deployment, children, label, now).expired
    if expired is not None:
        waited = duration(deployment.spec.rollout.progress_deadline_seconds)
        message = f"given up after {waited} (rollout.progressDeadlineSeconds): {expired.message} {again}"
        return _failed(revision, expired.reason, message)
    return revision


def _made(revision: Revision, report: TerminationReport) -> Revision:
    """The revision with what its quantize Job says of it."""
    update: dict[str, object] = {"evaluation": report.evaluation}
    artifact = report.model
    if artifact is not None:
        update |= {
            "artifact_uri": artifact.uri,
            "artifact_digest": artifact.digest,
            "artifact_size_bytes": artifact.size_bytes,
            "bits_per_weight": f"{artifact.bits_per_weight:.2f}" if artifact.bits_per_weight is not None else "",
            "model_digest": artifact.base_digest or revision.model_digest,
        }
    return revision.model_copy(update=update)


def _rolled_out(
    deployment: ModelDeployment,
    revision: Revision,
    current: Revision | None,
    children: Children,
    servers: DeploymentView,
    now: datetime,
) -> Revision:
    again = f"Correct the cause, then try again with: kubectl delete deployment -n {servers.namespace} {servers.name}"
    failure = verdict_of(deployment, revision, current, children).failure
    if failure:
        return _failed(revision, Reason.ROLLED_BACK, f"taken back: {failure}. {again}")
    way = takeover_of(deployment, revision, current, children)
    place = way.next(place_of(revision), now)
    revision = with_place(revision, place)
    if way.arrived(place, now):
        update = _NO_PLACE | {"phase": RevisionPhase.ACTIVE, "reason": "", "message": "", "weight": 100}
        return revision.model_copy(update=update)
    overdue = way.overdue_at(place)
    # a Deployment that was complete once misses no deadline of its own any more, however it is scaled
    if (servers.deadline_exceeded and place.weight < 100) or (overdue is not None and now >= overdue):
        waited = duration(deployment.spec.rollout.progress_deadline_seconds)
        message = (
            f"{servers.available} of {servers.desired} replicas became available within {waited} "
            f"(rollout.progressDeadlineSeconds). {again}"
        )
        return _failed(revision, Reason.PROGRESS_DEADLINE_EXCEEDED, message)
    return revision


def _aborted(revision: Revision, servers: DeploymentView | None) -> Revision:
    """Taken back because the spec says so; its place says whether it had servers."""
    if servers is not None and revision.step_index is None:
        revision = with_place(revision, place_of(revision))
    message = (
        f"taken back, as rollout.abort says. To try it again, take that out and delete its "
        f"{'Deployment' if servers is not None else 'quantize Job'}"
    )
    return _failed(revision, Reason.ABORTED, message)


def _taken_back(
    deployment: ModelDeployment, revision: Revision, current: Revision | None, children: Children, now: datetime
) -> Revision:
    """A failed revision, given no more of the requests than the one before can't take yet."""
    if revision.weight == 0:
        return revision
    return with_place(revision, takeover_of(deployment, revision, current, children).withdrawn(place_of(revision), now))


def _failed(revision: Revision, reason: Reason, message: str) -> Revision:
    update: dict[str, object] = {
        "phase": RevisionPhase.FAILED,
        "reason": reason.value,
        "message": shortened(message, MAX_MESSAGE),
    }
    if revision.weight == 0:
        update["step_time"] = None  # no node ever sent it requests: it may end at once
    return revision.model_copy(update=update)


def trim(history: History, limit: int, wanted: str | None) -> tuple[Revision, ...]:
    """The revisions that the status lists: the newest `limit`, the one that answers, and the one to go back to."""
    newest = {revision.number for revision in history.revisions[-limit:]}
    current = history.current.number if history.current is not None else 0
    return tuple(it for it in history.revisions if it.number in newest or it.number == current or it.name == wanted)
