"""Why a pod doesn't start, read from its status: the cause and the remedy in words, and how long it may last."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_operator.core.kubernetes.objects import RejectionView
from tunesmith_operator.core.pods.view import ContainerView, PodView
from tunesmith_operator.core.text import duration

__all__ = ["STORAGE_SECRET", "Patience", "SecretUse", "Startup", "StartupProblem", "examine", "missing_secrets"]

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
          "RegistryUnavailable", "SignatureValidationFailed")  # fmt: skip
_CONFIG = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CreatePodSandboxError")
_SECRET = re.compile(r'secrets? "(?P<a>[^"]+)" not found|in Secret [^/\s]+/(?P<b>[^\s"]+)')
_BACK_OFF = re.compile(r'^Back-off pulling image "[^"]*"(: \w+: )?')
_CLAIM = re.compile(r'persistentvolumeclaims? "(?P<claim>[^"]+)" not found')
_KEY = re.compile(r"couldn't find key (?P<key>\S+) in Secret")
_POD_NAME = re.compile(r'pods "[^"]+"')
UNSPOKEN_OF = timedelta(seconds=30)
"""How long a pod may be without a word from a scheduler before the status says so. Members of a gang get none."""
_ORDER = (
    Reason.SECRET_NOT_FOUND,
    Reason.IMAGE_PULL_FAILED,
    Reason.CONTAINER_CONFIG_ERROR,
    Reason.POD_REJECTED,
    Reason.UNSCHEDULABLE,
    Reason.PENDING,
)


@dataclass(frozen=True, slots=True)
class StartupProblem:
    """What keeps a pod from starting, and since when. None: that isn't known, or nobody gives up on it."""

    reason: Reason
    message: str
    since: datetime | None
    waits_for_room: bool = False
    """It has no node, or the quota is full: room may come without anybody's doing."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a pod may take to start on its node, and how long it may wait for one; None: without limit."""

    start: timedelta
    room: timedelta | None = None

    def end(self, problem: StartupProblem) -> datetime | None:
        """When a problem has lasted too long."""
        limit = self.room if problem.waits_for_room else self.start
        return problem.since + limit if problem.since is not None and limit is not None else None


@dataclass(frozen=True, slots=True)
class SecretUse:
    """A field of the spec that names a Secret, and the keys that the Secret must have."""

    field: str
    keys: tuple[str, ...]
    name: str = ""
    """Of the Secret; empty stands for any."""

    def explains(self, secret: str, key: str) -> bool:
        """Whether that key of that Secret is wanted here; an empty key stands for any."""
        return self.name in ("", secret) and (not key or key in self.keys)


STORAGE_SECRET = SecretUse("storage.secretRef", keys.STORAGE_SECRET_KEYS)


@dataclass(frozen=True, slots=True)
class Startup:
    """How far the start of all pods is: the worst problem, the one that has lasted too long, and when the next will."""

    problem: StartupProblem | None = None
    expired: StartupProblem | None = None
    deadline: datetime | None = None


def examine(
    pods: Sequence[PodView],
    rejections: Sequence[RejectionView],
    patience: Patience,
    now: datetime,
    secrets: Sequence[SecretUse] = (STORAGE_SECRET,),
) -> Startup:
    """Look at the pods that haven't started, and at those that the API server refuses to create.

    `secrets` are the Secrets that the spec names, for the message about a missing one.

    A scheduled pod that is quietly preparing (pulling a large image) is no problem until its time is up, though it
    counts against it; one that no scheduler has spoken of is none for half a minute.
    """
    waiting = [pod for pod in pods if not pod.started and not pod.deleting]
    problems = [problem for pod in waiting if (problem := _of_pod(pod, now, patience.start, secrets)) is not None]
    if (rejected := _rejected(pods, rejections)) is not None:
        problems.append(rejected)
    problems.sort(key=lambda problem: _rank(problem.reason))
    ends = [(patience.end(problem), problem) for problem in problems]
    looks = [pod.scheduled_at + patience.start for pod in waiting if pod.scheduled_at is not None]
    silent = [pod.created for pod in waiting if pod.scheduled_at is None and not pod.unschedulable]
    looks += [created + UNSPOKEN_OF for created in silent if created is not None]
    looks += [end for end, _ in ends if end is not None]
    return Startup(
        problem=problems[0] if problems else None,
        expired=next((problem for end, problem in ends if end is not None and end <= now), None),
        deadline=min((look for look in looks if look > now), default=None),
    )


def missing_secrets(pods: Sequence[PodView]) -> frozenset[str]:
    """Names of the Secrets that pods which haven't started say are not there."""
    waiting = [pod.container for pod in pods if not pod.started and not pod.deleting and pod.container is not None]
    found = (_SECRET.search(container.waiting_message) for container in waiting if container.waiting in _CONFIG)
    return frozenset(named["a"] for named in found if named is not None and named["a"])


def _rank(reason: Reason) -> int:
    return _ORDER.index(reason) if reason in _ORDER else len(_ORDER)


