"""One FineTuneJob, observed → what to do about it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from tunesmith_api.keys import PORT_PROGRESS, RAY_TOKEN_KEY, JobCondition, Reason
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobStatus
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.finetunejob.children import (
    ANNOTATION_FIXED_HASH,
    ANNOTATION_RESTARTS_BEFORE,
    ChildManifests,
    build,
    secret_uses,
)
from tunesmith_operator.core.finetunejob.observed import (
    Children,
    Observed,
    attempt_number,
    children_of,
    was_suspended,
)
from tunesmith_operator.core.finetunejob.outcome import first_failure, verdict
from tunesmith_operator.core.finetunejob.policies import violation
from tunesmith_operator.core.finetunejob.quota import is_queued, quota_startup, waits_in_queue
from tunesmith_operator.core.finetunejob.status import (
    ended_status,
    has_ended,
    refused_status,
    running_status,
    seen_after_end,
    startup_verdict,
    waiting_status,
)
from tunesmith_operator.core.finetunejob.usage import budget_end, budget_verdict, counted, is_last_look, over_budget
from tunesmith_operator.core.kubernetes.objects import ChildView
from tunesmith_operator.core.kubernetes.resources import CONFIG_MAP, FINETUNEJOB, JOB, Resource
from tunesmith_operator.core.pods.crashes import ended_at
from tunesmith_operator.core.pods.startup import Patience, Startup, examine, missing_secrets
from tunesmith_operator.core.reconcile.children import (
    ORPHANS_SECONDS,
    Keeper,
    orphans_message,
    seconds_until,
    soonest,
)
from tunesmith_operator.core.reconcile.decision import Action, Create, Decision, Delete, conclude
from tunesmith_operator.core.reconcile.progress import PollTarget, QuotaTarget, Target
from tunesmith_operator.core.reconcile.settled import state_of, unless_settled
from tunesmith_operator.core.text import count_of, parse_time

__all__ = ["decide"]

EDIT_SECONDS: Final = 60.0
"""How old a Job may be that is replaced, as its spec was edited before its start was in the status."""
VERDICT_SECONDS: Final = 10.0
"""How long the Job controller may take to judge a pod's end before the status says anything else."""


def decide(observed: Observed, now: datetime, config: Config) -> Decision:
    """Deterministic: the same observation gives the same decision, and one that has been carried out gives no more."""
    job = observed.job
    if job.metadata.deletion_timestamp is not None:
        return Decision()
    children = children_of(observed)
    if has_ended(job.status):
        return _after_the_end(job, children, now)
    if over_budget(job, children, now):
        # the workers are stopped as by a suspension: with a checkpoint
        job = job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": True})})
    decision = _under_way(job, children, now, config)
    if decision.status is None:
        return decision
    status = counted(decision.status, job, children, now)
    return replace(decision, status=status, fleeting=is_last_look(job, children, now))


def _under_way(job: FineTuneJob, children: Children, now: datetime, config: Config) -> Decision:
    """What hasn't ended: to be started, to be followed, or held."""
    if children.job is not None:
        return _follow(job, children, children.job.deleting, now, config)
    if (broken := violation(job)) is not None:
        return _report(job, refused_status(job.metadata, job.status, broken, now))
    if job.spec.suspend:
        return _without_job(job, children, now, config)
    if children.orphans:
        # those of an own Job that was deleted, where there has been one
        lost = job.status.attempts and not was_suspended(job.status)
        reason = Reason.JOB_DELETED if lost else Reason.PENDING
        status = waiting_status(job, reason, orphans_message("job", children.orphans), now)
        return replace(_report(job, status), requeue_after=ORPHANS_SECONDS)
    return _start(job, children, now, config)


def _report(job: FineTuneJob, status: FineTuneJobStatus, actions: list[Action] | None = None) -> Decision:
    return conclude(job, JobCondition.SUCCEEDED, status, actions or ())


