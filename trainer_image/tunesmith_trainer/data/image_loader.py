"""Images of rows as base64 text, wherever they come from: text, bytes of a Parquet file, files beside the data.

Called by `rows`. Tasks decode the text; they know nothing of files.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from tunesmith_store.store import NotFound, ObjectStore
from tunesmith_trainer.tasks.base import BadRow

__all__ = ["ImageLoader"]


class ImageLoader:
    """Fetches the images of rows."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.fetched = 0
        """Files read so far."""

    def load(self, cell: Any, folder: str) -> Any:
        """Return a cell with its images as base64 text; what is no image is left to the task's own check.

        Args:
            cell: one image or a list of images: base64 text, a data URL, a path, bytes, or {bytes, path} as data sets
                of the Hub have it.
            folder: URI of the folder that paths start in; "" where there is none.

        Raises:
            BadRow: there is no such file.
        """
        if isinstance(cell, list | tuple):
            return [self.load(item, folder) for item in cell]
        if isinstance(cell, Mapping) and {"bytes", "path"} >= set(cell):
            data, path = cell.get("bytes"), cell.get("path")
            return self.load(data if data is not None else path, folder)
        if isinstance(cell, bytes):
            return base64.b64encode(cell).decode()
        if not isinstance(cell, str):
            return cell
        if cell.startswith("data:"):
            return cell.partition(",")[2]
        # base64 has no dot, the name of an image file has one
        return self._file(cell, folder) if "." in cell else cell

    def _file(self, path: str, folder: str) -> str:
        if not folder:
            raise BadRow(f"names the image file {path!r}, and there is no folder to look for it; use base64 text")
        if ".." in PurePosixPath(path).parts or path.startswith("/") or "://" in path:
            raise BadRow(f"names the image file {path!r}; use a path below the data file's folder")
        uri = f"{folder}/{path}"
        self.fetched += 1
        try:
            return base64.b64encode(self._store.get_bytes(uri)).decode()
        except NotFound as error:
            raise BadRow(f"names the image file {path!r}, but {uri} does not exist") from error
