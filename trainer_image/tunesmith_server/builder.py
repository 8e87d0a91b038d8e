"""The model of one plan inside one Job: fetched once, converted once, quantized by as many methods as are asked for.

`quantize` asks for the method of the plan; a comparison asks for the unquantized model beside it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from tunesmith_api.artifacts import ModelManifest, files_digest
from tunesmith_api.keys import Reason
from tunesmith_api.model import digest_of
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import (
    check_writable,
    fetch_files,
    find_artifact,
    folder_of,
    model_path,
    publish_artifact,
)
from tunesmith_server.calibration.texts import held_out, read_texts
from tunesmith_server.predict.kinds import refuse_other_than_text
from tunesmith_server.quantizers import quantizer_of
from tunesmith_server.quantizers.base import PLAIN, Made, Options, Quantizer
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import entries_below, fetch_model, find_manifest, model_files
from tunesmith_store.store import ObjectStore

__all__ = ["Artifact", "ArtifactBuilder"]

log = logging.getLogger("tunesmith.quantize")

FIELD = "spec.source.uri"


@dataclass(frozen=True)
class Artifact:
    """A finished artefact in object storage."""

    uri: str
    manifest: ModelManifest


class ArtifactBuilder:
    """Makes artefacts of one source. What is in object storage already is not made again."""

    def __init__(self, plan: ServingPlan, store: ObjectStore, scratch: Path, threads: int = 1) -> None:
        """Prepare; nothing is read yet."""
        self._plan = plan
        self._store = store
        self._scratch = scratch
        self._threads = threads
        self._quantizers: dict[type[Quantizer], Quantizer] = {}
        self._made: dict[QuantizationMethod, Made] = {}
        self._seconds: dict[str, float] = {}

    def artifact(self, method: QuantizationMethod) -> Artifact:
        """Return the artefact of a method: found, or made and published.

        Raises:
            Failure: sorted by what helps; see `tunesmith_store.errors`.
        """
        uri = folder_of(self._plan, method.value, self.state, self._options(method).variant)
        if done := find_artifact(self._store, uri):
            log.info("%s is made already", uri)
            return Artifact(uri, done)
        check_writable(self._store, self._plan.artifact_uri)
        manifest = self._manifest(method, self._make(method))
        log.info("uploading %d MB to %s", manifest.size_bytes // 1_000_000, uri)
        return Artifact(uri, publish_artifact(self._store, uri, self._folder(method), manifest))

    def local(self, method: QuantizationMethod, variant: str = "") -> Path:
        """Return what an engine loads of a method, on this machine: as made, fetched if it is published, or made now.

        `variant` is that of the artefact: its calibration rows may have changed since.

        Raises:
            Failure: sorted by what helps; see `tunesmith_store.errors`.
        """
        if method not in self._made:
            uri = folder_of(self._plan, method.value, self.state, variant)
            if done := find_artifact(self._store, uri):
                fetch_files(self._store, uri, done.files, self._folder(method))
            else:
                self._make(method)
        return model_path(self._plan, self._folder(method))

    def _options(self, method: QuantizationMethod) -> Options:
        """What the plan's method is made with; the unquantized model beside it is as it is."""
        return self._asked if method is self._plan.quantization else PLAIN

    @cached_property
    def _asked(self) -> Options:
        plan, texts = self._plan, None
        if plan.calibration is not None:
            texts = read_texts(self._store, plan.calibration, held_out(self._store, plan.evaluation))
        return Options(plan.ignore, texts)

    @cached_property
    def state(self) -> str:
        """What the source is at: the digest in its manifest, else one over names, sizes and tags of its files.

        A plan that pins a digest is at that, whatever has become of the source since.
        """
        if self._plan.model_digest:
            return self._plan.model_digest
        return self._now()

    def _now(self) -> str:
        files, manifest = model_files(self._store, self._plan.model_uri, FIELD)
        base = self._plan.model_uri.rstrip("/") + "/"
        listing = [[info.uri.removeprefix(base), info.size, info.tag] for info in files]
        return manifest.digest if manifest is not None else digest_of(listing)

    def _folder(self, method: QuantizationMethod) -> Path:
        return self._scratch / "artifacts" / method.value

    @cached_property
    def _source(self) -> tuple[Path, str]:
        """The source's folder on this machine, and the digest of its content."""
        plan, started = self._plan, time.monotonic()
        state = self.state
        manifest = find_manifest(self._store, plan.model_uri)
        if plan.model_digest and (manifest is None or manifest.digest != plan.model_digest):
            what = f"its digest is {manifest.digest[:12]}" if manifest is not None else "its manifest is gone"
            message = (
                f"the model at {plan.model_uri} is not the one that {plan.revision} is of: {what}, not "
                f"{plan.model_digest[:12]}; restore it, or name the model as it is now"
            )
            raise UserError(Reason.MODEL_INVALID, message)
        log.info("downloading %s", plan.model_uri)
        folder = fetch_model(self._store, plan.model_uri, self._scratch / "model", FIELD)
        if self._now() != state:
            raise Retryable(
                f"{plan.model_uri} is being rewritten: what came is not what was listed", Reason.MODEL_INVALID
            )
        self._seconds["downloadSeconds"] = round(time.monotonic() - started, 2)
        return folder, manifest.digest if manifest is not None else files_digest(entries_below(folder))

    def _make(self, method: QuantizationMethod) -> Made:
        if method not in self._made:
            source, _ = self._source
            started = time.monotonic()
            if self._plan.engine is not EngineType.TRANSFORMERS:
                refuse_other_than_text(source, self._plan.engine)
            kind = quantizer_of(self._plan.engine, method)
            if kind not in self._quantizers:
                self._quantizers[kind] = kind(source, self._scratch / "quantizer", self._threads)
            log.info("quantizing to %s", method)
            folder = self._folder(method)
            folder.mkdir(parents=True, exist_ok=True)
            self._made[method] = self._quantizers[kind].make(method, folder, self._options(method))
            self._seconds["convertSeconds"] = round(time.monotonic() - started, 2)
        return self._made[method]

    def _manifest(self, method: QuantizationMethod, made: Made) -> ModelManifest:
        files = entries_below(self._folder(method))
        return ModelManifest(
            digest=files_digest(files),
            base_uri=self._plan.model_uri,
            base_digest=self._source[1],
            base_state=self.state,
            quantization=method.value,
            bits_per_weight=round(sum(entry.size for entry in files) * 8 / made.weights, 3),
            tensor_types=dict(made.tensor_types),
            fallbacks=dict(made.fallbacks),
            variant=self._options(method).variant,
            calibration=made.calibration,
            ignored=made.ignored,
            tools=dict(made.tools),
            shape=made.shape,
            created_time=datetime.now(UTC).isoformat(timespec="seconds"),
            metrics=dict(self._seconds),
            files=files,
        )
