"""Where rows come from: files and folders of a store, rows in the manifest, data sets of the Hub.

`prepare`, `streaming` and `preflight` open sources; each can be read from the start as often as wanted, and tells what
its content is without being read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any, Protocol

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.dataset import DataFormat, DatasetSource, Encoding
from tunesmith_store.errors import UserError
from tunesmith_store.hub import HubStore
from tunesmith_store.ranged import open_object
from tunesmith_store.store import NotFound, ObjectInfo, ObjectStore
from tunesmith_trainer.data.contents import TagOf, stored_tag
from tunesmith_trainer.data.formats import BINARY, FileKind, kind_of, read_file
from tunesmith_trainer.data.hubset import HubSource
from tunesmith_trainer.data.rows import RawRow, TaskColumns, columns_of
from tunesmith_trainer.data.streams import decompressed, utf8

__all__ = ["Source", "open_source", "open_sources"]

KNOWN = ".jsonl, .json, .csv, .tsv, .txt, also with .gz, .bz2, .xz or .zst behind it; .parquet, .arrow"
BESIDE_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` writes beside the rows."""
PARQUET_BLOCK = 64 << 10
"""Bytes of one request for what lies between the columns; these are read whole."""


class Source(Protocol):
    """A place that rows come from."""

    name: str
    """How messages call it."""

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows, from the first on, always in the same order.

        Raises:
            UserError: a file is not what it should be, or may not be read.
            Retryable: the store can't be reached.
        """

    def head(self) -> Iterator[RawRow]:
        """Yield the same rows for who wants to see the first ones only. Raises as `rows`."""

    def tags(self, tag_of: TagOf = stored_tag) -> Mapping[str, Any]:
        """Return plain data that changes with the content (or the way that it is read), by `tag_of` of each file."""


def open_sources(plan: TrainingPlan, store: ObjectStore) -> tuple[Source, Source | None]:
    """Open the plan's training data, and its held-out data if it is a source of its own. Raises as `open_source`."""
    dataset = plan.dataset
    train = open_source(dataset.train, plan, store, "spec.dataset.train")
    held_out = open_source(dataset.eval, plan, store, "spec.dataset.eval") if dataset.eval else None
    return train, held_out


def open_source(source: DatasetSource, plan: TrainingPlan, store: ObjectStore, field: str) -> Source:
    """Open one source. `field` is the spec's name of it.

    Raises:
        UserError: there is nothing, or it isn't known how it is written.
        Retryable: the store can't be reached.
    """
    columns = columns_of(plan)
    if source.inline is not None:
        return InlineSource(source.inline, field)
    assert source.uri is not None
    if source.uri.startswith("hf://"):
        hub = HubStore(plan.hub_endpoint_url)
        return HubSource(source, hub, columns, field, plan.hub_endpoint_url, plan.dataset.streaming)
    return FileSource(source, store, columns, plan.dataset.columns.text, field)


class InlineSource:
    """JSON Lines in the manifest itself."""

    def __init__(self, text: str, field: str) -> None:
        self.name = f"{field}.inline"
        self._text = text.encode()

    def rows(self) -> Iterator[RawRow]:
        """Yield the lines that aren't blank."""
        for number, line in enumerate(self._text.splitlines(), 1):
            if line.strip():
                yield RawRow(f"{self.name} line {number}", line)

    def head(self) -> Iterator[RawRow]:
        """Yield the same."""
        return self.rows()

    def tags(self, tag_of: TagOf = stored_tag) -> Mapping[str, Any]:
        """Return the digest of the text."""
        return {"inline": hashlib.sha256(self._text).hexdigest()}


class FileSource:
    """One file, or a folder whose files are read in order of their names."""

    def __init__(self, source: DatasetSource, store: ObjectStore, columns: TaskColumns, text: str, field: str) -> None:
        """Find the files.

        Raises:
            UserError: there are none, or it isn't known how they are written.
            Retryable: the store can't be reached.
        """
        self.name = source.uri or ""
        self._store, self._columns, self._text, self._encoding = store, columns, text, source.encoding
        self._files = _files(store, self.name, source.format, field)

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows of all files, one after the other. A file is read piece by piece, never kept."""
        for info, kind in self._files:
            folder = info.uri.rpartition("/")[0]
            block = {"block": PARQUET_BLOCK} if kind is FileKind.PARQUET else {}
            with closing(open_object(self._store, info.uri, **block)) as file:
                plain = file if kind in BINARY else utf8(decompressed(file, info.uri), self._encoding, info.uri)
                for raw in read_file(plain, kind, info.uri, self._columns, self._text):
                    yield raw._replace(folder=folder) if self._columns.images else raw

    def head(self) -> Iterator[RawRow]:
        """Yield the same: no more is read than is asked for."""
        return self.rows()

    def tags(self, tag_of: TagOf = stored_tag) -> Mapping[str, Any]:
        """Return name, size and tag of each file, and how it is read."""
        return {
            "root": self.name.rstrip("/"),
            "files": [[info.uri, info.size, tag_of(info), kind.value] for info, kind in self._files],
            **({"encoding": self._encoding.value} if self._encoding is not Encoding.AUTO else {}),
        }


def _files(store: ObjectStore, uri: str, form: DataFormat, field: str) -> list[tuple[ObjectInfo, FileKind]]:
    """Find the file, or those of a folder that are data."""
    path = uri.partition("://")[2].partition("/")[2].strip("/")
    single = _head(store, uri) if path else None
    if single is not None:
        kind = kind_of(uri, form)
        if kind is None:
            message = f"{field}.uri: the name of {uri} doesn't say how it is written ({KNOWN}); set {field}.format"
            raise UserError(Reason.DATASET_INVALID, message)
        return [(single, kind)]
    below = store.list(uri)
    if not below:
        message = f"{field}.uri: {uri} does not exist; upload it or correct the URI"
        raise UserError(Reason.DATASET_NOT_FOUND, message)
    visible = [info for info in below if not _is_hidden(info.uri.removeprefix(uri.rstrip("/")))]
    data = [(info, kind) for info in visible if (kind := _kind_in_folder(info.uri, form))]
    if not data and form is not DataFormat.AUTO:  # the parts that big-data tools write have no extension
        bare = [info for info in visible if "." not in info.uri.rpartition("/")[2]]
        data = [(info, kind) for info in bare if (kind := kind_of(info.uri, form))]
    if not data:
        what = "has a known extension" if form is DataFormat.AUTO else f"looks like {form.value}"
        message = (
            f"{field}.uri: of the {len(below)} files below {uri} none {what} "
            f"({KNOWN}); rename them or set {field}.format"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    return data


def _is_hidden(path: str) -> bool:
    """Whether a file or one of its folders is no data by its name, as Hadoop, Unix and `datasets` have it."""
    return path.rpartition("/")[2] in BESIDE_DATA or any(part.startswith((".", "_")) for part in path.split("/"))


def _head(store: ObjectStore, uri: str) -> ObjectInfo | None:
    try:
        return store.head(uri)
    except NotFound:
        return None


def _kind_in_folder(uri: str, form: DataFormat) -> FileKind | None:
    """A folder may hold other things, too, such as images and a README: they are passed over."""
    by_name = kind_of(uri, DataFormat.AUTO)
    if form is DataFormat.AUTO or by_name is None:
        return by_name
    wanted = kind_of(uri, form)
    return wanted if wanted is by_name else None
