"""Digests of local files, and folders fetched once per pod. Used by trainer and server."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.artifacts import FileEntry, ModelManifest
from tunesmith_api.keys import Reason
from tunesmith_api.memory.headers import INDEX, is_weights
from tunesmith_api.model import Contract
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.store import NotFound, ObjectInfo, ObjectStore
from tunesmith_store.weights import weight_files

__all__ = [
    "copy_hashed",
    "digest_at",
    "entries_below",
    "entry_of_bytes",
    "fetch_model",
    "file_entry",
    "find_contract",
    "find_manifest",
    "find_readable",
    "locked",
    "model_files",
    "sha256_of",
    "verify",
]

C = TypeVar("C", bound=Contract)
DONE = ".complete"
PARTS = ("1_Pooling/config.json",)
"""Files of subfolders that belong to a model: how sentence-transformers makes one vector of a text."""
RANGE = 16 << 20
"""Bytes that `copy_hashed` asks for at once."""
RETRY_PAUSES = (0.5, 2.0)
"""Seconds, beyond the client's own retries: those end where an answer has begun."""
UNREAD = (
    ".bin", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz", ".nemo", ".py",
)  # fmt: skip
"""Weights of other frameworks, and code, which is never run."""


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_hashed(store: ObjectStore, uri: str, size: int, path: Path) -> str:
    """Copy an object of `size` bytes to a file; return the hex sha256 of what came.

    For files that come several at once: one connection each, and every range is hashed while it is in the cache.

    Raises:
        NotFound: there is no such object.
        Retryable: the store can't be read.
    """
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        while (start := file.tell()) < size:
            data = _range_of(store, uri, start, min(RANGE, size - start))
            if not data:
                break  # it is shorter than it should be: its digest says so
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def digest_at(store: ObjectStore, uri: str, size: int) -> str:
    """Return the hex sha256 of an object of `size` bytes; of a longer one that of its beginning.

    Raises:
        NotFound: there is no such object.
        Retryable: the store can't be read.
    """
    digest, start = hashlib.sha256(), 0
    while start < size and (data := _range_of(store, uri, start, min(RANGE, size - start))):
        digest.update(data)
        start += len(data)
    return digest.hexdigest()


def _range_of(store: ObjectStore, uri: str, start: int, size: int) -> bytes:
    """Return a range; a connection that breaks in the middle of it is no reason to give up."""
    for pause in RETRY_PAUSES:
        try:
            return store.get_range(uri, start, size)
        except Retryable:
            time.sleep(pause)
    return store.get_range(uri, start, size)


def file_entry(root: Path, path: Path) -> FileEntry:
    """Describe one file below `root` for a manifest."""
    return FileEntry(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_of(path))


def entry_of_bytes(path: str, data: bytes) -> FileEntry:
    """Describe what is written as one object without being a file first."""
    return FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def entries_below(root: Path) -> tuple[FileEntry, ...]:
    """Describe all files below `root` but hidden ones and manifests, sorted by path."""
    skip = {keys.MODEL_MANIFEST, keys.CHECKPOINT_MANIFEST}
    files = (path for path in root.rglob("*") if path.is_file() and path.name not in skip and path.name[0] != ".")
    return tuple(file_entry(root, path) for path in sorted(files))


