"""What the estimate has to know of a model, read from its config.json and its files' headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tunesmith_api.memory.headers import StoredTensor

__all__ = ["Matrix", "ModelFacts"]

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""Of the formats that count as weights."""
_NAMED = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""What config.json calls them."""
_HEADS = ("lm_head.", "embed_out.", "cls.predictions.", "score.", "classifier.")
"""What follows the body: a task with another head loads none of it."""
_NO_MATRICES = ("embed", "lm_head", "wte", "wpe", "shared", "norm")


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
    """Sizes of a model."""

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
    heads: int = 1
    """Query heads of a layer."""
    head_parameters: int = 0
    """Of `parameters`, those of the stored output head."""
    is_tied: bool = False
    """Whether the output head is the embeddings."""
    stored_bytes: int = 4
    """Bytes of a weight on disk."""
    is_gated: bool = True
    """Whether the feed-forward part has a gate (Llama) or not (BERT)."""
    positions: int | None = None
    """Most tokens of an example, where the model or its images bound them."""
    dropout: float = 0.0
    """Of hidden states."""
    attention_dropout: float = 0.0
    is_measured: bool = True
    """Whether the files' headers were there; otherwise sizes are those of a Llama with such a config.json."""

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Iterable[StoredTensor]) -> ModelFacts:
        """Read config.json and the tensors that the headers name; where there are none, config.json must do."""
        stored = [tensor for tensor in tensors if tensor.dtype in _BYTES]
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
            _matrices(stored) if stored else _plain_matrices(layers, hidden, heads * size, key_value, intermediate)
        )
        tied = bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True)))
        guessed = sum(matrix.size for matrix in matrices) + vocabulary * hidden * (1 if tied else 2)
        head = sum(prod(tensor.shape) for tensor in stored if tensor.name.startswith(_HEADS))
        return cls(
            parameters=sum(prod(tensor.shape) for tensor in stored) if stored else guessed,
            layers=layers,
            hidden=hidden,
            intermediate=intermediate,
            attention=heads * size,
            key_value=key_value,
            vocabulary=vocabulary,
            matrices=matrices,
            heads=heads,
            head_parameters=head if stored else 0 if tied else vocabulary * hidden,
            is_tied=head < vocabulary * hidden if stored else tied,
            stored_bytes=max((_BYTES[tensor.dtype] for tensor in stored), default=_named_bytes(config)),
            is_gated=any("gate" in matrix.name or "wi_1" in matrix.name for matrix in matrices),
            positions=_positions(config, inner),
            dropout=_part(inner, ("hidden_dropout_prob", "resid_pdrop", "dropout", "dropout_rate")),
            attention_dropout=_part(inner, ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")),
            is_measured=bool(stored),
        )


def _number(config: Mapping[str, Any], names: tuple[str, ...], default: int) -> int:
    found = next((config[name] for name in names if isinstance(config.get(name), int)), default)
    return int(found)


def _part(config: Mapping[str, Any], names: tuple[str, ...]) -> float:
    return next((float(config[name]) for name in names if isinstance(config.get(name), int | float)), 0.0)


def _named_bytes(config: Mapping[str, Any]) -> int:
    return _NAMED.get(str(config.get("dtype") or config.get("torch_dtype")), 4)


def _positions(config: Mapping[str, Any], inner: Mapping[str, Any]) -> int | None:
    if isinstance(config.get("image_size"), int) and isinstance(config.get("patch_size"), int):
        return int((config["image_size"] // config["patch_size"]) ** 2 + 1)
    bound = inner.get("max_position_embeddings")
    return bound if isinstance(bound, int) and bound > 0 else None


def _matrices(tensors: Sequence[StoredTensor]) -> tuple[Matrix, ...]:
    return tuple(
        Matrix(tensor.name.removesuffix(".weight"), tensor.shape[0], tensor.shape[1])
        for tensor in tensors
        if len(tensor.shape) == 2 and tensor.name.endswith(".weight") and "." in tensor.name.removesuffix(".weight")
        if not any(part in tensor.name.lower() for part in _NO_MATRICES)
        or ".layer." in tensor.name
        or ".layers." in tensor.name
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
