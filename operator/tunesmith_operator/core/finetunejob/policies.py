"""Checks of a FineTuneJob that its schema can't make: a chain of named pure functions, the first violation wins."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith_api.v1alpha1 import FineTuneJob

__all__ = ["violation"]


def _inside(inner: str, outer: str) -> bool:
    return (inner.rstrip("/") + "/").startswith(outer.rstrip("/") + "/")


def folders_are_apart(job: FineTuneJob) -> str | None:
    """Retention deletes in the checkpoint folder, export writes into the output folder: neither may hold the other."""
    spec = job.spec
    pairs = (
        ("checkpoint.uri", spec.checkpoint.uri, "output.uri", spec.output.uri),
        ("checkpoint.uri", spec.checkpoint.uri, "model.uri", spec.model.uri),
        ("output.uri", spec.output.uri, "model.uri", spec.model.uri),
    )
    for left, a, right, b in pairs:
        if _inside(a, b) or _inside(b, a):
            return (
                f"spec.{left} ({a}) and spec.{right} ({b}) lie one in the other: give each a folder of its own, "
                "for example s3://bucket/checkpoints/NAME and s3://bucket/models/NAME"
            )
    return None


def data_is_apart(job: FineTuneJob) -> str | None:
    """A data file inside the checkpoint folder would fall to retention."""
    sources = {"dataset.train.uri": job.spec.dataset.train, "dataset.eval.uri": job.spec.dataset.eval}
    for field, source in sources.items():
        if source is not None and source.uri is not None and _inside(source.uri, job.spec.checkpoint.uri):
            return f"spec.{field} lies in spec.checkpoint.uri, whose contents the job deletes: move it elsewhere"
    return None


_CHECKS: tuple[Callable[[FineTuneJob], str | None], ...] = (folders_are_apart, data_is_apart)


def violation(job: FineTuneJob) -> str | None:
    """The first violated policy, in words that name the field and the remedy; None where there is none."""
    return next((message for check in _CHECKS if (message := check(job)) is not None), None)