def verify(root: Path, entries: Iterable[FileEntry]) -> str:
    """Return the path of the first file that is missing or not what its entry says; "" where all are right."""
    for entry in entries:
        path = root / entry.path
        if not path.is_file() or path.stat().st_size != entry.size or sha256_of(path) != entry.sha256:
            return entry.path
    return ""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of this pod; `path` is a file made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch_model(
    store: ObjectStore, uri: str, folder: Path, field: str = "spec.model.uri", *, weights: bool = True
) -> Path:
    """Download a model folder once per pod; return its local folder. A model of ours is verified by its manifest.

    `field` is the spec's name of `uri`, for the message. Without `weights`, the rest is fetched: what the model is.

    Raises:
        UserError: there is nothing at `uri`.
        Retryable: the files don't match the manifest; they may be half written.
    """
    with locked(folder.with_name(folder.name + ".lock")):
        if (folder / DONE).exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        base = uri.rstrip("/") + "/"
        objects, manifest = model_files(store, uri, field)
        names = [info.uri.removeprefix(base) for info in objects]
        names = [name for name in names if weights or not is_weights(name)]
        with ThreadPoolExecutor(4, thread_name_prefix="download") as pool:
            list(pool.map(lambda name: _download(store, base + name, folder / name), names))
        fetched = [entry for entry in manifest.files if entry.path in names] if manifest else []
        if bad := verify(folder, fetched):
            raise Retryable(f"{base}{bad} is not what {keys.MODEL_MANIFEST} says: it is damaged or being rewritten")
        (folder / DONE).touch()
    return folder


def model_files(
    store: ObjectStore, uri: str, field: str, listing: Iterable[ObjectInfo] | None = None
) -> tuple[list[ObjectInfo], ModelManifest | None]:
    """Return the files below `uri` that make the model, and the manifest if it is one of ours.

    Weights that stand there twice count once. `field` is the spec's name of `uri`, for messages; `listing` is what
    the store lists there, if that is known already.

    Raises:
        UserError: there is nothing at `uri`, or it is not one whole model.
    """
    base = uri.rstrip("/") + "/"
    found = {info.uri.removeprefix(base): info for info in (store.list(uri) if listing is None else listing)}
    if not found:
        message = f"{field}: no files below {uri}; it must hold config.json, a tokenizer and safetensors weights"
        raise UserError(Reason.MODEL_NOT_FOUND, message)
    manifest = find_manifest(store, uri)
    if manifest is not None:  # other files are left from an earlier run
        wanted = {entry.path for entry in manifest.files}
        found = {name: info for name, info in found.items() if name in wanted}
    direct = {name: info for name, info in found.items() if "/" not in name}
    if "adapter_config.json" in direct:
        names = " and ".join(sorted(name for name in direct if name.startswith("adapter_")))
        message = (
            f"{field} {uri}: {names} lie beside the model, and would be applied to it unasked. Move them to a "
            "folder of their own, or merge the adapter into the model (peft: merge_and_unload)"
        )
        raise UserError(Reason.MODEL_INVALID, message)
    weights = weight_files(direct, lambda: store.get_bytes(base + INDEX), f"{field} {uri}")
    read = [name for name in direct if (name in weights if is_weights(name) else not name.endswith(UNREAD))]
    return [found[name] for name in (*read, *(part for part in PARTS if part in found))], manifest


def _download(store: ObjectStore, uri: str, path: Path) -> None:
    try:
        store.download(uri, path)
    except NotFound as error:
        message = f"{uri} was listed and is gone: the model is being rewritten"
        raise Retryable(message, Reason.MODEL_NOT_FOUND) from error


def find_manifest(store: ObjectStore, uri: str) -> ModelManifest | None:
    """Return the manifest of a folder that Tunesmith wrote; None for a folder of the user's own.

    Raises:
        UserError: it is there, and damaged.
    """
    return find_contract(store, f"{uri.rstrip('/')}/{keys.MODEL_MANIFEST}", ModelManifest, " or restore the folder")


def find_readable(store: ObjectStore, uri: str, kind: type[C]) -> C | None:
    """Return a document of ours that is a help where it is there; None where there is none that can be read."""
    try:
        return kind.from_json(store.get_bytes(uri))
    except (NotFound, ValueError):
        return None


def find_contract(store: ObjectStore, uri: str, kind: type[C], remedy: str) -> C | None:
    """Return a document of ours; None where there is none. `remedy` ends the message about a damaged one.

    Raises:
        UserError: it can't be read.
    """
    try:
        return kind.from_json(store.get_bytes(uri))
    except NotFound:
        return None
    except ValidationError as error:
        message = f"{uri} can't be read ({error.error_count()} errors): remove it{remedy}"
        raise UserError(Reason.MODEL_INVALID, message) from error
