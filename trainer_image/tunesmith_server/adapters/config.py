"""What an adapter is, by its own files: read, and refused in words where an engine can't apply it. Called by `make`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tunesmith_api.keys import Reason
from tunesmith_api.memory.headers import StoredTensor
from tunesmith_server.quantizers.converter import json_of
from tunesmith_store.errors import UserError
from tunesmith_store.weights import stored_tensors

__all__ = ["CONFIG", "WEIGHTS", "Pair", "pairs_of", "scale_of"]

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
_KEY: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
MERGE: Final = "Merge it into the model (peft: merge_and_unload) and serve the result as a model of its own"

_REFUSED: Final[tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...]] = (
    (lambda it: it.get("peft_type") != "LORA", "it is no LoRA adapter (peft_type of its adapter_config.json)"),
    (lambda it: bool(it.get("use_dora")), "it is a DoRA adapter: engines add LoRA's product and know no magnitudes"),
    (
        lambda it: bool(it.get("modules_to_save")),
        "it replaces whole modules (modules_to_save), which an engine can't exchange for each request",
    ),
    (lambda it: it.get("bias", "none") != "none" or bool(it.get("lora_bias")), "it changes biases (bias, lora_bias)"),
    (lambda it: bool(it.get("trainable_token_indices")), "it changes embeddings (trainable_token_indices)"),
    (lambda it: bool(it.get("target_parameters")), "it adapts parameters that are no layers (target_parameters)"),
    (lambda it: bool(it.get("fan_in_fan_out")), "its matrices are of transposed layers (fan_in_fan_out)"),
    (lambda it: bool(it.get("alora_invocation_tokens")), "it is switched on by tokens of the prompt (aLoRA)"),
)


@dataclass(frozen=True)
class Pair:
    """One adapted layer: the shapes of its two matrices, and what their product is multiplied by."""

    module: str
    rank: int
    inputs: int
    outputs: int
    scale: float


def pairs_of(folder: Path) -> list[Pair]:
    """Return the layers that an adapter adapts, sorted by name.

    Raises:
        UserError: the folder holds no adapter, or one that can't be applied while the model is served.
    """
    config = json_of(folder / CONFIG)
    if not config or not (folder / WEIGHTS).is_file():
        raise _invalid(f"its folder must hold {CONFIG} and {WEIGHTS}, as PEFT writes them")
    for applies, what in _REFUSED:
        if applies(config):
            raise _invalid(f"{what}. {MERGE}")
    sides: dict[str, dict[str, StoredTensor]] = {}
    for tensor in stored_tensors(folder):
        found = _KEY.fullmatch(tensor.name)
        if found is None:
            raise _invalid(f"its weights hold {tensor.name}, which is no part of a LoRA of linear layers. {MERGE}")
        sides.setdefault(found["module"], {})[found["side"]] = tensor
    if not sides:
        raise _invalid(f"{WEIGHTS} is empty")
    return [_pair(module, sides[module], config) for module in sorted(sides)]


def _pair(module: str, sides: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Pair:
    if module.rpartition(".")[2] in {"embed_tokens", "wte", "word_embeddings"}:
        raise _invalid(f"it adapts the embeddings ({module}). {MERGE}")
    first, second = sides.get("A"), sides.get("B")
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        raise _invalid(f"of {module} it holds no two matrices lora_A and lora_B. {MERGE}")
    if first.shape[0] != second.shape[1]:
        raise _invalid(f"the matrices of {module} have different ranks ({first.shape[0]} and {second.shape[1]})")
    return Pair(module, first.shape[0], first.shape[1], second.shape[0], scale_of(module, first.shape[0], config))


def scale_of(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """Return what PEFT multiplies the product of a layer's matrices by: alpha / r, or alpha / sqrt(r)."""
    alpha = float(_of_pattern(module, config.get("alpha_pattern"), config.get("lora_alpha", rank)))
    return float(alpha / rank**0.5) if config.get("use_rslora") else alpha / rank


def _of_pattern(module: str, patterns: Any, default: Any) -> Any:
    """PEFT's rule: the first key that the end of the name matches, as a regular expression."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _invalid(what: str) -> UserError:
    return UserError(Reason.ADAPTER_INVALID, f"this adapter can't be served: {what}")
