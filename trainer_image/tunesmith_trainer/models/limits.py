"""What a model has no weights for: tokens beyond its embeddings, positions behind its table. Called by `loop.inputs`.

Found in training, it would be an IndexError that names nothing, and on a GPU the end of the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_store import pretrained
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.tokenizers import padding_id

__all__ = ["check_positions", "check_tokens"]


def check_tokens(config: Mapping[str, Any], tokenizer: Any, largest: int, *, is_padded: bool = True) -> None:
    """Check that a model has embeddings for all tokens of its data and for the one that it is padded with, if it is.

    Args:
        config: the model's config.json.
        tokenizer: its tokenizer.
        largest: the largest token in the data.
        is_padded: whether examples are laid beside each other.

    Raises:
        UserError: it hasn't.
    """
    size = pretrained.vocabulary_size(config)
    token = max(largest, padding_id(tokenizer) if is_padded else 0)
    if size is None or token < size:
        return
    shown = tokenizer.convert_ids_to_tokens(token)
    message = (
        f"spec.model.uri: the tokenizer has the token {shown!r} (number {token}), and the model has embeddings for "
        f"{size} tokens only (vocab_size in config.json); use the tokenizer that belongs to it, or save the model "
        "with more embeddings: model.resize_token_embeddings(len(tokenizer))"
    )
    raise UserError(Reason.MODEL_INVALID, message)


def check_positions(config: Mapping[str, Any], longest: int) -> None:
    """Check that a model has positions for its longest example.

    Raises:
        UserError: it hasn't.
    """
    positions = pretrained.last_position(config)
    if positions is not None and longest > positions:
        message = (
            f"spec.training.maxLength: the longest example has {longest} tokens, and the model has positions for "
            f"{positions}; set it to {positions} or less"
        )
        raise UserError(Reason.INVALID_SPEC, message)
