"""Checks of a ModelDeployment that its schema can't make: a chain of named functions, the first violation counts."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_operator.core.reconcile.rules import Violation, first_answer, password_in_url

__all__ = ["violation"]


def urls_hold_no_password(deployment: ModelDeployment) -> Violation | None:
    """The plan, a ConfigMap, has it."""
    spec = deployment.spec
    return password_in_url(
        {
            "storage.endpointURL": spec.storage.endpoint_url if spec.storage is not None else None,
            "huggingFace.endpointURL": spec.hugging_face.endpoint_url,
        }
    )


def paths_are_plain(deployment: ModelDeployment) -> Violation | None:
    """`..` would lead out of a claim's folder, and is an ordinary name to an S3 store."""
    spec = deployment.spec
    for field, uri in (("source.uri", spec.source.uri), ("artifactsURI", spec.artifacts_uri)):
        if {".", ".."} & set((uri or "").split("/")):
            return Violation(f"spec.{field} ({uri}) has a part '.' or '..': write the path out")
    return None


def context_has_room(deployment: ModelDeployment) -> Violation | None:
    """llama.cpp holds the context of all parallel requests at once: an absurd product is a slip of the pen."""
    engine = deployment.spec.engine
    tokens = engine.context_length * engine.parallel_requests
    if tokens <= 16_777_216:
        return None
    return Violation(
        f"spec.engine.contextLength x parallelRequests is {tokens} tokens of context in one pod: lower one of them "
        "(16777216 at most)"
    )


def artifacts_do_not_overlap(deployment: ModelDeployment) -> Violation | None:
    """Quantized files in the model's own folder would become part of the model."""
    spec = deployment.spec
    if spec.artifacts_uri is None or spec.artifacts_uri.rstrip("/") != (spec.source.uri or "").rstrip("/"):
        return None
    return Violation(
        "spec.artifactsURI is the folder of the model itself: name another, or leave it out for `quantized/` below"
    )


def target_can_be_reached(deployment: ModelDeployment) -> Violation | None:
    """A server refuses what it can't take in, so that more is never in flight."""
    spec = deployment.spec
    target = spec.autoscaling.target_requests_in_flight if spec.autoscaling is not None else None
    most = spec.engine.parallel_requests + spec.api.max_waiting_requests
    if target is None or target < most:
        return None
    return Violation(
        f"spec.autoscaling.targetRequestsInFlight ({target}) is never exceeded: a server takes in {most} requests "
        "(engine.parallelRequests + api.maxWaitingRequests) and refuses more; lower the target, or raise those"
    )


_POLICIES: tuple[Callable[[ModelDeployment], Violation | None], ...] = (
    urls_hold_no_password,
    paths_are_plain,
    context_has_room,
    artifacts_do_not_overlap,
    target_can_be_reached,
)


def violation(deployment: ModelDeployment) -> Violation | None:
    """The first policy that the deployment breaks; None where there is none."""
    return first_answer(_POLICIES, deployment)
