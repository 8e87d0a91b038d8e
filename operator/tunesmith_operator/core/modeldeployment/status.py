"""History and children → status: the only place that says what a ModelDeployment's status is."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from tunesmith_api.keys import DeploymentCondition, Reason
from tunesmith_api.v1alpha1 import ModelDeployment, ModelDeploymentStatus, ObjectMeta
from tunesmith_api.v1alpha1.adapters import AdapterStatus
from tunesmith_api.v1alpha1.deploymentstatus import DeploymentDisplay, DeploymentPhase, Revision, RevisionPhase
from tunesmith_operator.core.modeldeployment.adapters import adapters_ready
from tunesmith_operator.core.modeldeployment.children import selector
from tunesmith_operator.core.modeldeployment.gate import held_back, quality_held
from tunesmith_operator.core.modeldeployment.observed import Children
from tunesmith_operator.core.modeldeployment.revisions import History, failed_in_rollout, trim
from tunesmith_operator.core.modeldeployment.scaling import Scaling
from tunesmith_operator.core.modeldeployment.source import SourceAbsent
from tunesmith_operator.core.modeldeployment.summary import Situation, ready, why_not_ready
from tunesmith_operator.core.modeldeployment.traffic import Traffic, place_of, serving, takeover_of, verdict_of
from tunesmith_operator.core.pods.startup import StartupProblem
from tunesmith_operator.core.reconcile.rules import Violation
from tunesmith_operator.core.status.conditions import (
    FALSE,
    TRUE,
    UNKNOWN,
    Finding,
    accepted,
    children_applied,
    refused,
    with_findings,
)
from tunesmith_operator.core.text import rfc3339

__all__ = ["not_carried_out", "refused_status", "serving_status", "unreadable_status", "waiting_status", "with_remark"]


def refused_status(deployment: ModelDeployment, violation: Violation, now: datetime) -> ModelDeploymentStatus:
    """The spec breaks a policy and nothing has been started."""
    findings = (
        refused(violation.reason, violation.message),
        Finding(DeploymentCondition.READY, FALSE, violation.reason, violation.message),
    )
    return with_findings(deployment.status, findings, now, deployment.metadata.generation, phase=DeploymentPhase.FAILED)


def not_carried_out(
    deployment: ModelDeployment, serving: ModelDeploymentStatus, violation: Violation, now: datetime
) -> ModelDeploymentStatus:
    """An edit breaks a policy: what was accepted before goes on being served, and reported."""
    message = f"{violation.message}. What was accepted before goes on being served meanwhile."
    return with_findings(
        serving,
        (refused(violation.reason, message),),
        now,
        deployment.metadata.generation,
        observed_generation=deployment.status.observed_generation,
    )


def with_remark(
    deployment: ModelDeployment, status: ModelDeploymentStatus, remark: str, now: datetime
) -> ModelDeploymentStatus:
    """The spec is carried out, and there is something to say of it."""
    finding = accepted()
    message = f"{finding.message} {remark}"
    return with_findings(status, (replace(finding, message=message),), now, deployment.metadata.generation)


def unreadable_status(
    meta: ObjectMeta, before: ModelDeploymentStatus, message: str, has_jobs: bool, now: datetime
) -> ModelDeploymentStatus:
    """The spec can't be read: what answers goes on answering, and nobody looks after it."""
    status = UNKNOWN if before.current_revision else FALSE
    findings = (
        refused(Reason.INVALID_SPEC, message),
        Finding(DeploymentCondition.READY, status, Reason.INVALID_SPEC, message),
    )
    return with_findings(before, findings, now, meta.generation)


def waiting_status(deployment: ModelDeployment, reason: Reason, message: str, now: datetime) -> ModelDeploymentStatus:
    """There is nothing to serve yet."""
    findings = (
        accepted(),
        Finding(DeploymentCondition.ARTIFACT_READY, FALSE, reason, message),
        Finding(DeploymentCondition.READY, FALSE, reason, message),
    )
    return with_findings(
        deployment.status,
        findings,
        now,
        deployment.metadata.generation,
        phase=DeploymentPhase.PENDING,
        display=DeploymentDisplay(ready=f"0/{deployment.spec.replicas}", quantization=""),
    )


