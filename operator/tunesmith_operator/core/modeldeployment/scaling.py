"""What autoscaling makes of one deployment: its replicas now, whether its Service leads to the activator, whom to ask.

`autoscaling` has the arithmetic; this is what is observed, brought together for it, and what follows from its answer.

Requests are never without a way. The Service leads to the activator before the last servers go, by as long as nodes
take to hear of it, and back to servers only when one answers; both answer in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.autoscaling import Autoscaling, AutoscalingStatus
from tunesmith_api.v1alpha1.deploymentstatus import RevisionPhase
from tunesmith_operator.core.modeldeployment.activator import Activation
from tunesmith_operator.core.modeldeployment.autoscaling import Scale, Scaler
from tunesmith_operator.core.modeldeployment.observed import Children, revision_label
from tunesmith_operator.core.modeldeployment.revisions import History
from tunesmith_operator.core.modeldeployment.template import stored_template
from tunesmith_operator.core.modeldeployment.traffic import MOST_ASKED, serving
from tunesmith_operator.core.pods.view import PodView
from tunesmith_operator.core.reconcile.progress import LoadTarget, ServersTarget
from tunesmith_operator.core.text import parse_time, rfc3339

__all__ = ["Scaling", "poll_target", "scaling_of"]

WAKE_SECONDS: Final = 1.0
"""How often activators are asked while no server answers: a request that waits is noticed within two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """`deployment` is what it would be if `spec.replicas` said how many pods there are to be now.

    `asleep`: its Service is to lead to the activator. `raised`: pods were added that may still be starting.
    """

    deployment: ModelDeployment
    activation: Activation
    status: AutoscalingStatus | None = None
    asleep: bool = False
    raised: bool = False
    next_look: datetime | None = None

    @property
    def automatic(self) -> bool:
        """Whether the number of pods follows the requests."""
        return self.status is not None


def scaling_of(
    deployment: ModelDeployment, history: History, children: Children, now: datetime, delay: timedelta
) -> Scaling:
    """What is to be now. `delay` is how long nodes may take to hear whom a Service leads to."""
    spec = deployment.spec
    auto = spec.autoscaling if spec.replicas else None
    activation = _activation(deployment, auto, history, children)
    nobody = _answering(history, children) == 0
    if auto is None or history.latest is None:
        # requests that wait go on waiting, where there is to be a server
        asleep = children.asleep and nobody and spec.replicas > 0 and _stands_by(children)
        return Scaling(deployment=deployment, activation=activation, asleep=asleep)
    scaler = Scaler(
        spec=auto,
        target=auto.target_requests_in_flight or activation.parallel_requests,
        load=children.servers.load if children.servers is not None else None,
        taking_over=_taking_over(history, children),
        may_sleep=_stands_by(children) and history.current is not None,
    )
    scale = scaler.next(_asked_for(deployment, auto, history, children), now)
    count, switched = _replicas(scale, history, children, now, delay)
    patience = timedelta(seconds=spec.rollout.progress_deadline_seconds)
    until = scale.since + patience if scale.since is not None else now
    return Scaling(
        deployment=deployment.model_copy(update={"spec": spec.model_copy(update={"replicas": count})}),
        activation=activation,
        status=AutoscalingStatus(
            desired_replicas=scale.desired,
            previous_replicas=scale.previous,
            message=scale.message,
            last_scale_time=rfc3339(scale.since) if scale.since is not None else None,
        ),
        asleep=(auto.min_replicas == 0 or children.asleep)
        and (scale.desired == 0 or (nobody and _stands_by(children))),
        raised=scale.desired > scale.previous and now < until,
        next_look=min((it for it in (scale.next_look, switched, until) if it is not None and it > now), default=None),
    )


def _activation(
    deployment: ModelDeployment, auto: Autoscaling | None, history: History, children: Children
) -> Activation:
    """The activator asks for the keys, and holds the bodies, that the revision which answers does."""
    answers = history.current or history.latest
    wanted = auto if auto is not None and auto.min_replicas == 0 else None
    plan = children.config_maps.get(revision_label(answers.number)) if wanted is not None and answers else None
    made = stored_template(deployment, plan)
    if made is None:
        return Activation(wanted, deployment.spec.api, deployment.spec.engine.parallel_requests)
    return Activation(wanted, made.plan.api, made.plan.parallel_requests)


def _answering(history: History, children: Children) -> int:
    """Server pods that answer, of those that requests are to reach."""
    if history.latest is None:
        return 0
    return sum(it.available for it in serving(history.latest, history.current, children))


def _stands_by(children: Children) -> bool:
    found = children.activator.deployment
    return found is not None and not found.deleting and found.available > 0


def _taking_over(history: History, children: Children) -> bool:
    """Whether a revision has to prove itself, or its requests have yet to be taken back."""
    latest = history.latest
    if latest is None or latest.phase is RevisionPhase.ROLLING_OUT:
        return True
    job = children.jobs.get(revision_label(latest.number))
    made = latest.phase is RevisionPhase.QUANTIZING and job is not None and job.complete
    failed = latest.phase is RevisionPhase.FAILED and latest.weight > 0
    return made or failed or (history.current is None and latest.phase is not RevisionPhase.FAILED)


def _asked_for(deployment: ModelDeployment, auto: Autoscaling, history: History, children: Children) -> Scale:
    """What was asked for last; where nothing was, what there is."""
    known = deployment.status.autoscaling
    if known is not None:
        since = parse_time(known.last_scale_time)
        return Scale(known.desired_replicas, known.previous_replicas, known.message, since)
    current = children.deployments.get(revision_label(history.current.number)) if history.current is not None else None
    found = current.desired if current is not None else 0
    first = min(max(found, auto.min_replicas, 1), auto.max_replicas)
    return Scale(first, first, "As many as there were.", None)


def _replicas(
    scale: Scale, history: History, children: Children, now: datetime, delay: timedelta
) -> tuple[int, datetime | None]:
    """Pods that there are to be, and when there may be none: nodes have to hear first that requests go elsewhere."""
    current = children.deployments.get(revision_label(history.current.number)) if history.current is not None else None
    if scale.desired > 0 or current is None or current.desired == 0:
        return scale.desired, None
    heard = scale.since + delay if scale.since is not None else now
    return (0, None) if children.asleep and heard <= now else (current.desired, heard)


def poll_target(
    scaling: Scaling, rollout: ServersTarget | None, history: History, children: Children
) -> ServersTarget | None:
    """Whom to ask for metrics: what a rollout's analysis needs, and what autoscaling does."""
    if scaling.status is None or history.latest is None:
        return rollout
    revisions = {it.number for it in (history.current, history.latest) if it is not None}
    servers = [it for number in sorted(revisions) for it in children.server_pods(revision_label(number))]
    holding = _reachable(children.activator_pods)
    pods = [*holding, *_reachable(servers)]
    often = scaling.status.desired_replicas == 0 or _answering(history, children) == 0
    auto = scaling.deployment.spec.autoscaling
    assert auto is not None
    load = LoadTarget(
        tuple(pods[:MOST_ASKED]), len(pods), auto.scale_down_delay_seconds, WAKE_SECONDS if often else None
    )
    base = rollout or ServersTarget("", (), keys.PORT_HEALTH)
    return replace(base, load=load)


def _reachable(pods: list[PodView] | tuple[PodView, ...]) -> list[tuple[str, str]]:
    return sorted((it.uid, it.ip) for it in pods if it.ip and it.ready and not it.finished and not it.deleting)
