"""Conversations as tokens: the chat template, and which tokens the assistant said. Used by `tasks`.

The loss counts an assistant turn's content and what ends it, so that the model learns to stop; it does not count what
the template puts in front of the turn, nor white space behind its end. A turn is learned behind the very prompt that
the template makes for it when the model is asked: where a template writes a conversation otherwise once it goes on,
the conversation becomes several examples.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tunesmith_trainer.tasks.base import IGNORE

__all__ = ["EncodedChat", "Rendering", "TemplateError", "encode_chat", "renderings", "spoken_runs"]

Message = dict[str, Any]
Span = tuple[int, int]

OPENED = re.compile(r"\s*<((?:[a-z]+:)?(?:think|thinking|thought|reasoning))>\s*$")
"""The beginning of thoughts, at the end of a prompt."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
APART = (
    "one text by the model's chat template doesn't hold all turns as they are asked for: turns became examples of "
    "their own, each behind its own prompt"
)
ENDED = "the model's chat template writes no end of a turn that is one token: {end} was put behind what is learned"
ENDLESS = (
    "the model's chat template writes no end of a turn, and the tokenizer has no end-of-sequence token: the model will "
    "not learn to stop"
)
ENDS_LEFT = "the ends of earlier turns are not learned: the model's chat template writes none that is one token"
REOPENED = (
    "the model's chat template opens <{tag}> in the prompt only: answers without thoughts are learned with {closing} "
    "before them"
)
HIDDEN = "the model's chat template doesn't show where these turns begin: they are not learned"


class TemplateError(Exception):
    """The chat template can't render this conversation, or hides which part of it the assistant said."""


@dataclass(frozen=True)
class Rendering:
    """A conversation, or the part of it up to one turn, as text; and the characters that are learned."""

    text: str
    spans: tuple[Span, ...]
    messages: int
    """How many of the conversation's messages it holds."""
    notes: tuple[str, ...] = ()
    """What was done to it so that it can be learned, for people."""


@dataclass(frozen=True)
class EncodedChat:
    """One example: tokens, and their labels (IGNORE where the loss doesn't count), of equal length."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    turns: int = 0
    """The assistant's turns that are learned."""
    unlearned: int = 0
    """Those that the cut took, or that can't be learned."""
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts. The first token can't be predicted from anything."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class _Turn:
    """One turn of the assistant, rendered as the last of its conversation."""

    text: str
    place: int
    start: int
    end: int
    ended: bool
    """Whether a token ends it."""
    notes: tuple[str, ...] = ()
    rebuilt: bool = False
    """Whether the text is other than the template's."""

    @property
    def span(self) -> Span:
        return self.start, self.end


