"""Checks of a ModelDeployment that its schema can't make: a chain of named pure functions, the first violation wins."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith_api.v1alpha1 import ModelDeployment

__all__ = ["violation"]


def context_has_room(deployment: ModelDeployment) -> str | None:
    """llama.cpp holds the context of all parallel requests at once: an absurd product is a slip of the pen."""
    engine = deployment.spec.engine
    tokens = engine.context_length * engine.parallel_requests
    if tokens > 16_777_216:
        return (
            f"spec.engine.contextLength x parallelRequests is {tokens} tokens of context in one pod: lower one of them "
            "(16777216 at most)"
        )
    return None


def artifacts_are_apart(deployment: ModelDeployment) -> str | None:
    """Quantized files in the model's own folder would become part of the model."""
    spec = deployment.spec
    if spec.artifacts_uri is not None and spec.artifacts_uri.rstrip("/") == (spec.source.uri or "").rstrip("/"):
        return (
            "spec.artifactsURI is the folder of the model itself: name another, or leave it out for `quantized/` below"
        )
    return None


_CHECKS: tuple[Callable[[ModelDeployment], str | None], ...] = (context_has_room, artifacts_are_apart)


def violation(deployment: ModelDeployment) -> str | None:
    """The first violated policy, in words that name the field and the remedy; None where there is none."""
    return next((message for check in _CHECKS if (message := check(deployment)) is not None), None)
