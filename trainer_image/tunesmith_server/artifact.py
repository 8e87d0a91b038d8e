"""Quantized artefacts in object storage: named, found, published, fetched. For `builder`, `quantize` and the server.

An artefact is a folder with files and, written last, `tunesmith-manifest.json`. Without the manifest it does not exist.
Its folder is named by its method and by the state of its source: a source that changes gets another folder, so what
an older revision serves is never overwritten. Which artefact is a revision's own stands in a small file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.artifacts import ArtifactRef, FileEntry, ModelManifest
from tunesmith_api.keys import Reason
from tunesmith_api.model import digest_of
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import find_contract, find_manifest, verify
from tunesmith_store.store import ObjectStore
from tunesmith_store.volumes import in_place

__all__ = [
    "MODEL_FILE",
    "assign_artifact",
    "assigned_artifact",
    "check_writable",
    "fetch_artifact",
    "fetch_files",
    "find_artifact",
    "folder_of",
    "model_path",
    "publish_artifact",
]

MODEL_FILE = "model.gguf"
AGAIN = "restore it, or start a new revision, by any change of engine, resources or quantization"
RECIPE = 2
"""Counts up when the same source and method begin to give other bytes on purpose."""


def folder_of(plan: ServingPlan, method: str, state: str, variant: str = "") -> str:
    """Return the folder of the artefact of a method and a state of the source, for the plan's engine.

    `variant` says what else decides its bytes.
    """
    engine = [] if plan.engine is EngineType.LLAMA_CPP else [plan.engine.value]
    content = digest_of([state, method, RECIPE, *engine, *([variant] if variant else [])])[:16]
    return f"{plan.artifact_uri.rstrip('/')}/{method.lower()}-{content}"


def find_artifact(store: ObjectStore, uri: str) -> ModelManifest | None:
    """Return the manifest of a finished artefact, or None where it must be made."""
    manifest = find_manifest(store, uri)
    if manifest is None:
        return None
    sizes = {info.uri: info.size for info in store.list(uri)}
    whole = all(sizes.get(f"{uri.rstrip('/')}/{entry.path}") == entry.size for entry in manifest.files)
    return manifest if whole else None


def check_writable(store: ObjectStore, uri: str) -> None:
    """Write and remove a small file in a folder: what can't be written is better known before hours of work.

    Raises:
        UserError: the store refuses.
    """
    probe = f"{uri.rstrip('/')}/.tunesmith-write-test"
    store.put_bytes(probe, keys.MANAGED_BY.encode())
    store.delete(probe)


def publish_artifact(store: ObjectStore, uri: str, folder: Path, manifest: ModelManifest) -> ModelManifest:
    """Upload the files of `folder` and then the manifest; return the one that counts.

    Where another Job was first, its artefact stays untouched.
    """
    if done := find_artifact(store, uri):
        return done
    base = uri.rstrip("/")
    for entry in manifest.files:
        store.upload(folder / entry.path, f"{base}/{entry.path}")
    store.put_bytes(f"{base}/{keys.MODEL_MANIFEST}", manifest.to_json().encode())
    return manifest


def _reference(plan: ServingPlan) -> str:
    rows = [plan.calibration.to_json()] if plan.calibration is not None else []
    asked = digest_of([plan.model_uri, plan.model_digest, plan.quantization.value, *rows, *plan.ignore])[:8]
    return f"{plan.artifact_uri.rstrip('/')}/revisions/{plan.uid}/{plan.revision}-{asked}.json"


def assign_artifact(store: ObjectStore, plan: ServingPlan, uri: str, manifest: ModelManifest) -> None:
    """Make an artefact the one that the plan's revision serves, from now on and whatever becomes of the source."""
    reference = ArtifactRef(uri=uri, digest=manifest.digest)
    store.put_bytes(_reference(plan), reference.to_json().encode())


def assigned_artifact(store: ObjectStore, plan: ServingPlan) -> ArtifactRef | None:
    """Return what the plan's revision serves, or None where that isn't decided yet."""
    return find_contract(store, _reference(plan), ArtifactRef, ", and start the revision anew")


def fetch_artifact(store: ObjectStore, plan: ServingPlan, folder: Path) -> Path:
    """Bring the artefact of the plan's revision and check its digest; return what the engine loads.

    Raises:
        UserError: the revision has no finished artefact.
        Retryable: what came is not what the manifest says.
    """
    reference = assigned_artifact(store, plan)
    if reference is None:
        message = f"{plan.revision} has no artefact below {plan.artifact_uri}: {AGAIN}"
        raise UserError(Reason.MODEL_NOT_FOUND, message)
    manifest = find_manifest(store, reference.uri)
    if manifest is None:
        message = f"no finished artefact at {reference.uri}, its manifest is missing: {AGAIN}"
        raise UserError(Reason.MODEL_NOT_FOUND, message)
    if manifest.digest != reference.digest:
        message = (
            f"{reference.uri} holds another artefact ({manifest.digest[:12]}) than {plan.revision} was made with "
            f"({reference.digest[:12]}): {AGAIN}"
        )
        raise UserError(Reason.MODEL_INVALID, message)
    if (mounted := in_place(reference.uri)) is not None:
        # a copy for each pod would take time, disk and memory: the pods of a node share what it has read of a volume
        if bad := verify(mounted, manifest.files):
            raise Retryable(f"{reference.uri}/{bad} is not what its manifest says: it is damaged", Reason.MODEL_INVALID)
        return model_path(plan, mounted)
    fetch_files(store, reference.uri, manifest.files, folder)
    return model_path(plan, folder)


def model_path(plan: ServingPlan, folder: Path) -> Path:
    """Return what the plan's engine loads: a file, or the whole folder."""
    return folder / MODEL_FILE if plan.engine is EngineType.LLAMA_CPP else folder


def fetch_files(store: ObjectStore, uri: str, entries: Sequence[FileEntry], folder: Path) -> None:
    """Download an artefact's files, unless they are there, and check them.

    Raises:
        Retryable: what came is not what the manifest says.
    """
    if not verify(folder, entries):
        return
    for entry in entries:
        store.download(f"{uri.rstrip('/')}/{entry.path}", folder / entry.path)
    if bad := verify(folder, entries):
        raise Retryable(f"{uri}/{bad} is not what its manifest says: it is damaged", Reason.MODEL_INVALID)
