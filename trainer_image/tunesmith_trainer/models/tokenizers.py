"""Tokenizers: loading one, its chat template, its padding, and texts as tokens. Called by the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_store import pretrained
from tunesmith_store.errors import UserError

__all__ = ["CHATML", "ensure_chat_template", "load_tokenizer", "padding_id", "tokenize"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + 'END_OF_TURN' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

FEATURES = ("input_ids", "token_type_ids")


def load_tokenizer(folder: Path, chat: bool = True) -> Any:
    """Load the tokenizer; for `chat` with a chat template (ChatML where it has none).

    Raises:
        UserError: it can't be loaded.
    """
    tokenizer = pretrained.load_tokenizer(folder, "spec.model.uri: the tokenizer")
    if chat and ensure_chat_template(tokenizer):
        print("the tokenizer has no chat template: using ChatML, which is saved with the model", flush=True)
    return tokenizer


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template the ChatML one; return whether that was needed.

    Raises:
        UserError: the tokenizer has neither `<|im_end|>` nor an end-of-sequence token to end a turn with.
    """
    if tokenizer.chat_template:
        return False
    end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
    if not end:
        message = "spec.model.uri: the tokenizer has no chat template and no end-of-sequence token; add a chat_template"
        raise UserError(Reason.MODEL_INVALID, message)
    tokenizer.chat_template = CHATML.replace("END_OF_TURN", end)
    return True


def padding_id(tokenizer: Any) -> int:
    """Return a token id to pad with; it is masked wherever it is used."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def tokenize(
    tokenizer: Any, text: str | Sequence[str], pair: str | None, longest: int
) -> tuple[dict[str, Any], Any, bool]:
    """Tokenize one text, a pair of them, or one that is split into words, with the model's special tokens.

    Of a pair that is too long, the longer text is cut first. The tokenizer must be a fast one.

    Returns:
        `input_ids` (and `token_type_ids`, where the model has them); the tokenizer's own encoding, which knows the word
        of each token; whether something was cut off.
    """
    found = tokenizer(
        text, pair, truncation=True, max_length=longest, is_split_into_words=not isinstance(text, str), verbose=False
    )
    features = {name: list(found[name]) for name in FEATURES if name in found}
    return features, found, bool(found.encodings[0].overflowing)
