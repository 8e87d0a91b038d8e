"""The shape of the model in a GGUF file: what the operator computes a server's memory from. Used by `gguf_files`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tunesmith_api.artifacts import ModelShape

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["shape_of", "value_of"]

KV_BYTES: Final = 2
"""Of each number in the KV cache, as the engine keeps it."""


def value_of(reader: GGUFReader, key: str, default: object = None) -> Any:
    """Return what the file says under a key."""
    field = reader.get_field(key)
    return field.contents() if field is not None else default


def shape_of(reader: GGUFReader) -> ModelShape:
    """Return the sizes of a model's layers, the largest where they differ."""
    architecture = str(value_of(reader, "general.architecture"))

    def each(key: str, layers: int) -> list[int]:
        found = value_of(reader, f"{architecture}.{key}", 0)
        return [int(it) for it in found] if isinstance(found, list) else [int(found)] * layers

    def one(key: str, default: int = 0) -> int:
        return int(value_of(reader, f"{architecture}.{key}", default))

    layers, width = one("block_count"), one("embedding_length")
    heads = max(each("attention.head_count", layers), default=0)
    usual = width // max(1, heads)
    key_length, value_length = one("attention.key_length", usual), one("attention.value_length", usual)
    kv_heads = each("attention.head_count_kv", layers)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    return ModelShape(
        kv_bytes_per_token=sum(kv_heads) * (key_length + value_length) * KV_BYTES,
        heads=heads,
        width=width,
        feed_forward=max(each("feed_forward_length", layers), default=0),
        vocabulary=len(tokens.data) if tokens is not None else 0,
    )
