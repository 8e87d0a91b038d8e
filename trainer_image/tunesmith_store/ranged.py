"""An object read like a file, block by block: what is larger than the disk can be read, and the head of it cheaply.

Used by readers of data sets. A block that fails is asked for again by the store's client.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from tunesmith_store.store import ObjectStore

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["BLOCK", "open_object"]

BLOCK = 8 << 20
"""Bytes that are asked for at once when reading from front to back."""


class _Ranges(io.RawIOBase):
    """Reads what it is asked for; `io.BufferedReader` in front of it makes blocks of it."""

    def __init__(self, store: ObjectStore, uri: str) -> None:
        super().__init__()
        self._store, self._uri = store, uri
        self._size, self._position = store.head(uri).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._size - self._position)
        if wanted <= 0:
            return 0
        data = self._store.get_range(self._uri, self._position, wanted)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_object(store: ObjectStore, uri: str, block: int = BLOCK) -> io.BufferedReader:
    """Open an object for reading in binary; it can seek.

    Args:
        store: where it is.
        uri: which one.
        block: bytes of one request; a larger single read is one request too.

    Raises:
        NotFound: there is no such object.
        UserError: it may not be read.
        Retryable: the store can't be reached; reading from it raises this too.
    """
    return io.BufferedReader(_Ranges(store, uri), buffer_size=block)
