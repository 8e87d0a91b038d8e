"""Data sets of the Hugging Face Hub, through their own loader: `datasets.load_dataset`. Called by `sources`.

It finds the files of a configuration and a split, whatever the repository looks like, and knows the names behind class
numbers. Which commit is read is resolved before: so all ranks read the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import DatasetSource
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.hub import TOKEN, HubStore, is_network_error, parse_hub_uri
from tunesmith_trainer.data.arrow_rows import plain_rows
from tunesmith_trainer.data.contents import TagOf, stored_tag
from tunesmith_trainer.data.rows import RawRow, TaskColumns

__all__ = ["HubSource"]

BATCH = 512
"""Rows that are in memory at once."""


class HubSource:
    """One split of a data set of the Hub."""

    def __init__(
        self,
        source: DatasetSource,
        hub: HubStore,
        columns: TaskColumns,
        field: str,
        endpoint: str | None,
        streaming: bool,
    ) -> None:
        """Find the commit.

        Args:
            source: the data set; its URI may name a file or a folder in the repository.
            hub: where it is.
            columns: what the task reads.
            field: the spec's name of the source.
            endpoint: a mirror of the Hub; None for the Hub itself.
            streaming: read over the network while it is used; else it is downloaded first.

        Raises:
            UserError: there is no such data set or revision, or it may not be read.
            Retryable: the Hub can't be reached.
        """
        uri = source.uri or ""
        self._place = parse_hub_uri(uri if uri.startswith("hf://datasets/") else uri.replace("hf://", "hf://datasets/"))
        self.name = uri
        self._source, self._columns, self._field = source, columns, field
        self._endpoint, self._streaming = endpoint, streaming
        self.commit = hub.commit(self._place.base, source.revision)

    def tags(self, tag_of: TagOf = stored_tag) -> Mapping[str, Any]:
        """Return the commit and which part of the data set is read."""
        part = [self._source.config, self._source.split, self._place.path]
        return {"hub": self._place.repo, "commit": self.commit, "part": part}

    def rows(self) -> Iterator[RawRow]:
        """Yield all rows of the split, in order."""
        return self._read(self._streaming)

    def head(self) -> Iterator[RawRow]:
        """Yield the same without downloading all of it first."""
        return self._read(True)

    def _read(self, streaming: bool) -> Iterator[RawRow]:
        number = 0
        with _translated(self.name, self._field):
            data = self._load(streaming)
            names = _class_names(data.features or {})
            for table in data.with_format("arrow").iter(batch_size=BATCH):
                present = [column for column in self._columns.all if column in table.column_names]
                wanted = present if set(self._columns.required) <= set(present) else table.column_names
                for row in plain_rows(table.select(wanted)):
                    number += 1
                    for column in self._columns.images:
                        if column in row:
                            row[column] = _with_bytes(row[column])
                    yield RawRow(f"{self.name} row {number}", _with_names(row, names))

    def _load(self, streaming: bool) -> Any:
        datasets = _datasets(self._endpoint)
        path = self._place.path
        inside = {} if not path else {"data_files" if "." in path.rpartition("/")[2] else "data_dir": path}
        return datasets.load_dataset(
            self._place.repo,
            name=self._source.config,
            split=self._source.split,
            revision=self.commit,
            streaming=streaming,
            **inside,
        )


def _datasets(endpoint: str | None) -> Any:
    """Import the library; it looks at HF_ENDPOINT once, and at this setting ever after."""
    if endpoint:
        os.environ.setdefault("HF_ENDPOINT", endpoint.rstrip("/"))
    import datasets

    if endpoint:
        datasets.config.HF_ENDPOINT = endpoint.rstrip("/")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what fails is raised, and said better
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return datasets


@contextmanager
def _translated(name: str, field: str) -> Iterator[None]:
    """Turn the loader's errors into ours."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        yield
    except DatasetNotFoundError as error:
        message = f"{field}.uri: {name} may not be read ({error}): accept its conditions on the Hub, and {TOKEN}"
        raise UserError(Reason.DATASET_NOT_FOUND, message) from error
    except FileNotFoundError as error:
        message = f"{field}.uri: {name} holds no data files that datasets.load_dataset knows: {error}"
        raise UserError(Reason.DATASET_INVALID, message) from error
    except Exception as error:
        cause = error.__cause__ or error
        if is_network_error(error) or is_network_error(cause):
            message = f"can't read {name}: {error}; check spec.huggingFace.endpointURL and the network"
            raise Retryable(message, Reason.STORAGE_UNREACHABLE) from error
        if not isinstance(error, ValueError | DatasetsError):
            raise
        why = " ".join(str(cause).split())
        message = f"{name} can't be loaded: {why}; check {field}.config, {field}.split and the files"
        raise UserError(Reason.DATASET_INVALID, message) from error


def _class_names(features: Mapping[str, Any]) -> dict[str, Callable[[int], str | None]]:
    """Return, for each column of class numbers (or lists of them), what turns a number into its name."""
    from datasets import ClassLabel

    found: dict[str, Callable[[int], str | None]] = {}
    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel):
            found[column] = partial(_name, list(inner.names))
    return found


def _name(names: Sequence[str], number: int) -> str | None:
    """Return a class's name; -1 stands for "unknown" in data sets of the Hub."""
    return names[number] if 0 <= number < len(names) else None


def _with_names(row: dict[str, Any], names: Mapping[str, Callable[[int], str | None]]) -> dict[str, Any]:
    for column, name in names.items():
        value = row.get(column)
        if isinstance(value, list):
            row[column] = [name(number) for number in value]
        elif isinstance(value, int):
            row[column] = name(value)
    return row


def _with_bytes(cell: Any) -> Any:
    """Return an image (or a list of them) with the bytes of the file that the loader has downloaded."""
    if isinstance(cell, list):
        return [_with_bytes(item) for item in cell]
    if isinstance(cell, Mapping) and cell.get("bytes") is None and cell.get("path"):
        return {"bytes": Path(cell["path"]).read_bytes(), "path": None}
    return cell