def _of_pod(pod: PodView, now: datetime, patience: timedelta, secrets: Sequence[SecretUse]) -> StartupProblem | None:
    if pod.scheduled_at is None:
        return _without_node(pod, now)
    container = pod.container
    if container is not None and container.waiting in _IMAGE:
        return StartupProblem(Reason.IMAGE_PULL_FAILED, _image_message(pod, container), pod.scheduled_at)
    if container is not None and container.waiting in _CONFIG:
        return _config_problem(pod, container, secrets)
    if now - pod.scheduled_at < patience:
        return None
    doing = container.waiting if container is not None and container.waiting else "no container yet"
    return StartupProblem(
        Reason.STARTUP_TIMEOUT,
        f"pod {pod.name} was scheduled {duration(patience.total_seconds())} ago and still hasn't started ({doing}): "
        f"kubectl describe pod -n {pod.namespace} {pod.name} says why.",
        pod.scheduled_at,
    )


def _without_node(pod: PodView, now: datetime) -> StartupProblem | None:
    since = pod.created
    if not pod.unschedulable:
        if since is None or now - since < UNSPOKEN_OF:
            return None
        text = (
            f"pod {pod.name} has no node, and no scheduler says why: its gang isn't complete (PodGroup), or the "
            f"scheduler that it names isn't there. kubectl describe pod -n {pod.namespace} {pod.name} shows both."
        )
    elif (missing := _CLAIM.search(pod.unschedulable)) is not None:
        claim = missing["claim"]
        text = (
            f"pod {pod.name} waits for PersistentVolumeClaim {claim}: there is none in namespace {pod.namespace}. "
            f"Create it, or correct the pvc://{claim} URIs of the spec."
        )
    else:
        text = (
            f"pod {pod.name} finds no node: {pod.unschedulable.rstrip('.')}. It waits for room: free or add nodes, or "
            "ask for less (resources, GPUs, nodeSelector)."
        )
    return StartupProblem(Reason.UNSCHEDULABLE, text, since, waits_for_room=True)


def _image_message(pod: PodView, container: ContainerView) -> str:
    # the kubelet alternates between two wordings of one fact: keep to one, so that the status stays still
    detail = _BACK_OFF.sub("", container.waiting_message).strip().rstrip(".")
    cause = f": {detail}" if detail else ""
    return (
        f"pod {pod.name} can't get image {container.image}{cause}. Correct the image name, or make "
        "it available to the node (registry, pull secret of the spec or of the namespace's default ServiceAccount)."
    )


def _config_problem(pod: PodView, container: ContainerView, secrets: Sequence[SecretUse]) -> StartupProblem:
    named = _SECRET.search(container.waiting_message)
    if named is None:
        return StartupProblem(
            Reason.CONTAINER_CONFIG_ERROR,
            f"pod {pod.name} can't start its container: {container.waiting_message or container.waiting}.",
            pod.scheduled_at,
        )
    secret = named["a"] or named["b"]
    if "-ray-" in secret and secret.startswith(pod.labels.get(keys.LABEL_FINETUNEJOB, "") + "-"):
        remedy = "It was deleted, and the operator makes it again."
    else:
        lacking = _KEY.search(container.waiting_message)
        remedy = _secret_remedy(pod, secret, lacking["key"] if lacking is not None else "", secrets)
    return StartupProblem(
        Reason.SECRET_NOT_FOUND, f"pod {pod.name} can't start: {container.waiting_message}. {remedy}", pod.scheduled_at
    )


def _secret_remedy(pod: PodView, secret: str, key: str, secrets: Sequence[SecretUse]) -> str:
    uses = [use for use in secrets if use.explains(secret, key)] or [STORAGE_SECRET]
    wanted = [name for use in uses for name in use.keys]
    fields = " and ".join(f"spec.{use.field}" for use in uses)
    return (
        f"Create Secret {secret} in namespace {pod.namespace} with the key{'s' if len(wanted) > 1 else ''} "
        f"{' and '.join(wanted)} ({fields} name{'s' if len(uses) == 1 else ''} it); the pod then starts by itself."
    )


def _rejected(pods: Sequence[PodView], rejections: Sequence[RejectionView]) -> StartupProblem | None:
    # what was refused before the newest pod was created is over
    newest_pod = max((pod.created for pod in pods if pod.created is not None), default=None)
    fresh = [it for it in rejections if newest_pod is None or (it.last_seen is not None and it.last_seen > newest_pod)]
    if not fresh:
        return None
    newest = max(fresh, key=lambda it: it.last_seen.timestamp() if it.last_seen is not None else 0.0)
    quota = "exceeded quota" in newest.message
    remedy = (
        "It waits until the quota has room."
        if quota
        else "Change the namespace's policy (Pod Security, LimitRange, webhooks) or the spec."
    )
    # every try is for a pod of a new random name: leave it out, so that the status stays still
    message = _POD_NAME.sub("pods", newest.message.removeprefix("Error creating: ")).rstrip(".")
    since = min((it.first_seen for it in fresh if it.first_seen is not None), default=None)
    if since is not None and newest_pod is not None:
        since = max(since, newest_pod)
    text = f"the API server refuses the pods: {message}. {remedy}"
    return StartupProblem(Reason.POD_REJECTED, text, since, waits_for_room=quota)
