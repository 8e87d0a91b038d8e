"""A model's folder, loaded by transformers from its own safetensors and without its code. For trainer and server.

transformers itself is imported where something is loaded: processes that load nothing go without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError

__all__ = ["last_position", "load_model", "load_tokenizer", "position_limit", "reads_images", "vocabulary_size"]

OFFSET_POSITIONS = frozenset(
    {
        "camembert",
        "data2vec-text",
        "esm",
        "ibert",
        "lilt",
        "longformer",
        "luke",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""Model types whose first position has the number after the padding token's: they have so many fewer."""


def load_model(auto_class: Any, folder: Path, failed: str, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """Load a model; return it with transformers' record of the weights that were missing or didn't fit.

    `failed` begins the message.

    Raises:
        UserError: transformers can't load it.
    """
    try:
        model, found = auto_class.from_pretrained(
            folder,
            **options,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a broken folder makes transformers raise
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        raise UserError(Reason.MODEL_INVALID, f"{failed}: {error}") from error
    return model, found


def load_tokenizer(folder: Path, name: str) -> Any:
    """Load a fast tokenizer; `name` is what messages call it.

    Raises:
        UserError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise UserError(Reason.MODEL_INVALID, f"{name} can't be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(Reason.MODEL_INVALID, f"{name} has no fast form (tokenizer.json)")
    return tokenizer


LEARNED_POSITIONS = frozenset(
    {
        "biogpt",
        "ctrl",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "openai-gpt",
        "opt",
    }
)
"""Decoders with a table of positions: behind its end there is nothing."""


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Return for how many tokens a model has embeddings, by its config.json; None where that doesn't say."""
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) and size > 0 else None


def last_position(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model has a table of positions for, by its config.json; None where it needs none."""
    if config.get("model_type") not in LEARNED_POSITIONS:
        return None
    positions = config.get("n_positions", config.get("max_position_embeddings"))
    return positions if isinstance(positions, int) and positions > 0 else None


def reads_images(config: Mapping[str, Any]) -> bool:
    """Say, by its config.json, whether a language model reads images beside text."""
    return "vision_config" in config


def position_limit(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model has positions for, by its config.json; None where that doesn't say."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.get("model_type") in OFFSET_POSITIONS:
        positions -= int(config.get("pad_token_id") or 0) + 1
    return positions
