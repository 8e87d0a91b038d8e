"""What a run is made of, by content: its settings and the files that it reads. It decides whose a checkpoint is.

A file in a volume is known by size and time, which a copy or `touch` changes; so its content is digested, once for each
size and time. `driver` writes down what a run was made of beside its checkpoints; `CheckpointStorage` says by it why
another run's are of no use. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from tunesmith_api.model import Contract
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.files import digest_at, find_readable
from tunesmith_store.store import ObjectInfo, ObjectStore

__all__ = ["Contents", "RunDescription", "TagOf", "differences", "find_description", "stored_tag"]

FOLDER = "runs"
VOLUME = "pvc://"
LONG = 64
"""Characters of a setting's value that are kept as they are."""
NAMED = 3
"""Differences that a message names."""
SPEC_NAMES = {
    "modelUri": "model.uri",
    "modelRevision": "model.revision",
    "modelInit": "model.init",
    "maskedLm": "maskedLM",
}


TagOf = Callable[[ObjectInfo], str]


def stored_tag(info: ObjectInfo) -> str:
    """Return what the store itself says of a file: nothing is read for it."""
    return info.tag


class RunDescription(Contract):
    """`<checkpoint uri>/runs/<digest>.json`: what one run was made of."""

    schema_version: Literal[1] = 1
    run_digest: str
    settings: dict[str, str]
    """By their names in the spec."""
    files: dict[str, str]
    """URI → digest of the content, or what the store has for one."""
    stored: dict[str, str]
    """URI → what the store said of the file when it was digested."""


class Contents:
    """The files that a run reads, by content."""

    def __init__(self, store: ObjectStore, checkpoint_uri: str) -> None:
        """What earlier runs have digested is looked up beside the checkpoints."""
        self._store, self._uri = store, checkpoint_uri
        self._known: dict[tuple[str, str], str] | None = None
        self.files: dict[str, str] = {}
        self._stored: dict[str, str] = {}

    def tag_of(self, info: ObjectInfo) -> str:
        """Return what changes with the content of a file, and with nothing else where it lies in a volume.

        Raises:
            Retryable: it can't be read.
        """
        tag = info.tag
        if info.uri.startswith(VOLUME):
            if self._known is None:
                self._known = dict(_digested(self._store, self._uri))
            tag = self._known.get((info.uri, info.tag)) or digest_at(self._store, info.uri, info.size)
            self._stored[info.uri] = info.tag
        self.files[info.uri] = tag
        return tag

    def note(self, uri: str, tag: str) -> str:
        """Take over what is known of a file's content already."""
        self.files[uri] = tag
        return tag

    def write_down(self, plan: TrainingPlan, run_digest: str) -> None:
        """Leave beside the checkpoints what this run is made of."""
        found = RunDescription(
            run_digest=run_digest, settings=dict(_flat(plan.curve)), files=self.files, stored=self._stored
        )
        if find_description(self._store, self._uri, run_digest) != found:
            self._store.put_bytes(_place(self._uri, run_digest), found.to_json().encode())


def find_description(store: ObjectStore, checkpoint_uri: str, run_digest: str) -> RunDescription | None:
    """Return what a run was made of; None where nothing says so."""
    return find_readable(store, _place(checkpoint_uri, run_digest), RunDescription)


def differences(other: RunDescription, mine: RunDescription) -> str:
    """Say in a line in which settings and files another run differs from this one."""
    found = list(_differences(other, mine))
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(found[:NAMED]) + more


def _differences(other: RunDescription, mine: RunDescription) -> Iterator[str]:
    for name in sorted(other.settings.keys() | mine.settings.keys()):
        was, now = other.settings.get(name, "not set"), mine.settings.get(name, "not set")
        if was != now:
            yield f"spec.{name} was {was} and is {now}"
    for uri in sorted(other.files.keys() | mine.files.keys()):
        if uri not in mine.files or uri not in other.files:
            yield f"{uri} was read and is not now" if uri in other.files else f"{uri} was not read and is now"
        elif other.files[uri] != mine.files[uri]:
            yield f"{uri} has another content"


def _place(checkpoint_uri: str, run_digest: str) -> str:
    return f"{checkpoint_uri.rstrip('/')}/{FOLDER}/{run_digest[:16]}.json"


def _digested(store: ObjectStore, checkpoint_uri: str) -> Iterator[tuple[tuple[str, str], str]]:
    for info in store.list(f"{checkpoint_uri.rstrip('/')}/{FOLDER}"):
        found = find_readable(store, info.uri, RunDescription)
        if found is None:
            continue
        for uri, tag in found.stored.items():
            yield (uri, tag), found.files[uri]


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in document.items():
        full = prefix + (name if prefix else SPEC_NAMES.get(name, name))
        if isinstance(value, Mapping):
            yield from _flat(value, f"{full}.")
        elif value is not None and value != []:
            text = str(value)
            yield full, text if len(text) <= LONG else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
