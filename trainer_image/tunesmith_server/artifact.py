"""The quantized artefact in object storage: found, fetched and published. Used by `quantize` and the server.

A folder with `model.gguf` and, written last, `tunesmith-manifest.json`. Without the manifest it does not exist.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest, files_digest
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import file_entry, verify
from tunesmith_store.store import NotFound, ObjectStore

__all__ = ["MODEL_FILE", "fetch_artifact", "find_artifact", "find_manifest", "publish_artifact"]

MODEL_FILE = "model.gguf"


def find_manifest(store: ObjectStore, uri: str) -> ModelManifest | None:
    """Return the manifest of a folder that Tunesmith wrote; None for a folder of the user's own."""
    try:
        return ModelManifest.from_json(store.get_bytes(f"{uri.rstrip('/')}/{keys.MODEL_MANIFEST}"))
    except NotFound:
        return None
    except ValidationError as error:
        message = (
            f"{uri}/{keys.MODEL_MANIFEST} can't be read ({error.error_count()} errors): remove it or restore the folder"
        )
        raise UserError(Reason.MODEL_INVALID, message) from error


def find_artifact(store: ObjectStore, plan: ServingPlan, base_digest: str) -> ModelManifest | None:
    """Return the manifest of a finished artefact of this very model and method, or None where it must be made."""
    manifest = find_manifest(store, plan.artifact_uri)
    if manifest is None or manifest.quantization != plan.quantization or manifest.base_digest != base_digest:
        return None
    sizes = {info.uri: info.size for info in store.list(plan.artifact_uri)}
    base = plan.artifact_uri.rstrip("/")
    whole = all(sizes.get(f"{base}/{entry.path}") == entry.size for entry in manifest.files)
    return manifest if whole else None


def publish_artifact(
    store: ObjectStore, plan: ServingPlan, folder: Path, base_digest: str, metrics: dict[str, float]
) -> ModelManifest:
    """Upload `folder`/model.gguf and then its manifest; return the manifest."""
    entry = file_entry(folder, folder / MODEL_FILE)
    manifest = ModelManifest(
        digest=files_digest([entry]),
        base_uri=plan.model_uri,
        base_digest=base_digest,
        quantization=plan.quantization,
        created_time=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics=metrics,
        files=(entry,),
    )
    base = plan.artifact_uri.rstrip("/")
    store.upload(folder / MODEL_FILE, f"{base}/{MODEL_FILE}")
    store.put_bytes(f"{base}/{keys.MODEL_MANIFEST}", manifest.to_json().encode())
    return manifest


def fetch_artifact(store: ObjectStore, plan: ServingPlan, folder: Path) -> Path:
    """Download the artefact and check its digest; return the path of the GGUF file.

    Raises:
        UserError: there is no finished artefact at the plan's URI.
        Retryable: what came is not what the manifest says.
    """
    manifest = find_manifest(store, plan.artifact_uri)
    if manifest is None:
        message = (
            f"no finished artefact at {plan.artifact_uri}: its manifest is missing; delete the revision to make it anew"
        )
        raise UserError(Reason.MODEL_NOT_FOUND, message)
    if not verify(folder, manifest.files):
        return folder / MODEL_FILE
    store.download(f"{plan.artifact_uri.rstrip('/')}/{MODEL_FILE}", folder / MODEL_FILE)
    if bad := verify(folder, manifest.files):
        raise Retryable(f"{plan.artifact_uri}/{bad} is not what its manifest says: it is damaged", Reason.MODEL_INVALID)
    return folder / MODEL_FILE
