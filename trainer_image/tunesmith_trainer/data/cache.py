"""Tokenized data in object storage, shared by jobs that read the same data with the same model. Called by `prepare`.

An entry is named by the digest of all that decides its content, and exists once its manifest, written last, does. A
damaged one counts as missing. The cache saves time and nothing else: no problem with it ever fails a job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

import tunesmith_trainer
from tunesmith_api.artifacts import FileEntry
from tunesmith_api.model import Contract, digest_of
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import Failure
from tunesmith_store.files import entries_below, sha256_of, verify
from tunesmith_store.store import NotFound, ObjectStore
from tunesmith_trainer.data.sources import Source
from tunesmith_trainer.data.statistics import DataStatistics
from tunesmith_trainer.tasks.base import DataSummary

__all__ = ["MANIFEST", "TokenCache", "TokenManifest", "read_manifest", "token_digest"]

FORMAT = 1
"""Changes with the layout of the files."""
MANIFEST = "manifest.json"
STREAMS = 8

Log = Callable[..., None]
ENCODERS = ("data", "tasks", "models/tokenizers.py")
"""The code that decides what an example looks like, below this package."""
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md")


class TokenManifest(Contract):
    """Commit record of one prepared data set, on disk and in the cache."""

    schema_version: Literal[1] = 1
    created_time: str
    labels: Mapping[str, int]
    """How often each class occurs in the training data, for `Task.prepare`."""
    vector_width: int = 0
    """Of how many classes each row marks every one; for `Task.prepare`."""
    statistics: DataStatistics
    files: tuple[FileEntry, ...]

    @classmethod
    def of(cls, folder: Path, summary: DataSummary, statistics: DataStatistics) -> TokenManifest:
        """Describe the files of a folder."""
        return cls(
            created_time=datetime.now(UTC).isoformat(timespec="seconds"),
            labels=dict(summary.labels),
            vector_width=summary.vector_width,
            statistics=statistics,
            files=entries_below(folder),
        )

    @property
    def summary(self) -> DataSummary:
        """What the task has to know of the data."""
        return DataSummary(self.labels, self.vector_width)


def token_digest(plan: TrainingPlan, store: ObjectStore, train: Source, held_out: Source | None) -> str:
    """Return the digest of all that decides which examples a plan's data gives.

    Raises:
        UserError: a model of the plan may not be read.
        Retryable: the store can't be reached.
    """
    dataset = plan.dataset
    augmentation = dataset.augmentation
    paraphrased = augmentation.back_translation if augmentation else None
    return digest_of(
        {
            "format": FORMAT,
            "code": _code_digest(),
            "libraries": [version("transformers"), version("tokenizers")],
            "train": train.tags(),
            "heldOut": held_out.tags() if held_out else None,
            "processor": _processor_tags(store, plan.model_uri),
            "task": plan.task.value,
            "columns": dataset.columns.model_dump(mode="json"),
            "classification": plan.classification.model_dump(mode="json"),
            "maxLength": plan.training.max_length,
            **({"translation": plan.translation.model_dump(mode="json")} if plan.translation else {}),
            "onBadRow": dataset.on_bad_row.value,
            "deduplication": dataset.deduplication.value,
            "splitPercent": dataset.split_percent,
            "paraphrases": [
                paraphrased.model_dump(mode="json"),
                plan.training.seed,
                *(_tags(store, uri, ()) for uri in (paraphrased.forward_uri, paraphrased.backward_uri)),
            ]
            if paraphrased
            else None,
        }
    )


def _code_digest() -> str:
    """Digest of the code that encodes: a new version makes its own entries, whether anybody thinks of it or not."""
    root = Path(tunesmith_trainer.__file__).parent
    files = [
        path for name in ENCODERS for path in ([root / name] if name.endswith(".py") else (root / name).glob("*.py"))
    ]
    return digest_of({path.relative_to(root).as_posix(): sha256_of(path) for path in sorted(files)})


def _processor_tags(store: ObjectStore, uri: str) -> dict[str, str]:
    """Tags of the model's files but its weights: tokenizer, image processor, chat template, configuration."""
    return _tags(store, uri, WEIGHTS)


def _tags(store: ObjectStore, uri: str, without: tuple[str, ...]) -> dict[str, str]:
    base = uri.rstrip("/") + "/"
    files = {info.uri.removeprefix(base): info.tag for info in store.list(uri)}
    return {name: tag for name, tag in files.items() if "/" not in name and not name.endswith(without)}


def read_manifest(store: ObjectStore, uri: str) -> TokenManifest | None:
    """Return the manifest of a cache entry; None where there is none that can be read."""
    try:
        return TokenManifest.from_json(store.get_bytes(f"{uri}/{MANIFEST}"))
    except (NotFound, Failure, ValidationError):
        return None


class TokenCache:
    """One entry of the cache, at `uri`."""

    def __init__(self, store: ObjectStore, uri: str, log: Log) -> None:
        self._store, self._uri, self._log = store, uri, log

    def fetch(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> TokenManifest | None:
        """Download the files of an entry whose names are wanted; None where there is no entry, or a damaged one."""
        manifest = read_manifest(self._store, self._uri)
        if manifest is None:
            return None
        entries = tuple(entry for entry in manifest.files if wanted(entry.path))
        try:
            with ThreadPoolExecutor(STREAMS, thread_name_prefix="tokens") as pool:
                list(
                    pool.map(
                        lambda entry: self._store.download(f"{self._uri}/{entry.path}", folder / entry.path), entries
                    )
                )
            damaged = verify(folder, entries)
        except NotFound as error:
            damaged = str(error)
        except (Failure, OSError) as error:
            self._log(f"the cached tokens at {self._uri} can't be read ({error}): tokenizing instead")
            return None
        if damaged:
            self._log(f"the cached tokens at {self._uri} are damaged ({damaged}): tokenizing anew")
            for entry in entries:
                (folder / entry.path).unlink(missing_ok=True)
            return None
        return manifest

    def save(self, folder: Path, manifest: TokenManifest) -> bool:
        """Upload what `manifest` lists, then the manifest; return whether that worked."""
        try:
            with ThreadPoolExecutor(STREAMS, thread_name_prefix="tokens") as pool:
                list(
                    pool.map(
                        lambda entry: self._store.upload(folder / entry.path, f"{self._uri}/{entry.path}"),
                        manifest.files,
                    )
                )
            self._store.put_bytes(f"{self._uri}/{MANIFEST}", manifest.to_json().encode())
        except (Failure, NotFound, OSError) as error:
            self._log(f"the tokens can't be cached at {self._uri}: {error}; the next attempt tokenizes again")
            return False
        return True
