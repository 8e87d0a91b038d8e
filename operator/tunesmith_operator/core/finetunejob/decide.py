"""One FineTuneJob, observed → what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta

from tunesmith_api.keys import PORT_PROGRESS, JobCondition, Reason
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobStatus
from tunesmith_operator.core.conditions import UNKNOWN, find
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.crashes import ended_at
from tunesmith_operator.core.decision import Action, Apply, Create, Decision, Delete, Patch, PollTarget
from tunesmith_operator.core.finetunejob.children import ANNOTATION_RESTARTS_BEFORE, Children, build, secret_uses
from tunesmith_operator.core.finetunejob.observed import Family, Observed, attempt_number, family
from tunesmith_operator.core.finetunejob.outcome import culprit
from tunesmith_operator.core.finetunejob.outcome import verdict as verdict_of
from tunesmith_operator.core.finetunejob.policies import violation
from tunesmith_operator.core.finetunejob.status import (
    ended_status,
    refused_status,
    running_status,
    stopped,
    waiting_status,
)
from tunesmith_operator.core.manifest import Manifest
from tunesmith_operator.core.resources import FINETUNEJOB, JOB
from tunesmith_operator.core.text import parse_time
from tunesmith_operator.core.transitions import transitions
from tunesmith_operator.core.troubles import Startup, examine
from tunesmith_operator.core.views import ChildView

__all__ = ["decide"]

VERDICT_SECONDS = 10.0
_QUIET = frozenset({Reason.PENDING, Reason.STARTING})


def decide(observed: Observed, now: datetime, config: Config) -> Decision:
    """Deterministic: the same observation gives the same decision, and one that has been carried out gives no more."""
    job = observed.job
    if job.metadata.deletion_timestamp is not None:
        return Decision()
    kin = family(observed)
    if ended(job.status):
        return _after_the_end(job, kin, now)
    if kin.job is None:
        if (problem := violation(job)) is not None:
            return _settle(job, (), refused_status(job, problem, now))
        if job.spec.suspend:
            message = "Suspended before the start: set spec.suspend to false to begin."
            return _settle(job, (), waiting_status(job, Reason.SUSPENDED, message, now))
        if kin.leftovers:
            return _wait_for(job, kin.leftovers, now)
        return _start(job, kin, now, config)
    return _follow(job, kin, kin.job.deleting, now, config)


def ended(status: FineTuneJobStatus) -> bool:
    """Whether the job is over for good."""
    condition = find(status.conditions, JobCondition.SUCCEEDED)
    return condition is not None and condition.status != UNKNOWN


def _after_the_end(job: FineTuneJob, kin: Family, now: datetime) -> Decision:
    """Nothing is written any more, but for a Job that was given up and still has to be stopped, and the TTL."""
    if kin.job is not None and not kin.job.ending and not kin.job.deleting:
        return Decision(actions=(Delete(JOB, kin.job.namespace, kin.job.name, kin.job.uid),))
    ttl, completed = job.spec.ttl_seconds_after_finished, parse_time(job.status.completion_time)
    if ttl is None or completed is None:
        return Decision()
    left = (completed + timedelta(seconds=ttl) - now).total_seconds()
    if left > 0:
        return Decision(requeue_after=left)
    meta = job.metadata
    return Decision(actions=(Delete(FINETUNEJOB, meta.namespace, meta.name, meta.uid),))


def _wait_for(job: FineTuneJob, leftovers: tuple[ChildView, ...], now: datetime) -> Decision:
    names = ", ".join(sorted({child.name for child in leftovers})[:3])
    message = f"Waiting until what an earlier job left behind is gone: {names}."
    return replace(_settle(job, (), waiting_status(job, Reason.PENDING, message, now)), requeue_after=5.0)


def _start(job: FineTuneJob, kin: Family, now: datetime, config: Config) -> Decision:
    """Write everything, the Job last: its pods then find what they refer to.

    A Job that was deleted is made again and resumes from its checkpoint, which counts as a restart.
    """
    again = bool(job.status.attempts)
    restarts = job.status.restarts + 1 if again else 0
    children = build(job, config, attempt_number(job), restarts)
    actions = [
        *_supporting(children, kin, job_exists=False),
        Create(children.secret, "token"),
        Apply(children.job),
    ]
    status = running_status(job, kin, None, restarts, now, config)
    return replace(_settle(job, actions, status), starts=True)


def _supporting(children: Children, kin: Family, job_exists: bool) -> Iterable[Action]:
    pairs: list[tuple[Manifest, ChildView | None]] = [
        (children.service, kin.service),
        (children.network_policy, kin.network_policy),
    ]
    if not job_exists or kin.config_map is None:
        # once the Job exists its plan stays as it is, whatever a newer operator would write
        pairs.append((children.config_map, kin.config_map))
    for manifest, child in pairs:
        if child is None or child.spec_hash != manifest.hash:
            yield Apply(manifest, ours=child is not None)


def _follow(job: FineTuneJob, kin: Family, deleting: bool, now: datetime, config: Config) -> Decision:
    """The Job exists: report on it, repair what is around it, stop it when its pods can't start."""
    assert kin.job is not None
    restarts = int(kin.job.annotations.get(ANNOTATION_RESTARTS_BEFORE, 0))
    decided = verdict_of(kin, job.spec)
    if decided is not None:
        return _settle(job, (), ended_status(job, kin, decided, restarts, now))
    if _verdict_is_near(kin, now):
        return Decision(requeue_after=VERDICT_SECONDS)
    patience = timedelta(seconds=job.spec.failure_policy.startup_timeout_seconds)
    startup = Startup()
    if not kin.job.suspended and not deleting and not kin.job.ending:
        rejections = kin.rejections if _short_of_pods(job, kin) else ()
        startup = examine(kin.pods, rejections, patience, now, secret_uses(job))
    if startup.expired is not None:
        given_up = stopped(startup.expired, patience.total_seconds())
        return _settle(job, (), ended_status(job, kin, given_up, restarts, now))
    actions: list[Action] = []
    if not deleting:
        actions += _supporting(build(job, config, attempt_number(job), restarts), kin, job_exists=True)
    if kin.job.suspended != job.spec.suspend and not kin.job.ending and not deleting:
        actions.append(Patch(JOB, kin.job.namespace, kin.job.name, {"spec": {"suspend": job.spec.suspend}}))
    decision = _settle(job, actions, running_status(job, kin, startup.trouble, restarts, now, config))
    return replace(decision, requeue_after=_next_look(kin, startup, now, config), poll=_poll_target(kin))


