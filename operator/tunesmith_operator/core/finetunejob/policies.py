"""Checks of a FineTuneJob that its schema can't make: a chain of named pure functions, the first violation wins."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.places import Place, places

__all__ = ["violation"]


def _inside(inner: str, outer: str) -> bool:
    return (inner.rstrip("/") + "/").startswith(outer.rstrip("/") + "/")


def _overlap(one: Place, other: Place) -> bool:
    return _inside(one.uri, other.uri) or _inside(other.uri, one.uri)


def paths_are_plain(job: FineTuneJob) -> str | None:
    """`..` would lead out of a claim's folder, and is an ordinary name to an S3 store."""
    for place in places(job.spec):
        if {".", ".."} & set(place.uri.split("/")):
            return f"spec.{place.field} ({place.uri}) has a part '.' or '..': write the path out"
    return None


def cache_can_be_written(job: FineTuneJob) -> str | None:
    """The Hub is read only."""
    uri = job.spec.dataset.cache_uri
    if uri is not None and uri.startswith("hf://"):
        return f"spec.dataset.cacheUri ({uri}) is written to: give an s3:// or pvc:// folder"
    return None


def folders_are_apart(job: FineTuneJob) -> str | None:
    """Retention deletes in the checkpoint folder, export and cache write into theirs: none may hold another."""
    written = [place for place in places(job.spec) if place.written]
    for one, other in combinations(written, 2):
        if _overlap(one, other):
            return _apart(one, other)
    return None


def inputs_are_apart(job: FineTuneJob) -> str | None:
    """What is read would change under the job's feet, or fall to retention, where the job writes too."""
    everything = places(job.spec)
    for one in (place for place in everything if place.written):
        for other in (place for place in everything if not place.written):
            if _overlap(one, other):
                return _apart(one, other)
    return None


def _apart(one: Place, other: Place) -> str:
    return (
        f"spec.{one.field} ({one.uri}) and spec.{other.field} ({other.uri}) lie one in the other: give each a folder "
        "of its own, for example s3://bucket/checkpoints/NAME and s3://bucket/models/NAME"
    )


_CHECKS: tuple[Callable[[FineTuneJob], str | None], ...] = (
    paths_are_plain,
    cache_can_be_written,
    folders_are_apart,
    inputs_are_apart,
)


def violation(job: FineTuneJob) -> str | None:
    """The first violated policy, in words that name the field and the remedy; None where there is none."""
    return next((message for check in _CHECKS if (message := check(job)) is not None), None)
