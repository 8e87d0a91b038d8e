"""Who gets requests, and how many replicas that takes: `strategy`'s arithmetic, applied to what is observed.

`revisions` moves a revision on by it; `decide` points the Service and sizes the Deployments by `traffic_of`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_operator.core.kubernetes.workloads import DeploymentView
from tunesmith_operator.core.modeldeployment.analysis import Verdict, judge
from tunesmith_operator.core.modeldeployment.observed import Children, revision_label
from tunesmith_operator.core.modeldeployment.strategy import Place, Takeover
from tunesmith_operator.core.reconcile.progress import ServersTarget
from tunesmith_operator.core.text import parse_time, rfc3339

__all__ = ["Traffic", "place_of", "servers_target", "serving", "takeover_of", "traffic_of", "verdict_of", "with_place"]

MOST_ASKED = 64
"""Pods of one rollout that are asked for their metrics: more tell nothing new."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """`selected` is the number of the revision that the Service leads to; None: to both that there are.

    `replicas` has revision labels; a Deployment that isn't in it is left at what it has. `next_look` is when time alone
    changes any of it.
    """

    selected: int | None
    replicas: tuple[tuple[str, int], ...]
    next_look: datetime | None = field(default=None, compare=False)

    def wanted(self, label: str) -> int | None:
        """Replicas that the revision's Deployment is to have; None: as many as it has."""
        return dict(self.replicas).get(label)


def place_of(revision: Revision) -> Place:
    """As its status says."""
    return Place(revision.step_index or 0, revision.weight, parse_time(revision.step_time))


def with_place(revision: Revision, place: Place) -> Revision:
    """The revision at that place."""
    since = rfc3339(place.since) if place.since is not None else None
    return revision.model_copy(update={"step_index": place.step, "weight": place.weight, "step_time": since})


def takeover_of(
    deployment: ModelDeployment, revision: Revision, current: Revision | None, children: Children
) -> Takeover:
    """The revision's way from the current one, by what is observed of both."""
    spec, wanted = deployment.spec.rollout, deployment.spec.replicas
    servers = children.deployments.get(revision_label(revision.number))
    before = children.deployments.get(revision_label(current.number)) if current is not None else None
    return Takeover(
        strategy=spec.strategy,
        steps=spec.steps,
        replicas=wanted,
        alone=current is None or current.number == revision.number or wanted == 0,
        promoted=spec.promote == revision.name,
        after_switch=timedelta(seconds=spec.analysis.after_switch_seconds),
        deadline=timedelta(seconds=spec.progress_deadline_seconds),
        available=servers.available if servers is not None else 0,
        desired=servers.desired if servers is not None else 0,
        settled=servers is not None and servers.rolled_out,
        before_available=before.available if before is not None else 0,
    )


def verdict_of(
    deployment: ModelDeployment, revision: Revision, current: Revision | None, children: Children
) -> Verdict:
    """What the analysis says of a revision that gets requests; nothing of one that there is nothing to go back from."""
    if revision.weight == 0 or current is None or current.number == revision.number:
        return Verdict()
    restarts = sum(
        pod.container.restarts
        for pod in children.server_pods(revision_label(revision.number))
        if pod.container is not None
    )
    sample = children.servers
    known = sample is not None and sample.window == _window(revision)
    figures = sample.figures if sample is not None and known else None
    return judge(deployment.spec.rollout.analysis, figures, restarts)


def servers_target(
    deployment: ModelDeployment, revision: Revision, current: Revision | None, children: Children
) -> ServersTarget | None:
    """The pods whose metrics the analysis needs now; None where it needs none."""
    analysis = deployment.spec.rollout.analysis
    wanted = analysis.max_error_percent is not None or analysis.max_latency_p95_seconds is not None
    rolls = revision.phase is RevisionPhase.ROLLING_OUT and revision.weight > 0
    if not wanted or not rolls or current is None or current.number == revision.number:
        return None
    pods = children.server_pods(revision_label(revision.number))
    found = sorted((pod.uid, pod.ip) for pod in pods if pod.ip and not pod.finished and not pod.deleting)
    return ServersTarget(_window(revision), tuple(found[:MOST_ASKED]), keys.PORT_HEALTH)


def _window(revision: Revision) -> str:
    """Requests are judged step by step, so that many good ones don't hide what comes with more of them."""
    return f"{revision.name}/{revision.step_index}"


def traffic_of(
    deployment: ModelDeployment,
    latest: Revision,
    current: Revision | None,
    children: Children,
    now: datetime,
    retire_delay: timedelta,
) -> Traffic:
    """What belongs to the revisions as they stand now."""
    every = deployment.spec.replicas
    label = revision_label(latest.number)
    if current is None or current.number == latest.number:
        wanted = _stopped(latest, now, retire_delay) if latest.phase is RevisionPhase.FAILED else ((label, every),)
        return Traffic(latest.number, wanted, _stop_at(latest, now, retire_delay))
    before = revision_label(current.number)
    selected = _selected(latest, current)
    if latest.phase is RevisionPhase.FAILED:
        replicas = ((before, every), *_stopped(latest, now, retire_delay))
        return Traffic(selected, replicas, _stop_at(latest, now, retire_delay))
    if latest.phase is not RevisionPhase.ROLLING_OUT:
        return Traffic(selected, ((before, every),))
    way, place = takeover_of(deployment, latest, current, children), place_of(latest)
    counts = way.counts(place)
    looks = [it for it in (way.pause_end(place), way.overdue_at(place)) if it is not None and it > now]
    fewer = counts.before if _leads_there(children, label) else every
    return Traffic(selected, ((before, fewer), (label, counts.new)), min(looks) if looks else None)


def _selected(latest: Revision, current: Revision) -> int | None:
    if latest.weight == 0:
        return current.number
    return latest.number if latest.weight == 100 else None


def _leads_there(children: Children, label: str) -> bool:
    """Whether requests reach the new revision: only then the old one can do with fewer replicas."""
    return bool(children.led_to) and children.led_to.get(keys.LABEL_REVISION, label) == label


def _stopped(revision: Revision, now: datetime, delay: timedelta) -> tuple[tuple[str, int], ...]:
    """A failed revision costs nothing, once no node sends requests there any longer."""
    if revision.weight > 0 or _stop_at(revision, now, delay) is not None:
        return ()
    return ((revision_label(revision.number), 0),)


def _stop_at(revision: Revision, now: datetime, delay: timedelta) -> datetime | None:
    since = parse_time(revision.step_time)
    if revision.phase is not RevisionPhase.FAILED or revision.weight > 0 or since is None or since + delay <= now:
        return None
    return since + delay


def serving(latest: Revision, current: Revision | None, children: Children) -> tuple[DeploymentView, ...]:
    """The Deployments whose pods the Service leads to."""
    if current is None:
        found = [children.deployments.get(revision_label(latest.number))]
    else:
        both = {it.number: it for it in (latest, current)}.values()
        found = [children.deployments.get(revision_label(it.number)) for it in both if it.weight > 0]
    return tuple(it for it in found if it is not None)
