"""llama.cpp without a server: `python -m bench.serving.engine MODEL THREADS TOKENS`, one JSON line with `tokensPerSecond`.

What `llama-bench -n TOKENS` measures, and as it does: one token after the other from an empty context, nothing sampled.
Flash attention is off, as it is when we serve. The functions are llama.cpp's public C interface, which the extension
module of xllamacpp exports; its parameters are passed as they come but for the numbers that are set.
"""

from __future__ import annotations

import ctypes
import json
import random
import struct
import sys
import time
from typing import Any

__all__: list[str] = []

USUAL = -1
"""Of an enumeration: as the model says."""


class _Struct(ctypes.Structure):
    """Parameters of llama.cpp, larger than either of its two kinds: whoever is given them reads the beginning."""

    _fields_ = [("data", ctypes.c_uint8 * 1024)]


def library() -> Any:
    """The functions that are called here."""
    from xllamacpp import xllamacpp as extension

    found = ctypes.CDLL(extension.__file__)
    found.llama_model_default_params.restype = _Struct
    found.llama_context_default_params.restype = _Struct
    found.llama_model_load_from_file.restype = ctypes.c_void_p
    found.llama_model_load_from_file.argtypes = (ctypes.c_char_p, _Struct)
    found.llama_init_from_model.restype = ctypes.c_void_p
    found.llama_init_from_model.argtypes = (ctypes.c_void_p, _Struct)
    found.llama_set_n_threads.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
    found.llama_batch_get_one.restype = _Batch
    found.llama_batch_get_one.argtypes = (ctypes.POINTER(ctypes.c_int32), ctypes.c_int32)
    found.llama_decode.argtypes = (ctypes.c_void_p, _Batch)
    found.llama_get_memory.restype = ctypes.c_void_p
    found.llama_get_memory.argtypes = (ctypes.c_void_p,)
    found.llama_memory_clear.argtypes = (ctypes.c_void_p, ctypes.c_bool)
    found.llama_synchronize.argtypes = (ctypes.c_void_p,)
    found.llama_model_get_vocab.restype = ctypes.c_void_p
    found.llama_model_get_vocab.argtypes = (ctypes.c_void_p,)
    found.llama_vocab_n_tokens.argtypes = (ctypes.c_void_p,)
    found.ggml_backend_load_all()
    found.llama_backend_init()
    return found


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = [("n_tokens", ctypes.c_int32), *((f"p{number}", ctypes.c_void_p) for number in range(6))]


def context_parameters(llama: Any, context: int) -> _Struct:
    """The usual ones, with so much context and without flash attention.

    Raises:
        RuntimeError: they aren't laid out as this module knows them.
    """
    parameters = llama.llama_context_default_params()
    numbers = list(struct.unpack_from("<32i", bytes(parameters.data)))
    # n_ctx first, then more sizes, then the enumerations; that of flash attention is the last of these
    begin = numbers.index(USUAL)
    end = next(at for at in range(begin, 32) if numbers[at] != USUAL)
    if numbers[0] != 512 or numbers[1] != 2048 or numbers[2] != 512 or end - begin != 4:
        raise RuntimeError(f"llama_context_params has changed: {numbers}")
    struct.pack_into("<i", parameters.data, 0, context)
    struct.pack_into("<i", parameters.data, 4 * (end - 1), 0)
    return parameters


def main() -> None:
    """Measure."""
    path, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llama = library()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, context_parameters(llama, 512)) if model else None
    if not context:
        raise RuntimeError(f"llama.cpp can't load {path}")
    llama.llama_set_n_threads(context, threads, threads)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    seconds = 0.0
    for count in (16, tokens):  # the first round is for caches and the kernel
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        began = time.perf_counter()
        for _ in range(count):
            token = ctypes.c_int32(random.randrange(vocabulary))
            if llama.llama_decode(context, llama.llama_batch_get_one(ctypes.byref(token), 1)):
                raise RuntimeError("llama_decode failed")
            llama.llama_synchronize(context)
        seconds = time.perf_counter() - began
    print(json.dumps({"tokensPerSecond": tokens / seconds}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
