"""History and children → status: the only place that says what a ModelDeployment's status is."""

from __future__ import annotations

from datetime import datetime

from tunesmith_api.keys import DeploymentCondition, Reason
from tunesmith_api.v1alpha1 import ModelDeployment, ModelDeploymentStatus
from tunesmith_api.v1alpha1.modeldeployment import DeploymentDisplay, DeploymentPhase, Revision, RevisionPhase
from tunesmith_operator.core.conditions import FALSE, TRUE, UNKNOWN, Finding, merge
from tunesmith_operator.core.crashes import crash_message
from tunesmith_operator.core.modeldeployment.children import selector
from tunesmith_operator.core.modeldeployment.observed import Family, revision_label
from tunesmith_operator.core.modeldeployment.revisions import History, failed_in_rollout, trim
from tunesmith_operator.core.source import SourceAbsent
from tunesmith_operator.core.troubles import Trouble
from tunesmith_operator.core.views import PodView

__all__ = ["refused_status", "serving_status", "waiting_status"]


def _accepted() -> Finding:
    return Finding(DeploymentCondition.ACCEPTED, TRUE, Reason.VALID, "The spec is valid.")


def refused_status(deployment: ModelDeployment, message: str, now: datetime) -> ModelDeploymentStatus:
    """The spec breaks a policy: nothing is changed by it."""
    before = deployment.status
    findings = [Finding(DeploymentCondition.ACCEPTED, FALSE, Reason.INVALID_SPEC, message)]
    if not before.current_revision:
        findings.append(Finding(DeploymentCondition.READY, FALSE, Reason.INVALID_SPEC, message))
    conditions = merge(before.conditions, findings, now, deployment.metadata.generation)
    phase = before.phase if before.current_revision else DeploymentPhase.FAILED
    return before.model_copy(update={"phase": phase, "conditions": conditions})


def waiting_status(deployment: ModelDeployment, reason: Reason, message: str, now: datetime) -> ModelDeploymentStatus:
    """There is nothing to serve yet."""
    before = deployment.status
    findings = (
        _accepted(),
        Finding(DeploymentCondition.ARTIFACT_READY, FALSE, reason, message),
        Finding(DeploymentCondition.READY, FALSE, reason, message),
    )
    desired = deployment.spec.replicas
    return before.model_copy(
        update={
            "phase": DeploymentPhase.PENDING,
            "conditions": merge(before.conditions, findings, now, deployment.metadata.generation),
            "display": DeploymentDisplay(ready=f"0/{desired}", quantization=""),
        }
    )


def serving_status(
    deployment: ModelDeployment,
    past: History,
    kin: Family,
    trouble: Trouble | None,
    absent: SourceAbsent | None,
    now: datetime,
) -> ModelDeploymentStatus:
    """There is at least one revision."""
    before, latest = deployment.status, past.latest
    assert latest is not None
    serving = past.current or latest
    child = kin.deployments.get(revision_label(serving.number))
    desired = deployment.spec.replicas
    answering = min(child.available, desired) if child is not None and past.current is not None else 0
    meta = deployment.metadata
    findings = (
        _accepted(),
        _artifact(latest, trouble, absent),
        Finding(DeploymentCondition.CHILDREN_APPLIED, TRUE, Reason.APPLIED, "All child objects are as they should be."),
        _progressing(past, latest, trouble, kin),
        _available(past, answering, desired, kin),
        _ready(past, latest, answering, desired, trouble, kin),
    )
    return before.model_copy(
        update={
            "observed_generation": meta.generation,
            "phase": _phase(past, latest, answering, desired),
            "conditions": merge(before.conditions, findings, now, meta.generation),
            "current_revision": past.current.name if past.current is not None else "",
            "latest_revision": latest.name,
            "revisions": list(trim(past, deployment.spec.revision_history_limit)),
            "replicas": child.replicas if child is not None else 0,
            "ready_replicas": child.ready if child is not None else 0,
            "selector": ",".join(f"{key}={value}" for key, value in selector(deployment, serving.number).items()),
            "url": f"http://{meta.name}.{meta.namespace}.svc/v1",
            "display": DeploymentDisplay(
                ready=f"{answering}/{desired}",
                quantization=past.current.quantization.value if past.current is not None else "",
            ),
        }
    )


def _artifact(latest: Revision, trouble: Trouble | None, absent: SourceAbsent | None) -> Finding:
    type_ = DeploymentCondition.ARTIFACT_READY
    if latest.phase is RevisionPhase.QUANTIZING:
        if absent is not None:
            return Finding(type_, FALSE, absent.reason, absent.message)
        if trouble is not None:
            return Finding(type_, FALSE, trouble.reason, trouble.message)
        return Finding(type_, FALSE, Reason.QUANTIZING, f"The artefact of {latest.name} is being made.")
    if latest.phase is RevisionPhase.FAILED and not failed_in_rollout(latest):
        return Finding(type_, FALSE, Reason(latest.reason), latest.message)
    return Finding(type_, TRUE, Reason.QUANTIZED, f"The artefact of {latest.name} is in {latest.artifact_uri}.")