@dataclass(frozen=True)
class _Conversation:
    tokenizer: Any
    messages: Sequence[Message]
    arguments: Mapping[str, Any]

    def render(self, messages: Sequence[Message], *, prompt: bool = False, **arguments: Any) -> str:
        return str(self._applied(messages, tokenize=False, add_generation_prompt=prompt, **arguments))

    def _applied(self, messages: Sequence[Message], **arguments: Any) -> Any:
        # a message without something and one in which it is null are the same, but not to every template
        bare = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(bare, **{**self.arguments, **arguments})
        except Exception as error:  # a template may raise what it likes
            raise TemplateError(f"the model's chat template refuses the conversation: {error}") from error

    def marked_tokens(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return the tokens, and 1 for those that the template marks as the assistant's."""
        out = self._applied(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), list(out["assistant_masks"])

    @cached_property
    def special_ids(self) -> set[int]:
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    def marked_end(self) -> int | None:
        """Return the token that ends a turn behind the template's mark; None where none does."""
        last = max((place for place, message in enumerate(self.messages) if message["role"] == "assistant"), default=-1)
        ids, mask = self.marked_tokens(self.messages[: last + 1])
        runs = _runs(mask)
        behind = ids[runs[-1][1] :] if runs else []
        return behind[0] if behind and behind[0] in self.special_ids else None

    @cached_property
    def special(self) -> list[str]:
        return sorted(set(self.tokenizer.all_special_tokens), key=len, reverse=True)

    @cached_property
    def ends(self) -> set[str]:
        """Tokens that can end a turn: all that aren't made of text."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {*self.special, *(str(token) for token in added.values())}

    @cached_property
    def turns(self) -> list[int]:
        """Places of the assistant's messages that are to be learned."""
        return [place for place, message in enumerate(self.messages) if _is_learned(message)]

    def end_of_turn(self, text: str) -> int:
        """Return where a turn ends: behind its end-of-turn token, where only white space follows that."""
        kept = text.rstrip()
        return len(kept) if any(kept.endswith(token) for token in self.special) else len(text)

    def is_ended(self, text: str) -> bool:
        kept = text.rstrip()
        return any(kept.endswith(token) for token in self.special) or any(kept.endswith(token) for token in self.ends)

    @cached_property
    def opening(self) -> str:
        """What the template puts in front of a turn of the assistant's that it is to write."""
        in_parts = isinstance(self.messages[0]["content"], list)
        asked = [{"role": "user", "content": [{"type": "text", "text": "?"}] if in_parts else "?"}]
        return self.render(asked, prompt=True).removeprefix(self.render(asked))

    def prompt(self, place: int, whole: str) -> str:
        """Return what the model is given before it says a turn."""
        if any(message["role"] in ("user", "tool") for message in self.messages[:place]):
            return self.render(self.messages[:place], prompt=True)
        # before anybody has asked anything, many templates have no prompt
        opened = OPENED.search(self.opening)
        head = self.opening[: opened.start()] if opened else self.opening
        found = whole.rfind(head) if head.strip() else -1
        if found < 0:
            raise TemplateError("it is not shown where the assistant's turn begins")
        return whole[:found] + self.opening

    def turn(self, place: int) -> _Turn | None:
        """Render the conversation up to a turn; None where it isn't shown where that begins."""
        whole = self.render(self.messages[: place + 1])
        try:
            prompt = self.prompt(place, whole)
        except TemplateError:
            if any(message["role"] == "user" for message in self.messages[:place]):
                raise
            return None
        if whole.startswith(prompt):
            said = whole[len(prompt) :]
            return _Turn(whole, place, len(prompt), len(prompt) + self.end_of_turn(said), self.is_ended(said))
        opened = OPENED.search(prompt)
        if opened is None or not whole.startswith(prompt[: opened.start()]):
            return None
        return self.reopened(place, prompt, opened[1], whole[opened.start() :])

    def reopened(self, place: int, prompt: str, tag: str, said: str) -> _Turn:
        """A turn of a template that opens thoughts in its prompt and leaves them out of what was said."""
        closing = f"</{tag}>"
        notes: tuple[str, ...] = ()
        if said.lstrip().startswith(f"<{tag}>"):
            body = said.lstrip().removeprefix(f"<{tag}>").lstrip("\n")
        elif closing in said:
            body = said.lstrip()
        else:
            thoughts = _thoughts(self.messages[place], tag)
            if not thoughts:
                notes = (REOPENED.format(tag=tag, closing=closing),)
            body = f"{thoughts}\n{closing}\n\n{said.lstrip()}"
        text = prompt + body
        end = len(prompt) + self.end_of_turn(body)
        return _Turn(text, place, len(prompt), end, self.is_ended(body), notes, rebuilt=True)

    def with_end(self, turn: _Turn) -> _Turn:
        """Put the tokenizer's end behind a turn that the template leaves open."""
        end = self.tokenizer.eos_token
        if turn.ended:
            return turn
        if not end:
            return replace(turn, notes=(*turn.notes, ENDLESS))
        said = turn.text[turn.start :].rstrip()
        text = turn.text[: turn.start] + said + end
        return replace(turn, text=text, end=len(text), notes=(*turn.notes, ENDED.format(end=end)))

    def check(self) -> None:
        """Check that the template shows what the conversation has beside texts.

        Raises:
            TemplateError: it doesn't: the model would learn what it is never shown.
        """
        told = self.messages
        if self.arguments.get("tools") and self.render(told) == self.render(told, tools=None):
            raise TemplateError(
                "the model's chat template doesn't show tools; use a model whose template does, or remove them from "
                "the row"
            )
        calling = [message.get("tool_calls") for message in told]
        silent = [{name: value for name, value in message.items() if name != "tool_calls"} for message in told]
        if any(calling) and self.render(told) == self.render(silent):
            raise TemplateError(
                "the model's chat template doesn't show tool calls; use a model whose template does, or write them "
                "into the content"
            )


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0


def _thoughts(message: Message, tag: str) -> str:
    for name in THOUGHTS:
        if isinstance(message.get(name), str):
            return str(message[name]).strip("\n")
    before, closing, _ = str(message.get("content") or "").partition(f"</{tag}>")
    return before.strip().removeprefix(f"<{tag}>").strip("\n") if closing else ""


def renderings(
    tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any] | None = None
) -> list[Rendering]:
    """Render a conversation, and find the character spans that are learned: one rendering mostly, of all of it.

    A turn's span is what its rendering adds to the prompt in front of it. Turns that a rendering of the whole doesn't
    hold as they were asked for (many reasoning models drop old thoughts) have renderings of their own.

    Args:
        tokenizer: has the template.
        messages: the conversation.
        arguments: what else the template is given: tools, and settings of its own.

    Raises:
        TemplateError: no turn can be told from its prompt, or the template hides what the conversation has.
    """
    chat = _Conversation(tokenizer, messages, arguments or {})
    text = chat.render(messages)
    chat.check()
    found = {place: chat.turn(place) for place in chat.turns}
    left = [turn for turn in found.values() if turn is not None]
    if not left:
        raise TemplateError(
            "the model's chat template doesn't show where the assistant's turn begins; mark it with {% generation %} "
            "and {% endgeneration %} in the template"
            if found
            else "no assistant message is to be learned: all have weight 0"
        )
    done: list[Rendering] = []
    while left:
        last = chat.with_end(left[-1])
        # what follows the last turn stays, as long as nothing in front of it has changed
        whole = text if not last.rebuilt and left[-1].ended and text.startswith(last.text) else last.text
        group = [turn for turn in left[:-1] if turn.ended and not turn.rebuilt and whole.startswith(turn.text)]
        notes = tuple(note for turn in (*group, last) for note in turn.notes)
        count = len(messages) if whole == text else last.place + 1
        done.append(Rendering(whole, tuple(turn.span for turn in (*group, last)), count, notes))
        left = [turn for turn in left[:-1] if turn not in group]
    done.reverse()
    more = ((APART,) if len(done) > 1 else ()) + ((HIDDEN,) if None in found.values() else ())
    done[0] = replace(done[0], notes=(*done[0].notes, *more))
    return done


