"""The folder of the model that training begins with: fetched, and what its files say of it. No torch.

`assembly` and `training_process` fetch it, the memory estimate reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_store.files import fetch_model
from tunesmith_store.store import ObjectStore
from tunesmith_store.weights import stored_tensors

__all__ = ["Matrix", "ModelFacts", "fetch_base"]


def fetch_base(plan: TrainingPlan, store: ObjectStore, scratch: Path) -> Path:
    """Fetch the model's folder once per pod, without the weights where they begin at random; return where it is.

    Raises:
        UserError: there is no such model.
        Retryable: the store can't be reached, or the model is being rewritten.
    """
    return fetch_model(store, plan.model_uri, scratch / "model", weights=plan.model_init is Init.PRETRAINED)


@dataclass(frozen=True)
class Matrix:
    """The weights of one linear layer."""

    name: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


@dataclass(frozen=True)
class ModelFacts:
    """What the estimate has to know of a model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    attention: int
    """Width of all queries of a token together."""
    key_value: int
    """Width of all keys of a token together."""
    vocabulary: int
    matrices: tuple[Matrix, ...]
    """The linear layers in between: not the embeddings, not the output head."""
    stored_bytes: int = 4
    """Bytes of a weight on disk."""
    is_gated: bool = True
    """Whether the feed-forward part has a gate (Llama) or not (BERT)."""
    positions: int | None = None
    """Most tokens of an example, where the model or its images bound them."""

    @classmethod
    def of(cls, folder: Path) -> ModelFacts:
        """Read config.json and the headers of the safetensors files; where there are none, config.json must do."""
        config = json.loads((folder / "config.json").read_text())
        tensors = _headers(folder)
        inner: Mapping[str, Any] = config.get("text_config") or config
        hidden = _number(inner, ("hidden_size", "d_model", "n_embd", "dim"), 1)
        layers = _number(inner, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 1)
        layers += _number(inner, ("num_decoder_layers", "decoder_layers"), 0)
        heads = _number(inner, ("num_attention_heads", "n_head", "num_heads", "n_heads"), 1)
        size = _number(inner, ("head_dim", "d_kv"), max(1, hidden // max(1, heads)))
        key_value = size * _number(inner, ("num_key_value_heads",), heads)
        intermediate = _number(inner, ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "hidden_dim"), 4 * hidden)
        vocabulary = _number(inner, ("vocab_size",), 1)
        matrices = (
            _matrices(tensors) if tensors else _plain_matrices(layers, hidden, heads * size, key_value, intermediate)
        )
        tied = bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True)))
        guessed = sum(matrix.size for matrix in matrices) + vocabulary * hidden * (1 if tied else 2)
        return cls(
            parameters=sum(_count(shape) for _, shape, _ in tensors) if tensors else guessed,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            attention=heads * size,
            key_value=key_value,
            vocabulary=vocabulary,
            matrices=matrices,
            stored_bytes=max((width for _, _, width in tensors), default=4),
            is_gated=any("gate" in matrix.name or "wi_1" in matrix.name for matrix in matrices),
            positions=_positions(config, inner),
        )


def _number(config: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    found = next((config[name] for name in names if isinstance(config.get(name), int)), default)
    return int(found)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _positions(config: Mapping[str, Any], inner: Mapping[str, Any]) -> int | None:
    if isinstance(config.get("image_size"), int) and isinstance(config.get("patch_size"), int):
        return int((config["image_size"] // config["patch_size"]) ** 2 + 1)
    bound = inner.get("max_position_embeddings")
    return bound if isinstance(bound, int) and bound > 0 else None


def _headers(folder: Path) -> list[tuple[str, tuple[int, ...], int]]:
    """Return name, shape and bytes per number of all stored floating-point tensors."""
    widths = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
    return [
        (tensor.name, tensor.shape, widths[tensor.dtype]) for tensor in stored_tensors(folder) if tensor.dtype in widths
    ]


def _matrices(tensors: list[tuple[str, tuple[int, ...], int]]) -> tuple[Matrix, ...]:
    excluded = ("embed", "lm_head", "wte", "wpe", "shared", "norm", "output.weight")
    return tuple(
        Matrix(name.removesuffix(".weight"), shape[0], shape[1])
        for name, shape, _ in tensors
        if len(shape) == 2 and name.endswith(".weight") and "." in name.removesuffix(".weight")
        if not any(part in name.lower() for part in excluded[:-1]) or ".layer." in name or ".layers." in name
    )


def _plain_matrices(layers: int, hidden: int, attention: int, key_value: int, intermediate: int) -> tuple[Matrix, ...]:
    """The linear layers of a Llama of these sizes."""
    shapes = {
        "q_proj": (attention, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, attention),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return tuple(
        Matrix(f"layers.{number}.{name}", rows, columns)
        for number in range(layers)
        for name, (rows, columns) in shapes.items()
    )