def _after_the_end(job: FineTuneJob, children: Children, now: datetime) -> Decision:
    """Nothing is written any more, but for a Job that was given up and still has to be stopped, edits, and the TTL."""
    child, meta = children.job, job.metadata
    seen = Decision(status=seen_after_end(job.status, meta.generation))
    if child is not None and not child.ending and not child.deleting:
        return replace(seen, actions=(Delete(JOB, child.namespace, child.name, child.uid),))
    own = _left(job, job.spec.ttl_seconds_after_finished, now)
    if own is not None and own <= 0:
        return Decision(actions=(Delete(FINETUNEJOB, meta.namespace, meta.name, meta.uid),))
    theirs = _left(job, job.spec.children_ttl_seconds_after_finished, now)
    if theirs is None or theirs > 0:
        return replace(seen, requeue_after=soonest(own, theirs))
    # what else there is may not be deleted by the operator, and costs nothing
    found: tuple[tuple[Resource, ChildView | None], ...] = ((JOB, child), (CONFIG_MAP, children.config_map))
    gone = [Delete(kind, it.namespace, it.name, it.uid) for kind, it in found if it is not None and not it.deleting]
    return replace(seen, actions=tuple(gone), requeue_after=own)


def _left(job: FineTuneJob, ttl: int | None, now: datetime) -> float | None:
    """Seconds until so long after the end; None where there is no such time."""
    completed = parse_time(job.status.completion_time)
    if completed is None or ttl is None:
        return None
    return (completed + timedelta(seconds=ttl) - now).total_seconds()


def _without_job(job: FineTuneJob, children: Children, now: datetime, config: Config) -> Decision:
    """Suspended, and no Job is there: before the start, or since it was deleted to leave its queue."""
    if not job.status.attempts:
        message = "Suspended before the start: set spec.suspend to false to begin."
        return _report(job, waiting_status(job, Reason.SUSPENDED, message, now))
    restarts = job.status.restarts
    if over_budget(job, children, now) and children.stopped:
        return _report(job, ended_status(job, children, budget_verdict(job, children, now), restarts, now))
    return _report(job, running_status(job, children, None, restarts, now, config))


def _start(job: FineTuneJob, children: Children, now: datetime, config: Config) -> Decision:
    """Write everything, the Job last: its pods then find what they refer to.

    A Job that was deleted is created again and resumes from its checkpoint, which counts as a restart, but for one that
    the operator deleted for a suspension.
    """
    lost = job.status.attempts and not was_suspended(job.status)
    restarts = job.status.restarts + (1 if lost else 0)
    manifests = build(job, config, attempt_number(job), restarts)
    actions = [
        *_supporting(manifests, children, Keeper(children.answers)),
        Create(manifests.secret, RAY_TOKEN_KEY),
        Create(manifests.job),
    ]
    return replace(_report(job, running_status(job, children, None, restarts, now, config), actions), starts=True)


def _supporting(manifests: ChildManifests, children: Children, keeper: Keeper) -> Iterator[Action]:
    yield from keeper.keep(manifests.service, children.service)
    yield from keeper.keep(manifests.network_policy, children.network_policy)
    plan = children.config_map
    if children.job is None or plan is None or plan.spec_hash == manifests.config_map.hash:
        # once the Job exists its plan stays as it was written, whatever a newer operator would write
        yield from keeper.keep(manifests.config_map, plan)


def _upkeep(job: FineTuneJob, children: Children, restarts: int, config: Config) -> Iterator[Action]:
    """Repair what is around a Job that is under way, and what Kubernetes lets change of the Job itself."""
    child = children.job
    assert child is not None
    manifests = build(job, config, attempt_number(job), restarts)
    keeper = Keeper(children.answers, settled=job.status.observed_generation == job.metadata.generation)
    yield from _supporting(manifests, children, keeper)
    if manifests.secret.name in missing_secrets(children.pods):
        # a pod that runs has the old token and would refuse those that start with another
        runs = any(pod.started for pod in children.active_pods)
        again = Delete(JOB, child.namespace, child.name, child.uid) if runs else None
        yield Create(manifests.secret, RAY_TOKEN_KEY, where_new=again)
    if not child.ending:
        yield from keeper.keep(manifests.job, child)