def serving_status(
    deployment: ModelDeployment,
    history: History,
    children: Children,
    traffic: Traffic,
    problem: StartupProblem | None,
    absent: SourceAbsent | None,
    adapters: list[AdapterStatus],
    scaling: Scaling,
    now: datetime,
) -> ModelDeploymentStatus:
    """There is at least one revision."""
    before, latest = deployment.status, history.latest
    assert latest is not None
    answers = serving(latest, history.current, children)
    desired = deployment.spec.replicas
    answering = min(sum(it.available for it in answers), desired) if history.current is not None else 0
    led_to = selector(deployment, traffic.selected)
    meta = deployment.metadata
    summary = ready(Situation(history, latest, answering, desired, problem, children, scaling))
    findings = (
        accepted(),
        _artifact(latest, problem, absent),
        quality_held(deployment, history.revisions),
        children_applied(),
        *adapters_ready(deployment, adapters),
        _progressing(deployment, history, latest, problem, children),
        _available(history, answering, desired, summary, scaling, children),
        summary,
    )
    return with_findings(
        before,
        findings,
        now,
        meta.generation,
        observed_generation=meta.generation,
        phase=_phase(deployment, history, latest, answering, summary, children),
        current_revision=history.current.name if history.current is not None else "",
        latest_revision=latest.name,
        revisions=list(trim(history, deployment.spec.revision_history_limit, deployment.spec.rollout.rollback_to)),
        adapters=adapters,
        replicas=sum(it.replicas for it in answers),
        ready_replicas=sum(it.ready for it in answers),
        autoscaling=scaling.status,
        selector=",".join(f"{key}={value}" for key, value in led_to.items()),
        url=f"http://{meta.name}.{meta.namespace}.svc/v1",
        display=DeploymentDisplay(
            ready=f"{answering}/{desired}",
            quantization=history.current.quantization.value if history.current is not None else "",
        ),
    )


def _artifact(latest: Revision, problem: StartupProblem | None, absent: SourceAbsent | None) -> Finding:
    type_ = DeploymentCondition.ARTIFACT_READY
    if latest.phase is RevisionPhase.QUANTIZING:
        if absent is not None:
            return Finding(type_, FALSE, absent.reason, absent.message)
        if problem is not None:
            return Finding(type_, FALSE, problem.reason, problem.message)
        return Finding(type_, FALSE, Reason.QUANTIZING, f"The artefact of {latest.name} is being made.")
    made = failed_in_rollout(latest) or held_back(latest) or latest.reason == Reason.MEMORY_TOO_SMALL
    if latest.phase is RevisionPhase.FAILED and not made:
        return Finding(type_, FALSE, Reason(latest.reason), latest.message)
    return Finding(type_, TRUE, Reason.QUANTIZED, f"The artefact of {latest.name} is in {latest.artifact_uri}.")


def _progressing(
    deployment: ModelDeployment,
    history: History,
    latest: Revision,
    problem: StartupProblem | None,
    children: Children,
) -> Finding:
    type_ = DeploymentCondition.PROGRESSING
    if latest.phase is RevisionPhase.FAILED:
        return Finding(type_, FALSE, Reason(latest.reason), f"{latest.name}: {latest.message}")
    if latest.phase is RevisionPhase.ACTIVE:
        return Finding(type_, FALSE, Reason.ROLLED_OUT, f"{latest.name} is rolled out.")
    kept = f" {history.current.name} goes on answering meanwhile." if history.current is not None else ""
    if latest.phase is RevisionPhase.QUANTIZING:
        return Finding(type_, TRUE, Reason.QUANTIZING, f"{latest.name} is being quantized.{kept}")
    cause = why_not_ready(latest, problem, children)
    if latest.weight > 0 and history.current is not None:
        return _taking_over(deployment, latest, history.current, cause, children)
    return Finding(type_, TRUE, Reason.ROLLING_OUT, f"{latest.name} is starting.{cause}{kept}")


