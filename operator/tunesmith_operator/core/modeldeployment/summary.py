"""Whether a deployment answers, and if not, why: a chain of named rules, the first that applies is reported.

`status` asks for it. Every rule has a row in tests/unit/core/test_core_summary_modeldeployment.py that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith_api.keys import DeploymentCondition, Reason
from tunesmith_api.v1alpha1 import ConditionStatus
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_operator.core.modeldeployment.observed import Children, revision_label
from tunesmith_operator.core.modeldeployment.revisions import History
from tunesmith_operator.core.modeldeployment.scaling import Scaling
from tunesmith_operator.core.pods.crashes import crash_message
from tunesmith_operator.core.pods.startup import StartupProblem
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.rules import first_answer
from tunesmith_operator.core.status.conditions import FALSE, TRUE, UNKNOWN, Finding

__all__ = ["RULES", "Situation", "ready", "why_not_ready"]


@dataclass(frozen=True, slots=True)
class Situation:
    """What the rules look at. Replicas are those of the current revision, or of the latest where none has answered."""

    history: History
    latest: Revision
    answering: int
    desired: int
    problem: StartupProblem | None
    children: Children
    scaling: Scaling

    @property
    def crashed(self) -> PodView | None:
        """A server pod of the latest revision that crashed."""
        return _crashed(self.children.server_pods(revision_label(self.latest.number)))

    @property
    def failed_latest(self) -> str:
        """Says that the latest revision failed, as the end of a message about the current one."""
        failed = self.latest.phase is RevisionPhase.FAILED
        return f" {self.latest.name} failed: {self.latest.message}" if failed else ""


def first_revision_failed(it: Situation) -> Finding | None:
    """Nothing answers, and without a change nothing will."""
    if it.history.current is not None or it.latest.phase is not RevisionPhase.FAILED:
        return None
    return _ready(FALSE, Reason(it.latest.reason), it.latest.message)


def first_revision_cannot_start(it: Situation) -> Finding | None:
    """A pod that can't start, be it the quantizer's or a server's, says why."""
    if it.history.current is not None or it.problem is None:
        return None
    return _ready(FALSE, it.problem.reason, it.problem.message)


def first_revision_quantizing(it: Situation) -> Finding | None:
    """The servers have nothing to load yet."""
    if it.history.current is not None or it.latest.phase is not RevisionPhase.QUANTIZING:
        return None
    return _ready(FALSE, Reason.QUANTIZING, f"The artefact of {it.latest.name} is being made.")


def first_revision_crashed(it: Situation) -> Finding | None:
    """A server that ends again and again would else look like one that is still loading."""
    crashed = it.crashed if it.history.current is None else None
    if crashed is None:
        return None
    report = crashed.report
    return _ready(FALSE, report.reason if report is not None else Reason.SERVER_FAILED, crash_message(crashed))


def first_revision_starting(it: Situation) -> Finding | None:
    """The servers load the model."""
    if it.history.current is not None:
        return None
    return _ready(FALSE, Reason.ROLLING_OUT, f"{it.latest.name} is starting.")


def scaled_to_zero(it: Situation) -> Finding | None:
    """Nobody answers, as was asked for: that is ready, too."""
    if it.desired != 0:
        return None
    if it.scaling.status is not None:
        message = f"Scaled to zero. {it.scaling.status.message} The next request wakes it.{it.failed_latest}"
        return _ready(TRUE, Reason.SCALED_TO_ZERO, message)
    return _ready(TRUE, Reason.SCALED_TO_ZERO, f"Scaled to zero, as spec.replicas says.{it.failed_latest}")


def all_replicas_answer(it: Situation) -> Finding | None:
    """What is asked for answers, whatever becomes of a newer revision."""
    current = it.history.current
    if current is None or it.answering < it.desired:
        return None
    message = f"All {it.desired} replicas of {current.name} answer.{it.failed_latest}"
    return _ready(TRUE, Reason.REPLICAS_AVAILABLE, message)


def waking(it: Situation) -> Finding | None:
    """Nobody answers yet, and nobody is refused: requests wait for a server, of which nothing bad is known."""
    current = it.history.current
    if current is None or not it.scaling.asleep or it.answering:
        return None
    if why_not_ready(current, it.problem, it.children):
        return None
    return _ready(UNKNOWN, Reason.WAKING, f"{current.name} is starting; requests wait for it.{it.failed_latest}")


def scaling_up(it: Situation) -> Finding | None:
    """More pods are starting than answered before, which is no fault."""
    current, status = it.history.current, it.scaling.status
    if current is None or status is None or not it.answering or not it.scaling.raised:
        return None
    if why_not_ready(current, it.problem, it.children):
        return None
    message = f"{it.answering} of {it.desired} replicas of {current.name} answer. {status.message}{it.failed_latest}"
    return _ready(TRUE, Reason.SCALING_UP, message)


def some_replicas_missing(it: Situation) -> Finding | None:
    """Some or all replicas don't answer, and the message says why where that is known."""
    current = it.history.current
    if current is None:
        return None
    cause = why_not_ready(current, it.problem, it.children)
    message = f"{it.answering} of {it.desired} replicas of {current.name} answer.{cause}{it.failed_latest}"
    return _ready(UNKNOWN if it.answering else FALSE, Reason.REPLICAS_UNAVAILABLE, message)


RULES: tuple[Callable[[Situation], Finding | None], ...] = (
    first_revision_failed,
    first_revision_cannot_start,
    first_revision_quantizing,
    first_revision_crashed,
    first_revision_starting,
    scaled_to_zero,
    all_replicas_answer,
    waking,
    scaling_up,
    some_replicas_missing,
)


def ready(situation: Situation) -> Finding:
    """What the first rule says that applies; the last of them always does."""
    found = first_answer(RULES, situation)
    assert found is not None
    return found


def _ready(status: ConditionStatus, reason: Reason, message: str) -> Finding:
    return Finding(DeploymentCondition.READY, status, reason, message)


def why_not_ready(revision: Revision, problem: StartupProblem | None, children: Children) -> str:
    """What keeps the revision's replicas from answering, as the end of a message; empty where nothing is known."""
    if problem is not None:
        return f" {problem.message}"
    crashed = _crashed(children.server_pods(revision_label(revision.number)))
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
