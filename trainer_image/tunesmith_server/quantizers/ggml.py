"""llama.cpp's own quantization of rows of numbers, out of the library that also serves. Called by `gguf_files`.

The functions are part of ggml's public C interface, which the extension module exports.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

__all__ = ["NotRepresentable", "quantized"]


class NotRepresentable(Exception):
    """A block of weights has no finite form in this format."""


@cache
def _library() -> ctypes.CDLL:
    from xllamacpp import xllamacpp as extension

    library = ctypes.CDLL(extension.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return library


def quantized(
    rows: np.ndarray[Any, np.dtype[np.float32]],
    kind: int,
    importance: np.ndarray[Any, np.dtype[np.float32]] | None = None,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return rows of 32-bit numbers in ggml's format `kind`. Several threads may call at once: none waits for another.

    `importance` says what the error of each column counts; Q8_0 and unquantized formats don't look at it.

    Raises:
        NotRepresentable: a block has no finite form there.
    """
    library = _library()
    count, columns = rows.shape
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    weights = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        assert importance.shape == (columns,)
        weights = importance.ctypes.data
    output = np.empty(count * library.ggml_row_size(kind, columns), dtype=np.uint8)
    written = library.ggml_quantize_chunk(kind, rows.ctypes.data, output.ctypes.data, 0, count, columns, weights)
    if written != output.nbytes or not library.ggml_validate_row_data(kind, output.ctypes.data, output.nbytes):
        raise NotRepresentable
    return output
