"""Every URI of a FineTuneJob's spec, with its field: what is read, what is written, and which claims to mount.

`policies` keeps the written ones apart from the rest; `children` mounts the claims of the `pvc://` ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tunesmith_api.v1alpha1 import FineTuneJobSpec

__all__ = ["PVC", "Place", "claims", "places"]

PVC: Final = "pvc://"


@dataclass(frozen=True, slots=True)
class Place:
    """A URI of the spec. `written` ones are folders that the job fills."""

    field: str
    uri: str
    written: bool = False

    @property
    def claim(self) -> str:
        """Name of the PersistentVolumeClaim of a `pvc://` URI; empty for other URIs."""
        return self.uri.removeprefix(PVC).partition("/")[0] if self.uri.startswith(PVC) else ""


def places(spec: FineTuneJobSpec) -> tuple[Place, ...]:
    """All URIs that the spec names, written ones first."""
    return tuple(_written(spec)) + tuple(_read(spec))


def _written(spec: FineTuneJobSpec) -> Iterator[Place]:
    yield Place("checkpoint.uri", spec.checkpoint.uri, written=True)
    yield Place("output.uri", spec.output.uri, written=True)
    if spec.dataset.cache_uri is not None:
        yield Place("dataset.cacheUri", spec.dataset.cache_uri, written=True)


def _read(spec: FineTuneJobSpec) -> Iterator[Place]:
    yield Place("model.uri", spec.model.uri)
    for name, source in (("train", spec.dataset.train), ("eval", spec.dataset.eval)):
        if source is not None and source.uri is not None:
            yield Place(f"dataset.{name}.uri", source.uri)
    if spec.method.distillation is not None:
        yield Place("method.distillation.teacherUri", spec.method.distillation.teacher_uri)
    augmentation = spec.dataset.augmentation
    if augmentation is not None and augmentation.back_translation is not None:
        there_and_back = augmentation.back_translation
        yield Place("dataset.augmentation.backTranslation.forwardUri", there_and_back.forward_uri)
        yield Place("dataset.augmentation.backTranslation.backwardUri", there_and_back.backward_uri)


def claims(spec: FineTuneJobSpec) -> dict[str, bool]:
    """The PersistentVolumeClaims that the job needs, by name, and whether it writes to them."""
    found: dict[str, bool] = {}
    for place in places(spec):
        if place.claim:
            found[place.claim] = found.get(place.claim, False) or place.written
    return dict(sorted(found.items()))
