"""What the headers of safetensors files say, and which of a folder's files a loader reads.

The store, the quantizers and the command line open the files; `facts` counts what is in them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import BinaryIO

__all__ = [
    "INDEX",
    "LENGTH_BYTES",
    "StoredTensor",
    "header_size",
    "is_weights",
    "loaded_files",
    "parse_header",
    "read_header",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LENGTH_BYTES = 8
"""A file begins with the length of its header, little-endian, and that header, in JSON."""
MOST = 100_000_000
"""Bytes of the largest header that safetensors itself reads."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As the file has it: `BF16`, `F32`, `F8_E4M3`, …"""
    shape: tuple[int, ...]


def is_weights(name: str) -> bool:
    """Say whether a file of this name holds weights that can be loaded."""
    return name.endswith(".safetensors")


def loaded_files(names: Collection[str], read_index: Callable[[], bytes]) -> set[str]:
    """Return the names of the files that a loader reads the weights from; others hold them a second time.

    Args:
        names: of all files directly in the folder.
        read_index: returns the content of `model.safetensors.index.json`.

    Raises:
        ValueError: the index can't be read, or names a file that isn't there.
    """
    found = {name for name in names if is_weights(name)}
    if SINGLE in found:  # a loader takes it even where there is an index
        return {SINGLE}
    if INDEX not in names:
        return found
    try:
        wanted = set(json.loads(read_index())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{INDEX} is no index of weights ({error}); upload the model again") from error
    if missing := sorted(wanted - found):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{INDEX} names {', '.join(missing[:3])}{more}, not there; upload the missing files")
    return wanted


def header_size(start: bytes) -> int:
    """Return how long the header is that follows a file's first bytes.

    Raises:
        ValueError: no safetensors file begins so.
    """
    if len(start) != LENGTH_BYTES:
        raise ValueError("it is cut off")
    (size,) = struct.unpack("<Q", start)
    if size > MOST:
        raise ValueError("it is no safetensors file")
    return int(size)


def parse_header(text: bytes) -> list[StoredTensor]:
    """Return the tensors that a header names.

    Raises:
        ValueError: it is none.
    """
    try:
        return [
            StoredTensor(name, entry["dtype"], tuple(entry["shape"]))
            for name, entry in json.loads(text).items()
            if name != "__metadata__"
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is damaged ({error})") from error


def read_header(file: BinaryIO) -> list[StoredTensor]:
    """Return the tensors of a file, from its header.

    Raises:
        ValueError: it is no safetensors file.
    """
    return parse_header(file.read(header_size(file.read(LENGTH_BYTES))))
