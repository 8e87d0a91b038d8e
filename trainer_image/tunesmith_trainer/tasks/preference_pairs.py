"""Preferences: from a row in any of the forms that are around to the tokens of a better and a worse answer.

Used by `preference`. `read_pair` needs no torch; `PairEncoder` needs a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith_api.v1alpha1.dataset import Columns
from tunesmith_trainer.tasks.base import IGNORE, BadRow, Row
from tunesmith_trainer.tasks.chat import TemplateError, encode_chat
from tunesmith_trainer.tasks.conversations import read_message

__all__ = ["SIDES", "Pair", "PairEncoder", "Side", "read_pair", "shared_length"]

Turns = Sequence[Mapping[str, Any]]
Text = str | Turns

SIDES = ("chosen", "rejected")
"""The better answer comes first, everywhere."""
UNCUT = 2**62


@dataclass(frozen=True)
class Pair:
    """A preference: what was asked, the better and the worse answer. All three are texts, or all are lists of turns."""

    prompt: Text
    chosen: Text
    rejected: Text
    templated: bool
    """Whether the model's chat template goes around them: not where texts hold a whole dialogue already."""


def read_pair(row: Row, columns: Columns) -> Pair:
    """Read a preference in any of the forms that are around.

    Answers are texts or lists of messages; the lists hold the answer alone or the whole conversation. The prompt is a
    text, a list of messages, or left out: then it is what both answers begin with.

    Raises:
        BadRow: fields are missing, of the wrong kind, or hold no preference.
    """
    chosen = _answer_field(row, columns.chosen, "chosen")
    rejected = _answer_field(row, columns.rejected, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        text, turns = (columns.chosen, columns.rejected)[:: 1 if isinstance(chosen, str) else -1]
        raise BadRow(f"field {text!r} is a text but {turns!r} a list of messages; give both in the same form")
    if chosen == rejected:
        message = (
            f"fields {columns.chosen!r} and {columns.rejected!r} are the same, which is no preference; remove the row"
        )
        raise BadRow(message)
    prompt = _prompt_field(row, columns.prompt)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _pair_of_texts(prompt, chosen, rejected)
    assert not isinstance(chosen, str)
    assert not isinstance(rejected, str)
    return _pair_of_turns(prompt, chosen, rejected, columns)


def _pair_of_texts(prompt: Text | None, chosen: str, rejected: str) -> Pair:
    if prompt is None:
        shared = shared_length(chosen, rejected)
        # a word that both begin alike belongs to the answers
        while shared and not chosen[shared - 1].isspace():
            shared -= 1
        return Pair(chosen[:shared], chosen[shared:], rejected[shared:], templated=False)
    if isinstance(prompt, str):
        return Pair(prompt, chosen, rejected, templated=True)
    return Pair(prompt, [_turn("assistant", chosen)], [_turn("assistant", rejected)], templated=True)


def _pair_of_turns(prompt: Text | None, chosen: Turns, rejected: Turns, columns: Columns) -> Pair:
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        prompt = [_turn("user", prompt)]
    if prompt is None or isinstance(prompt, str):
        # the conversations are whole; a prompt that is given as text repeats what they begin with
        shared = shared_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    elif list(chosen[: len(prompt)]) == list(rejected[: len(prompt)]) == list(prompt):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, turns in ((columns.chosen, chosen), (columns.rejected, rejected)):
        if not any(turn["role"] == "assistant" for turn in turns):
            raise BadRow(f"field {name!r} has no assistant message behind what both begin with: nothing to prefer")
    return Pair(prompt, chosen, rejected, templated=True)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _as_turns(text: Text, role: str) -> list[dict[str, Any]]:
    return [_turn(role, text)] if isinstance(text, str) else [dict(turn) for turn in text]


def shared_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def _answer_field(row: Row, column: str, setting: str) -> Text:
    if row.get(column) is None:
        names = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow(f"has no field {column!r} (its fields: {names}); set spec.dataset.columns.{setting}")
    return _text_or_turns(row[column], column)


def _prompt_field(row: Row, column: str) -> Text | None:
    return None if row.get(column) is None else _text_or_turns(row[column], column)


def _text_or_turns(value: Any, column: str) -> Text:
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"field {column!r} is empty; remove the row")
        return value
    if not isinstance(value, Sequence) or not value:
        raise BadRow(f"field {column!r} must be a text or a list of at least one message")
    return [read_message(message, f"field {column!r}: message {number}") for number, message in enumerate(value, 1)]


@dataclass(frozen=True)
class Side:
    """Prompt and one answer as tokens; labels are IGNORE for the prompt."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def is_learned(self) -> bool:
        return any(label != IGNORE for label in self.labels[1:])


class PairEncoder:
    """Turns pairs into tokens."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def sides(self, pair: Pair) -> tuple[Side, Side]:
        """Return the chosen and the rejected side.

        Raises:
            BadRow: the tokenizer can't render them.
        """
        has_template = bool(self.tokenizer.chat_template)
        if isinstance(pair.prompt, str) and not (pair.templated and has_template):
            return self._plain(pair.prompt, str(pair.chosen)), self._plain(pair.prompt, str(pair.rejected))
        if not has_template:
            raise BadRow(
                "holds messages, but the model's tokenizer has no chat template; give prompt, chosen and rejected as "
                "texts, or use a model that has one (ChatSFT gives it one)"
            )
        prompt = _as_turns(pair.prompt, "user")
        chosen, rejected = (_as_turns(answer, "assistant") for answer in (pair.chosen, pair.rejected))
        return self._templated(prompt, chosen), self._templated(prompt, rejected)

    def _plain(self, prompt: str, answer: str) -> Side:
        """One text behind the other, as they are, and the end of the sequence."""
        out = self.tokenizer(prompt + answer, return_offsets_mapping=True, verbose=False)
        ids = list(out["input_ids"])
        labels = [
            token if end > len(prompt) else IGNORE for token, (_, end) in zip(ids, out["offset_mapping"], strict=True)
        ]
        last = self.tokenizer.eos_token_id
        if last is not None:
            if ids and ids[-1] == last:
                labels[-1] = last
            else:
                ids, labels = [*ids, last], [*labels, last]
        return self._cut(ids, labels)

    def _templated(self, prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> Side:
        try:
            # where turns are examples of their own, the answer is the last one
            whole = encode_chat(self.tokenizer, [*prompt, *answer], UNCUT)[-1]
            labels = whole.labels
            if any(turn["role"] == "assistant" for turn in prompt):
                # what the assistant said before is no part of the answer
                context = encode_chat(self.tokenizer, prompt, UNCUT)[-1].input_ids
                shared = shared_length(context, whole.input_ids)
                labels = [IGNORE] * shared + labels[shared:]
        except TemplateError as error:
            raise BadRow(f"can't be used: {error}") from error
        return self._cut(whole.input_ids, labels)

    def _cut(self, ids: list[int], labels: list[int]) -> Side:
        longest = self.max_length
        return Side(ids[:longest], labels[:longest], truncated=len(ids) > longest)