def spoken_runs(labels: Sequence[int]) -> int:
    """Return how many runs of learned tokens there are: the turns that are learned."""
    return sum(label != IGNORE and (not place or labels[place - 1] == IGNORE) for place, label in enumerate(labels))


def _has_generation_marks(tokenizer: Any) -> bool:
    return isinstance(tokenizer.chat_template, str) and bool(
        re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template)
    )


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], max_length: int, arguments: Mapping[str, Any] | None = None
) -> list[EncodedChat]:
    """Render and tokenize a conversation, cut at `max_length` tokens, and label the assistant's tokens.

    Args:
        tokenizer: has the template.
        messages: the conversation.
        max_length: tokens of an example.
        arguments: what else the template is given: tools, and settings of its own.

    Returns:
        One example, or several where the template doesn't hold all turns at once, in the order of their turns.

    Raises:
        TemplateError: the template can't render it, or hides which part the assistant said.
    """
    total = sum(message["role"] == "assistant" for message in messages)
    if _has_generation_marks(tokenizer):
        found = [_marked(tokenizer, messages, arguments or {})]
    else:
        found = [_tokenized(tokenizer, rendering) for rendering in renderings(tokenizer, messages, arguments)]
    cut = [
        EncodedChat(
            ids[:max_length], labels[:max_length], len(ids) > max_length, spoken_runs(labels[:max_length]), 0, notes
        )
        for ids, labels, notes in found
    ]
    cut[-1] = replace(cut[-1], unlearned=max(0, total - sum(chat.turns for chat in cut)))
    return cut


_Tokens = tuple[list[int], list[int], tuple[str, ...]]


def _tokenized(tokenizer: Any, rendering: Rendering) -> _Tokens:
    # the template has put the special tokens in already
    out = tokenizer(rendering.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(out["input_ids"])
    labels = [
        token if any(start < high and end > low and end > start for low, high in rendering.spans) else IGNORE
        for token, (start, end) in zip(ids, out["offset_mapping"], strict=True)
    ]
    return ids, labels, rendering.notes


def _marked(tokenizer: Any, messages: Sequence[Message], arguments: Mapping[str, Any]) -> _Tokens:
    """Tokens of a template that marks what the assistant says."""
    chat = _Conversation(tokenizer, messages, arguments)
    chat.check()
    ids, mask = chat.marked_tokens(messages)
    said = [message for message in messages if message["role"] == "assistant"]
    if not all(map(_is_learned, said)):
        runs = _runs(mask)
        if len(runs) != len(said):
            raise TemplateError("it has messages of weight 0, and the template's marks don't tell its turns apart")
        for (start, end), message in zip(runs, said, strict=True):
            mask[start:end] = [int(_is_learned(message))] * (end - start)
    notes: tuple[str, ...] = ()
    open_ended = [run for run in _runs(mask) if ids[run[1] - 1] not in chat.special_ids]
    following = chat.marked_end() if open_ended else None
    for _, end in open_ended:
        if end < len(ids) and ids[end] == following:  # marks that stop short of the end of the turn
            mask[end] = 1
        elif not tokenizer.decode(ids[end:]).strip():
            ids, mask, notes = _ended(tokenizer, ids[:end], mask[:end], notes)
        elif ENDS_LEFT not in notes:
            notes = (*notes, ENDS_LEFT)
    return ids, [token if spoken else IGNORE for token, spoken in zip(ids, mask, strict=True)], notes


def _ended(
    tokenizer: Any, ids: list[int], mask: list[int], notes: tuple[str, ...]
) -> tuple[list[int], list[int], tuple[str, ...]]:
    if not tokenizer.eos_token:
        return ids, mask, (*notes, ENDLESS)
    return [*ids, tokenizer.eos_token_id], [*mask, 1], (*notes, ENDED.format(end=tokenizer.eos_token))


def _runs(mask: Sequence[int]) -> list[Span]:
    runs: list[Span] = []
    for place, marked in enumerate(mask):
        if marked and (not place or not mask[place - 1]):
            runs.append((place, place + 1))
        elif marked:
            runs[-1] = (runs[-1][0], place + 1)
    return runs
