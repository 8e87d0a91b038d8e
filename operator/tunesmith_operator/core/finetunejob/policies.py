"""Checks of a FineTuneJob that its schema can't make: a chain of named functions, the first violation counts.

`decide` refuses with them, and so does the command line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations, product

from tunesmith_api.keys import LABEL_QUEUE
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.core.finetunejob.uris import SpecUri, uris
from tunesmith_operator.core.reconcile.rules import Violation, first_answer, password_in_url

__all__ = ["violation"]


def urls_hold_no_password(job: FineTuneJob) -> Violation | None:
    """The plan, a ConfigMap, has them."""
    mlflow = job.spec.tracking.mlflow
    return password_in_url(
        {
            "storage.endpointURL": job.spec.storage.endpoint_url,
            "huggingFace.endpointURL": job.spec.hugging_face.endpoint_url,
            "tracking.mlflow.trackingURI": mlflow.tracking_uri if mlflow is not None else None,
        }
    )


def paths_are_plain(job: FineTuneJob) -> Violation | None:
    """`..` would lead out of a claim's folder, and is an ordinary name to an S3 store."""
    for entry in uris(job.spec):
        if {".", ".."} & set(entry.uri.split("/")):
            return Violation(f"spec.{entry.field} ({entry.uri}) has a part '.' or '..': write the path out")
    return None


def cache_can_be_written(job: FineTuneJob) -> Violation | None:
    """The Hub is read only."""
    uri = job.spec.dataset.cache_uri
    if uri is not None and uri.startswith("hf://"):
        return Violation(f"spec.dataset.cacheUri ({uri}) is written to: give an s3:// or pvc:// folder")
    return None


def folders_do_not_overlap(job: FineTuneJob) -> Violation | None:
    """Retention deletes in the checkpoint folder, export and cache write into theirs: none may hold another."""
    written = [entry for entry in uris(job.spec) if entry.written]
    return next((_overlap(one, other) for one, other in combinations(written, 2) if _overlaps(one, other)), None)


def inputs_do_not_overlap(job: FineTuneJob) -> Violation | None:
    """What is read would change while the job runs, or be deleted by retention, where the job writes too."""
    written = [entry for entry in uris(job.spec) if entry.written]
    read = [entry for entry in uris(job.spec) if not entry.written]
    return next((_overlap(one, other) for one, other in product(written, read) if _overlaps(one, other)), None)


def _inside(inner: str, outer: str) -> bool:
    return (inner.rstrip("/") + "/").startswith(outer.rstrip("/") + "/")


def _overlaps(one: SpecUri, other: SpecUri) -> bool:
    return _inside(one.uri, other.uri) or _inside(other.uri, one.uri)


def _overlap(one: SpecUri, other: SpecUri) -> Violation:
    return Violation(
        f"spec.{one.field} ({one.uri}) and spec.{other.field} ({other.uri}) lie one in the other: give each a folder "
        "of its own, for example s3://bucket/checkpoints/NAME and s3://bucket/models/NAME"
    )


def queue_has_a_name(job: FineTuneJob) -> Violation | None:
    """A label can hold what no LocalQueue is called, and the job would wait in it for ever."""
    queue = job.metadata.labels.get(LABEL_QUEUE)
    if queue is None or re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", queue):
        return None
    return Violation(
        f"label {LABEL_QUEUE} ({queue!r}) is no name of a LocalQueue, which has lower-case letters, digits, '-' and "
        f"'.': kubectl get localqueues -n {job.metadata.namespace} lists them. Without a queue, remove the label"
    )


_POLICIES: tuple[Callable[[FineTuneJob], Violation | None], ...] = (
    urls_hold_no_password,
    paths_are_plain,
    cache_can_be_written,
    folders_do_not_overlap,
    inputs_do_not_overlap,
    queue_has_a_name,
)


def violation(job: FineTuneJob) -> Violation | None:
    """The first policy that the job breaks; None where there is none."""
    return first_answer(_POLICIES, job)
