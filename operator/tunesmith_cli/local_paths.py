"""Paths of this machine where a manifest has URIs: each becomes a `pvc://` URI of a claim that is a link to a folder.

The trainer finds claims below the folder of TUNESMITH_VOLUMES. The claim `local` is the root of the file system, so
`/data/train.jsonl` is `pvc://local/data/train.jsonl`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith_cli.errors import Refused
from tunesmith_cli.schema import JSON

__all__ = ["LocalPaths"]

LOCAL = "local"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_MAX_LENGTH = 512


@dataclass(frozen=True)
class _Field:
    path: tuple[str, ...]
    is_read: bool

    @property
    def name(self) -> str:
        """As messages write it."""
        return f"spec.{'.'.join(self.path)}"


_FIELDS = (
    _Field(("model", "uri"), is_read=True),
    _Field(("dataset", "train", "uri"), is_read=True),
    _Field(("dataset", "eval", "uri"), is_read=True),
    _Field(("dataset", "cacheUri"), is_read=False),
    _Field(("dataset", "augmentation", "backTranslation", "forwardUri"), is_read=True),
    _Field(("dataset", "augmentation", "backTranslation", "backwardUri"), is_read=True),
    _Field(("method", "distillation", "teacherUri"), is_read=True),
    _Field(("checkpoint", "uri"), is_read=False),
    _Field(("output", "uri"), is_read=False),
)


class LocalPaths:
    """The links that a run needs, collected while paths are turned into URIs."""

    def __init__(self, volumes: Sequence[str] = ()) -> None:
        """`volumes` are the `CLAIM=FOLDER` of `--volume`.

        Raises:
            Refused: one of them isn't of that form, or there is no such folder.
        """
        self._links: dict[str, Path] = {LOCAL: Path("/")}
        for volume in volumes:
            name, separator, folder = volume.partition("=")
            if not separator or not _CLAIM.fullmatch(name) or name == LOCAL:
                raise Refused(f"--volume {volume}: give a claim's name and a folder, as in models=/data/models")
            path = Path(folder).expanduser().absolute()
            if not path.is_dir():
                raise Refused(f"--volume {volume}: there is no folder {path}")
            self._links[name] = path

    def localize(self, document: JSON, base: Path) -> None:
        """Turn the paths in a manifest into URIs; relative ones start at `base`.

        Raises:
            Refused: a path can't be written as a URI.
        """
        for field, parent, value in _values(document):
            if value.startswith("file:///") or ":" not in value:
                path = Path(os.path.normpath(base / Path(value.removeprefix("file://")).expanduser()))
                parent[field.path[-1]] = self._uri(field, path)

    def _uri(self, field: _Field, path: Path) -> str:
        if _CONTROL.search(str(path)):
            raise Refused(
                f"{field.name}: {str(path)!r}: a name with a line break or another control character; rename it"
            )
        uri = "/".join((f"pvc://{LOCAL}", *path.parts[1:]))
        if len(uri) > _MAX_LENGTH:
            raise Refused(f"{field.name}: {path}: longer than {_MAX_LENGTH} characters")
        return uri

    def faults(self, document: JSON) -> Iterator[str]:
        """A line for each claim that isn't known on this machine, and for each path that is read and isn't there."""
        for field, _, value in _values(document):
            if not value.startswith("pvc://"):
                continue
            path = self.path_of(value)
            if path is None:
                claim = value.removeprefix("pvc://").partition("/")[0]
                yield f"{field.name}: {value} is in a cluster's volume; where is that here? --volume {claim}=FOLDER"
            elif field.is_read and not path.exists():
                remedy = "correct the path (relative ones start at the manifest's folder, those of --set here)"
                yield f"{field.name}: {path} does not exist; {remedy}"

    def link(self, folder: Path) -> None:
        """Make the links in `folder`, which becomes TUNESMITH_VOLUMES. Folders that are to be written are created."""
        folder.mkdir(parents=True, exist_ok=True)
        for claim, target in self._links.items():
            target.mkdir(parents=True, exist_ok=True)
            (folder / claim).symlink_to(target)

    def path_of(self, uri: str) -> Path | None:
        """The path that a URI of this run stands for; None for one that is elsewhere."""
        claim, _, rest = uri.removeprefix("pvc://").partition("/")
        if not uri.startswith("pvc://") or claim not in self._links:
            return None
        return self._links[claim] / rest

    def shown(self, text: str) -> str:
        """The text with this machine's paths in place of the URIs that they became."""
        return re.sub(rf"pvc://{LOCAL}(?![a-z0-9-])", "", text)


def _values(document: JSON) -> Iterator[tuple[_Field, JSON, str]]:
    """The URIs and paths that a manifest gives: field, the object that holds it, and its value."""
    for field in _FIELDS:
        parent: Any = document.get("spec")
        for name in field.path[:-1]:
            parent = parent.get(name) if isinstance(parent, dict) else None
        value = parent.get(field.path[-1]) if isinstance(parent, dict) else None
        if isinstance(value, str) and value:
            yield field, parent, value
