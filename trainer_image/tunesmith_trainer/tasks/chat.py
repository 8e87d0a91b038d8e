"""Conversations as tokens: the chat template, and which tokens the assistant said. Used by `tasks`.

The loss counts an assistant turn's content and its end-of-turn token, so that the model learns to stop; it does not
count what the template puts in front of the turn, nor white space behind the end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith_trainer.tasks.base import IGNORE

__all__ = ["EncodedChat", "TemplateError", "assistant_spans", "encode_chat"]

Message = dict[str, Any]
Span = tuple[int, int]


class TemplateError(Exception):
    """The chat template can't render this conversation, or hides which part of it the assistant said."""


@dataclass(frozen=True)
class EncodedChat:
    """One example: tokens, and their labels (IGNORE where the loss doesn't count), of equal length."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts. The first token can't be predicted from anything."""
        return sum(label != IGNORE for label in self.labels[1:])


def _render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template may raise what it likes
        raise TemplateError(f"the model's chat template refuses the conversation: {error}") from error


def _end_of_turn(text: str, special: Sequence[str]) -> int:
    """Return where a turn ends: behind its end-of-turn token, where only white space follows that."""
    kept = text.rstrip()
    return len(kept) if any(kept.endswith(token) for token in special) else len(text)


def assistant_spans(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """Render a conversation and find the character spans that the assistant says.

    A turn's span is what its rendering adds to the prompt in front of it. A template that rewrites earlier turns (many
    reasoning models drop old thoughts) makes that impossible for those turns: then only the last assistant turn counts,
    and the text ends with it.

    Raises:
        TemplateError: not even the last assistant turn can be told from its prompt.
    """
    special = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
    text = _render(tokenizer, messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]

    def span(index: int) -> tuple[Span, str] | None:
        prompt = _render(tokenizer, messages[:index], prompt=True)
        whole = _render(tokenizer, messages[: index + 1])
        if not whole.startswith(prompt):
            return None
        return (len(prompt), len(prompt) + _end_of_turn(whole[len(prompt) :], special)), whole

    found = [span(index) for index in turns]
    if all(item is not None and text.startswith(item[1]) for item in found):
        return text, [item[0] for item in found if item is not None]
    if found and (last := found[-1]) is not None:
        return last[1], [last[0]]
    raise TemplateError(
        "the model's chat template doesn't show where the assistant's turn begins; mark it with {% generation %} and "
        "{% endgeneration %} in the template"
    )


def _has_generation_marks(tokenizer: Any) -> bool:
    return isinstance(tokenizer.chat_template, str) and bool(
        re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template)
    )


def encode_chat(tokenizer: Any, messages: Sequence[Message], max_length: int) -> EncodedChat:
    """Render and tokenize a conversation, cut at `max_length` tokens, and label the assistant's tokens.

    Raises:
        TemplateError: the template can't render it, or hides which part the assistant said.
    """
    if _has_generation_marks(tokenizer):
        try:
            out = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:  # a template may raise what it likes
            raise TemplateError(f"the model's chat template refuses the conversation: {error}") from error
        ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    else:
        text, spans = assistant_spans(tokenizer, messages)
        # the template has put the special tokens in already
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(out["input_ids"])
        mask = [
            any(start < high and end > low and end > start for low, high in spans)
            for start, end in out["offset_mapping"]
        ]
    labels = [token if spoken else IGNORE for token, spoken in zip(ids, mask, strict=True)]
    return EncodedChat(ids[:max_length], labels[:max_length], truncated=len(ids) > max_length)