def _verdict_is_near(kin: Family, now: datetime) -> bool:
    """A pod has just ended in the way that ends the Job: the Job controller says so in a moment, so nothing is told."""
    decisive = [pod for pod in kin.pods if pod.index == 0 and pod.succeeded]
    guilty = culprit(kin.pods)
    decisive += [guilty] if guilty is not None else []
    return any(0.0 <= now.timestamp() - ended_at(pod) < VERDICT_SECONDS for pod in decisive)


def _short_of_pods(job: FineTuneJob, kin: Family) -> bool:
    return len({pod.index for pod in kin.living}) < job.spec.workers.replicas


def _poll_target(kin: Family) -> PollTarget | None:
    head = kin.head
    if head is None or not head.ip or head.container is None or not head.container.running:
        return None
    return PollTarget(head.uid, head.ip, PORT_PROGRESS)


def _next_look(kin: Family, startup: Startup, now: datetime, config: Config) -> float | None:
    moments = [startup.deadline] if startup.deadline is not None else []
    if kin.progress is not None:
        moments.append(kin.progress.alive_at + timedelta(seconds=config.heartbeat_stale_seconds + 1))
    waits = [(moment - now).total_seconds() for moment in moments]
    return min((max(1.0, wait) for wait in waits if wait > 0), default=None)


def _settle(job: FineTuneJob, actions: Iterable[Action], status: FineTuneJobStatus) -> Decision:
    events = transitions(JobCondition.SUCCEEDED, job.status.conditions, status.conditions, _QUIET)
    return Decision(actions=tuple(actions), status=status, events=events)
