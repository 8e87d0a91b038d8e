"""Every URI of a FineTuneJob's spec, with its field: what is read, what is written, and which claims to mount.

`policies` sees that the written ones overlap with no other; `children` mounts the claims of the `pvc://` ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith_api.v1alpha1 import FineTuneJobSpec
from tunesmith_operator.core.pods.spec import claim_of

__all__ = ["SpecUri", "claims", "uris"]


@dataclass(frozen=True, slots=True)
class SpecUri:
    """A URI of the spec. `written` ones are folders that the job fills."""

    field: str
    uri: str
    written: bool = False

    @property
    def claim(self) -> str:
        """Name of the PersistentVolumeClaim of a `pvc://` URI; empty for other URIs."""
        return claim_of(self.uri)


def uris(spec: FineTuneJobSpec) -> tuple[SpecUri, ...]:
    """All URIs that the spec names, written ones first."""
    return tuple(_written(spec)) + tuple(_read(spec))


def _written(spec: FineTuneJobSpec) -> Iterator[SpecUri]:
    yield SpecUri("checkpoint.uri", spec.checkpoint.uri, written=True)
    yield SpecUri("output.uri", spec.output.uri, written=True)
    if spec.dataset.cache_uri is not None:
        yield SpecUri("dataset.cacheUri", spec.dataset.cache_uri, written=True)


def _read(spec: FineTuneJobSpec) -> Iterator[SpecUri]:
    yield SpecUri("model.uri", spec.model.uri)
    for name, source in (("train", spec.dataset.train), ("eval", spec.dataset.eval)):
        if source is not None and source.uri is not None:
            yield SpecUri(f"dataset.{name}.uri", source.uri)
    if spec.method.distillation is not None:
        yield SpecUri("method.distillation.teacherUri", spec.method.distillation.teacher_uri)
    augmentation = spec.dataset.augmentation
    if augmentation is not None and augmentation.back_translation is not None:
        translation = augmentation.back_translation
        yield SpecUri("dataset.augmentation.backTranslation.forwardUri", translation.forward_uri)
        yield SpecUri("dataset.augmentation.backTranslation.backwardUri", translation.backward_uri)


def claims(spec: FineTuneJobSpec) -> dict[str, bool]:
    """The PersistentVolumeClaims that the job needs, by name, and whether it writes to them."""
    found: dict[str, bool] = {}
    for entry in uris(spec):
        if entry.claim:
            found[entry.claim] = found.get(entry.claim, False) or entry.written
    return dict(sorted(found.items()))