def _progressing(past: History, latest: Revision, trouble: Trouble | None, kin: Family) -> Finding:
    type_ = DeploymentCondition.PROGRESSING
    if latest.phase is RevisionPhase.FAILED:
        return Finding(type_, FALSE, Reason(latest.reason), f"{latest.name}: {latest.message}")
    if latest.phase is RevisionPhase.ACTIVE:
        return Finding(type_, FALSE, Reason.ROLLED_OUT, f"{latest.name} is rolled out.")
    kept = f" {past.current.name} goes on answering meanwhile." if past.current is not None else ""
    if latest.phase is RevisionPhase.QUANTIZING:
        return Finding(type_, TRUE, Reason.QUANTIZING, f"{latest.name} is being quantized.{kept}")
    cause = _why_not_ready(latest, trouble, kin)
    return Finding(type_, TRUE, Reason.ROLLING_OUT, f"{latest.name} is starting.{cause}{kept}")


def _why_not_ready(revision: Revision, trouble: Trouble | None, kin: Family) -> str:
    if trouble is not None:
        return f" {trouble.message}"
    crashed = _crashed(kin.server_pods(revision_label(revision.number)))
    return f" {crash_message(crashed)}." if crashed is not None else ""


def _crashed(pods: tuple[PodView, ...]) -> PodView | None:
    return next(
        (
            pod
            for pod in pods
            if not pod.ready and pod.container is not None and pod.container.exit_code not in (None, 0)
        ),
        None,
    )


def _available(past: History, answering: int, desired: int, kin: Family) -> Finding:
    type_ = DeploymentCondition.AVAILABLE
    if past.current is None:
        return Finding(type_, FALSE, Reason.REPLICAS_UNAVAILABLE, "No revision has answered yet.")
    if desired == 0:
        message = "Scaled to zero, as spec.replicas says: nobody answers until it is raised."
        return Finding(type_, FALSE, Reason.SCALED_TO_ZERO, message)
    if answering == 0:
        cause = _why_not_ready(past.current, None, kin)
        return Finding(type_, FALSE, Reason.REPLICAS_UNAVAILABLE, f"No replica answers.{cause}")
    return Finding(type_, TRUE, Reason.REPLICAS_AVAILABLE, f"{past.current.name} answers.")


def _ready(
    past: History, latest: Revision, answering: int, desired: int, trouble: Trouble | None, kin: Family
) -> Finding:
    type_ = DeploymentCondition.READY
    if past.current is None:
        if latest.phase is RevisionPhase.FAILED:
            return Finding(type_, FALSE, Reason(latest.reason), latest.message)
        if trouble is not None:
            return Finding(type_, FALSE, trouble.reason, trouble.message)
        if latest.phase is RevisionPhase.QUANTIZING:
            return Finding(type_, FALSE, Reason.QUANTIZING, f"The artefact of {latest.name} is being made.")
        crashed = _crashed(kin.server_pods(revision_label(latest.number)))
        if crashed is not None:
            report = crashed.report
            reason = report.reason if report is not None else Reason.SERVER_FAILED
            return Finding(type_, FALSE, reason, crash_message(crashed))
        return Finding(type_, FALSE, Reason.ROLLING_OUT, f"{latest.name} is starting.")
    tail = f" {latest.name} failed: {latest.message}" if latest.phase is RevisionPhase.FAILED else ""
    if desired == 0:
        return Finding(type_, TRUE, Reason.SCALED_TO_ZERO, f"Scaled to zero, as spec.replicas says.{tail}")
    if answering >= desired:
        message = f"All {desired} replicas of {past.current.name} answer.{tail}"
        return Finding(type_, TRUE, Reason.REPLICAS_AVAILABLE, message)
    cause = _why_not_ready(past.current, trouble, kin)
    message = f"{answering} of {desired} replicas of {past.current.name} answer.{cause}{tail}"
    return Finding(type_, UNKNOWN if answering else FALSE, Reason.REPLICAS_UNAVAILABLE, message)


def _phase(past: History, latest: Revision, answering: int, desired: int) -> DeploymentPhase:
    if latest.phase is RevisionPhase.FAILED:
        return DeploymentPhase.DEGRADED if past.current is not None else DeploymentPhase.FAILED
    if latest.phase is RevisionPhase.QUANTIZING:
        return DeploymentPhase.QUANTIZING
    if latest.phase is RevisionPhase.ROLLING_OUT:
        return DeploymentPhase.ROLLING_OUT
    return DeploymentPhase.READY if answering >= desired else DeploymentPhase.DEGRADED
