"""Which tensor of a GGUF file gets which number format: llama.cpp's rules, as plain functions. Called by `gguf_files`.

They are those of `llama-quantize` (llama.cpp, src/llama-quant.cpp:
`tensor_allows_quantization`, `llama_tensor_get_type_impl`, `tensor_type_fallback`), so that a file of a method is what
people know under its name. One thing is simpler: a tensor's place in the model is the number in its name, where
llama.cpp counts tensors as it meets them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tunesmith_api.v1alpha1.quantization import QuantizationMethod as Method

__all__ = ["FILE_TYPES", "Choice", "Facts", "may_be_quantized", "type_of"]

FILE_TYPES: Final[Mapping[Method, tuple[int, str]]] = {
    Method.Q8_0: (7, "Q8_0"),
    Method.Q6_K: (18, "Q6_K"),
    Method.Q5_K_M: (17, "Q5_K"),
    Method.Q4_K_M: (15, "Q4_K"),
    Method.Q4_0: (2, "Q4_0"),
    Method.Q3_K_M: (12, "Q3_K"),
    Method.Q2_K: (10, "Q2_K"),
}
"""Method → `general.file_type` of its files, and the format that most of their tensors have."""

SUPER_BLOCK: Final = 256
"""Weights in a block of a K-quant; those of the others are of 32."""
BLOCK: Final = 32
_NARROW: Final = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_KEPT: Final = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "time_mix_first.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "attn_rel_b.weight", "indexer.proj.weight", ".position_embd", ".rel_pos",
    ".patch_embd", ".patch_merger",
)  # fmt: skip
_KEPT_MATRIX = re.compile(r"time_mix_[wvag][0-2]\.weight")
_EMBEDDINGS: Final = ("position_embd.weight", "token_types.weight")
_BLOCK_NUMBER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Facts:
    """What the rules have to know of the whole model."""

    architecture: str
    layers: int
    has_output: bool
    """Whether the output layer has weights of its own; else the token embeddings serve as such."""
    queries_per_key: int = 1
    experts: int = 0
    importance: bool = False
    """Whether there is an importance matrix."""


@dataclass(frozen=True)
class Choice:
    """The format that a rule wants, and the one that the tensor's width allows."""

    wanted: str
    chosen: str


def may_be_quantized(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor loses bits at all: matrices do, norms, gates and small special ones don't."""
    if sum(size > 1 for size in shape) < 2 or not name.endswith("weight"):
        return False
    return name not in _EMBEDDINGS and not any(part in name for part in _KEPT) and not _KEPT_MATRIX.search(name)


def type_of(name: str, columns: int, method: Method, facts: Facts) -> Choice:
    """Return the format of a tensor that may be quantized, `columns` weights wide."""
    wanted = _wanted(name, method, facts)
    chosen = wanted
    if columns % SUPER_BLOCK and chosen in _NARROW:
        chosen = _NARROW[chosen]
    if columns % BLOCK:
        chosen = "F16"
    return Choice(wanted, chosen)


def _wanted(name: str, method: Method, facts: Facts) -> str:
    default = FILE_TYPES[method][1]
    if method is Method.Q8_0:
        return default
    falcon = facts.architecture == "falcon"
    if name == "output.weight" or (name == "token_embd.weight" and not facts.has_output):
        return "Q8_0" if falcon else "Q6_K"
    found = _BLOCK_NUMBER.match(name)
    layer = int(found[1]) if found else 0
    if "attn_v.weight" in name:
        return _values(default, method, layer, facts)
    if "ffn_down" in name:
        if method is Method.Q4_0 and facts.importance and layer < facts.layers // 8:
            return "Q4_1"
        return _down(default, method, layer, facts.layers, falcon)
    if facts.experts == 8 and "attn_k.weight" in name:
        return "Q8_0"
    if "attn_output.weight" in name and not falcon:
        if facts.experts == 8 and method in {Method.Q2_K, Method.Q3_K_M, Method.Q4_K_M}:
            return "Q5_K"
        return {Method.Q2_K: "Q3_K", Method.Q3_K_M: "Q4_K"}.get(method, default) if facts.experts != 8 else default
    if "attn_qkv.weight" in name:
        return {Method.Q3_K_M: "Q4_K", Method.Q4_K_M: "Q5_K", Method.Q5_K_M: "Q6_K"}.get(method, default)
    return default


def _values(default: str, method: Method, layer: int, facts: Facts) -> str:
    """The values of attention are few where queries share them, and worth their bits."""
    chosen = default
    if method is Method.Q2_K:
        chosen = "Q4_K" if facts.queries_per_key >= 4 else "Q3_K"
    elif method is Method.Q3_K_M:
        chosen = "Q5_K" if layer < 2 else "Q4_K"
    elif method in {Method.Q4_K_M, Method.Q5_K_M} and _gets_more(layer, facts.layers):
        chosen = "Q6_K"
    if facts.layers == 80 and facts.queries_per_key == 8 and chosen in {"Q3_K", "Q4_K"}:
        chosen = "Q5_K"  # the 70B models
    return "Q8_0" if facts.experts == 8 else chosen


def _down(default: str, method: Method, layer: int, layers: int, falcon: bool) -> str:
    if method is Method.Q2_K:
        return "Q3_K"
    more = _gets_more(layer, layers)
    if method is Method.Q3_K_M:
        if layer < layers // 16:
            return "Q5_K"
        return "Q3_K" if falcon and not more else "Q4_K"
    if method is Method.Q4_K_M and falcon:
        return "Q6_K" if layer < layers // 16 else "Q5_K" if more else "Q4_K"
    return "Q6_K" if method in {Method.Q4_K_M, Method.Q5_K_M} and more else default


def _gets_more(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third in between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