def _available(
    history: History, answering: int, desired: int, summary: Finding, scaling: Scaling, children: Children
) -> Finding:
    type_ = DeploymentCondition.AVAILABLE
    if history.current is None:
        return Finding(type_, FALSE, Reason.REPLICAS_UNAVAILABLE, "No revision has answered yet.")
    if summary.reason == Reason.WAKING or (desired == 0 and scaling.automatic):
        return Finding(type_, TRUE, summary.reason, summary.message)
    if desired == 0:
        message = "Scaled to zero, as spec.replicas says: nobody answers until it is raised."
        return Finding(type_, FALSE, Reason.SCALED_TO_ZERO, message)
    if answering == 0:
        cause = why_not_ready(history.current, None, children)
        return Finding(type_, FALSE, Reason.REPLICAS_UNAVAILABLE, f"No replica answers.{cause}")
    return Finding(type_, TRUE, Reason.REPLICAS_AVAILABLE, f"{history.current.name} answers.")


def _taking_over(
    deployment: ModelDeployment, latest: Revision, current: Revision, cause: str, children: Children
) -> Finding:
    """How much the new revision is given, and what is waited for."""
    type_, name = DeploymentCondition.PROGRESSING, latest.name
    way, place = takeover_of(deployment, latest, current, children), place_of(latest)
    end, note = way.pause_end(place), verdict_of(deployment, latest, current, children).note
    judged, given = f" {note}" if note else "", f"{name} gets {latest.weight} % of the requests"
    step = f"step {place.step + 1} of {len(way.steps)}"
    if way.paused(place):
        waits = f"Set rollout.promote to {name} to go on, rollout.abort to go back to {current.name}."
        return Finding(type_, TRUE, Reason.PAUSED, f"{given}, {step}, and waits. {waits}{judged}")
    if latest.weight == 100:
        kept = f"{current.name} can be gone back to"
        return Finding(
            type_, TRUE, Reason.ROLLING_OUT, f"{name} gets all requests; until {_time(end)}, {kept}.{judged}"
        )
    if end is not None:
        return Finding(type_, TRUE, Reason.ROLLING_OUT, f"{given}, {step}, until {_time(end)}.{judged}")
    return Finding(type_, TRUE, Reason.ROLLING_OUT, f"{given}; replicas for more are starting.{cause}{judged}")


def _time(moment: datetime | None) -> str:
    return rfc3339(moment) if moment is not None else "soon"


def _phase(
    deployment: ModelDeployment,
    history: History,
    latest: Revision,
    answering: int,
    summary: Finding,
    children: Children,
) -> DeploymentPhase:
    desired = deployment.spec.replicas
    if latest.phase is RevisionPhase.FAILED and history.current is not None:
        back = latest.reason in (Reason.ROLLED_BACK, Reason.ABORTED, Reason.SUPERSEDED)
        return DeploymentPhase.ROLLED_BACK if back else DeploymentPhase.DEGRADED
    if latest.phase is RevisionPhase.FAILED:
        return DeploymentPhase.FAILED
    if latest.phase is RevisionPhase.QUANTIZING:
        return DeploymentPhase.QUANTIZING
    if latest.phase is RevisionPhase.ROLLING_OUT:
        paused = takeover_of(deployment, latest, history.current, children).paused(place_of(latest))
        return DeploymentPhase.PAUSED if paused else DeploymentPhase.ROLLING_OUT
    if summary.reason == Reason.WAKING:
        return DeploymentPhase.WAKING
    return DeploymentPhase.READY if answering >= desired or summary.status == TRUE else DeploymentPhase.DEGRADED
