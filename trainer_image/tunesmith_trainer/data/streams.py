"""Files as they lie in a store → the UTF-8 text or the bytes that `formats` cuts: decompressed, and decoded.

Everything is read piece by piece; no file is held in memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import Encoding
from tunesmith_store.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["COMPRESSED", "bare_name", "decompressed", "utf8"]

BUFFER = 1 << 20
BOMS = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
WINDOWS = {
    byte: bytes([byte]).decode("cp1252") for byte in range(0x80, 0xA0) if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
"""What Windows-1252 has where Latin-1 has control characters that nobody uses."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _zstd(file: io.BufferedReader) -> _Readable:
    import pyarrow

    stream: _Readable = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
    return stream


COMPRESSED: dict[str, Callable[[io.BufferedReader], _Readable]] = {
    "gz": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": lambda file: bz2.BZ2File(file),
    "xz": lambda file: lzma.LZMAFile(file),  # noqa: SIM115 - whoever reads it closes what is below
    "zst": _zstd,
}
"""What a last extension says of how a file is compressed."""


def bare_name(uri: str) -> tuple[str, str]:
    """Return a file's name without the extension of its compression, and that extension; "" for none."""
    name = uri.rpartition("/")[2]
    bare, _, last = name.rpartition(".")
    return (bare, last.lower()) if bare and last.lower() in COMPRESSED else (name, "")


class _Pieces(io.RawIOBase):
    """Pieces of bytes as a file; `io.BufferedReader` in front of it gives what is asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces, self._left = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        given, self._left = self._left[: len(view)], self._left[len(view) :]
        view[: len(given)] = given
        return len(given)


def _buffered(pieces: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Pieces(pieces), BUFFER)


def decompressed(file: io.BufferedReader, name: str) -> io.BufferedReader:
    """Return the file's content as its name says that it is compressed; the file itself where it says nothing.

    Raises:
        UserError: what is read is not compressed like this, or is damaged.
    """
    kind = bare_name(name)[1]
    return _buffered(_inflated(file, kind, name)) if kind else file


def _inflated(file: io.BufferedReader, kind: str, name: str) -> Iterator[bytes]:
    try:
        stream = COMPRESSED[kind](file)
        while piece := stream.read(BUFFER):
            yield piece
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the store's trouble, not the file's
        raise UserError(Reason.DATASET_INVALID, f"{name} can't be decompressed: {error}; upload it anew") from error


def utf8(file: io.BufferedReader, encoding: Encoding, name: str) -> io.BufferedReader:
    """Return a text file's content in UTF-8. Auto is UTF-8, or UTF-16 where the file begins with its mark.

    Raises:
        UserError: what is read isn't in this encoding.
    """
    if encoding is Encoding.LATIN1:
        return _buffered(_decoded(file, "latin-1", name))
    for mark, found in BOMS.items():
        if file.peek(2).startswith(mark):
            return _buffered(_decoded(file, found, name))
    return file


def _decoded(file: io.BufferedReader, encoding: str, name: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while piece := file.read(BUFFER):
            text = decoder.decode(piece)
            if encoding == "latin-1":
                text = text.translate(WINDOWS)
            yield text.encode()
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        message = f"{name} begins like UTF-16 and isn't: {error}; save it as UTF-8"
        raise UserError(Reason.DATASET_INVALID, message) from error