def _follow(job: FineTuneJob, children: Children, deleting: bool, now: datetime, config: Config) -> Decision:
    """The Job exists: report on it, repair what is around it, stop it when its pods can't start."""
    child = children.job
    assert child is not None
    restarts = count_of(child.annotations.get(ANNOTATION_RESTARTS_BEFORE))
    if (ended := verdict(children, job.spec)) is not None:
        return _report(job, ended_status(job, children, ended, restarts, now))
    if over_budget(job, children, now) and child.suspended and children.stopped:
        return _report(job, ended_status(job, children, budget_verdict(job, children, now), restarts, now))
    if _verdict_is_near(children, now):
        return Decision(requeue_after=VERDICT_SECONDS)
    if not deleting and _is_outdated(job, children, restarts, now, config):
        return Decision(actions=(Delete(JOB, child.namespace, child.name, child.uid),))
    if job.spec.suspend and is_queued(job, child) and not child.ending:
        # a Job that is suspended by hand, Kueue starts again; deleted, it gives its quota back
        leave: list[Action] = [] if deleting else [Delete(JOB, child.namespace, child.name, child.uid)]
        return _report(job, running_status(job, children, None, restarts, now, config), leave)
    startup = Startup()
    if waits_in_queue(job, children):
        startup = quota_startup(job, children, now)
    elif not child.suspended and not deleting and not child.ending:
        startup = _startup(job, children, now)
    if startup.expired is not None:
        ended = startup_verdict(startup.expired, job.spec)
        return _report(job, ended_status(job, children, ended, restarts, now))
    actions: list[Action] = []
    if not deleting:
        case = (_case(job, children), restarts, config)
        actions = unless_settled(case, lambda: _upkeep(job, children, restarts, config))
    decision = _report(job, running_status(job, children, startup.problem, restarts, now, config), actions)
    look = soonest(_next_look(children, startup, now, config), seconds_until(budget_end(job, children, now), now))
    return replace(decision, requeue_after=look, poll=_poll_target(job, children))


def _case(job: FineTuneJob, children: Children) -> Hashable:
    """All that `_upkeep` looks at."""
    child, meta = children.job, job.metadata
    around = (state_of(it) for it in (children.service, children.network_policy, children.config_map, child))
    held = (child.ending, child.queue) if child is not None else ()
    identity = (meta.namespace, meta.name, meta.uid, attempt_number(job), job.spec.model_dump_json())
    answers = tuple(children.answers.items())
    return (*identity, *meta.labels.items(), *around, held, missing_secrets(children.pods), answers)


def _is_outdated(job: FineTuneJob, children: Children, restarts: int, now: datetime, config: Config) -> bool:
    """Whether the spec was edited in the seconds between the Job's creation and the first status.

    The API server keeps the fields of a started job from `startTime` on, and that is in the status.
    """
    child, plan = children.job, children.config_map
    assert child is not None
    if job.status.start_time is not None or child.ending or child.created is None:
        return False
    if (now - child.created).total_seconds() > EDIT_SECONDS:
        return False
    manifests = build(job, config, attempt_number(job), restarts)
    if plan is not None and plan.spec_hash != manifests.config_map.hash:
        return True
    made_as = child.annotations.get(ANNOTATION_FIXED_HASH)
    return made_as is not None and made_as != manifests.job.body["metadata"]["annotations"][ANNOTATION_FIXED_HASH]


def _startup(job: FineTuneJob, children: Children, now: datetime) -> Startup:
    start, room = job.spec.failure_policy.startup_timeout_seconds, job.spec.pre_running_deadline_seconds
    patience = Patience(timedelta(seconds=start), timedelta(seconds=room) if room is not None else None)
    lacks_pods = len({pod.index for pod in children.active_pods}) < job.spec.workers.replicas
    rejections = children.rejections if lacks_pods else ()
    return examine(children.pods, rejections, patience, now, secret_uses(job))


def _verdict_is_near(children: Children, now: datetime) -> bool:
    """A pod has just ended in the way that ends the Job: the Job controller says so in a moment, the status waits."""
    decisive = [pod for pod in children.pods if pod.index == 0 and pod.succeeded]
    failed = first_failure(children.pods)
    decisive += [failed] if failed is not None else []
    return any(0.0 <= now.timestamp() - ended_at(pod) < VERDICT_SECONDS for pod in decisive)


def _poll_target(job: FineTuneJob, children: Children) -> Target | None:
    child, head = children.job, children.head
    if child is not None and waits_in_queue(job, children):
        return QuotaTarget(child.namespace, child.uid)
    if head is None or not head.ip or head.container is None or not head.container.running:
        return None
    return PollTarget(head.uid, head.ip, PORT_PROGRESS)


def _next_look(children: Children, startup: Startup, now: datetime, config: Config) -> float | None:
    sample = children.progress
    stale = sample.alive_at + timedelta(seconds=config.heartbeat_stale_seconds + 1) if sample is not None else None
    return soonest(seconds_until(startup.deadline, now), seconds_until(stale, now))
