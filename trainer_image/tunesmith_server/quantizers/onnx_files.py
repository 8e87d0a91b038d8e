"""The family of ONNX files, for classifiers and encoders: exported once, then 8 bits per weight by ONNX Runtime.

Weights are rounded for each output channel on its own, and to 7 of their 8 bits: CPUs without VNNI add pairs of
products in 16 bits, which would overflow. Activations are rounded while it computes, but for those behind a GELU, where
that was half of the error: the second matrix of each feed-forward part keeps its 32 bits.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.predict.backends import load_model
from tunesmith_server.predict.kinds import ONNX_FILE, ModelKind, kind_of
from tunesmith_server.predict.texts import TOKENIZER
from tunesmith_server.quantizers.base import PLAIN, Made, Options, weights_in
from tunesmith_server.quantizers.ignored import matching
from tunesmith_server.quantizers.safetensors_files import copy_others
from tunesmith_store.errors import UserError
from tunesmith_store.pretrained import load_tokenizer

if TYPE_CHECKING:
    import onnx

__all__ = ["OnnxQuantizer"]

KINDS = (ModelKind.TEXT_CLASSIFIER, ModelKind.TOKEN_CLASSIFIER, ModelKind.ENCODER)
TOOLS = ("onnxruntime", "onnxscript", "torch", "transformers")
SAMPLES = ["A text to trace the model with.", "Another one."]


class OnnxQuantizer:
    """One source through ONNX Runtime."""

    def __init__(self, source: Path, scratch: Path, threads: int) -> None:
        """Nothing is exported before a method is asked for."""
        self._source, self._scratch, self._threads = source, scratch, threads

    def make(self, method: QuantizationMethod, folder: Path, options: Options = PLAIN) -> Made:
        """Write `model.onnx` beside the tokenizer.

        Raises:
            UserError: the model is of another kind, or can't be exported.
        """
        kind = kind_of(self._source)
        if kind not in KINDS:
            message = (
                f"the model is {kind}, and method {method} of the engine Transformers is for classifiers of texts and "
                "words, for encoders and for language models: set spec.quantization.method: None"
            )
            raise UserError(Reason.MODEL_INVALID, message)
        ignored = matching(self._source, options.ignore)
        self._scratch.mkdir(parents=True, exist_ok=True)
        exact = self._scratch / "exact.onnx"
        _export(self._source, kind, exact, self._threads)
        copy_others(self._source, folder)
        model = _quantize(exact, folder / ONNX_FILE, ignored)
        return Made(
            weights=weights_in(self._source),
            tensor_types=_types(model),
            fallbacks={},
            tools={name: version(name) for name in TOOLS},
            ignored=ignored,
        )


def _export(source: Path, kind: ModelKind, path: Path, threads: int) -> None:
    """Write the model's arithmetic with weights of 32 bits."""
    import torch

    model = load_model(source, kind, threads).to(torch.float32)
    model.set_attn_implementation("eager")  # the others' shortcuts become many small operations
    model.config.use_cache = False
    output = "last_hidden_state" if kind is ModelKind.ENCODER else "logits"
    features: Mapping[str, torch.Tensor] = load_tokenizer(source, TOKENIZER)(SAMPLES, padding=True, return_tensors="pt")
    names = list(features)

    class Traced(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            return getattr(self.model(**dict(zip(names, values, strict=True))), output)

    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Traced().eval(),
                tuple(features.values()),
                input_names=names,
                output_names=[output],
                dynamic_shapes=((any_size,) * len(names),),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        program.save(path, external_data=True)
    except Exception as error:  # whatever a model's own code makes the exporter raise
        first = str(error).strip().splitlines() or [type(error).__name__]
        message = f"the model can't be exported to ONNX ({first[0]}): set spec.quantization.method: None"
        raise UserError(Reason.MODEL_INVALID, message) from error


def _quantize(exact: Path, output: Path, ignored: Sequence[str]) -> onnx.ModelProto:
    """Write the quantized model, without what differs from run to run, and return it."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().disabled = True  # it advises everybody to optimize first, which changes nothing here
    try:
        quantize_dynamic(
            exact,
            output,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*_after_gelu(exact), *_of_modules(exact, ignored)],
        )
    finally:
        logging.getLogger().disabled = False
    model = onnx.load(output)
    for node in model.graph.node:  # where in which file of this machine each operation comes from
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    output.write_bytes(model.SerializeToString(deterministic=True))
    return model


def _after_gelu(path: Path) -> list[str]:
    """Return the matrix products that read what GELU leaves: its few large numbers would leave 8 bits to no others."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    outputs = {output for node in nodes if node.op_type == "Gelu" for output in node.output}
    return [node.name for node in nodes if node.op_type in ("MatMul", "Gemm") and outputs & set(node.input)]


def _of_modules(path: Path, modules: Sequence[str]) -> list[str]:
    """Return the operations of these modules.

    Raises:
        UserError: one has none.
    """
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    found = []
    for module in modules:
        of_it = [node.name for node in nodes if module in _scopes(node)]
        if not of_it:
            message = f"quantization.ignore: {module} has no operation of its own in the model's ONNX form"
            raise UserError(Reason.INVALID_SPEC, message)
        found += of_it
    return found


def _scopes(node: onnx.NodeProto) -> set[str]:
    """Names of the modules that an operation stands in, as the exporter has noted them."""
    noted = {it.key: it.value for it in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    return {str(name).removeprefix("model.") for name in ast.literal_eval(noted)}


def _types(model: onnx.ModelProto) -> dict[str, int]:
    import onnx

    names = onnx.TensorProto.DataType
    found = Counter(names.Name(it.data_type) for it in model.graph.initializer if len(it.dims) > 1)
    return dict(sorted(found.items()))
