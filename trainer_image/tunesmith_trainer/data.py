"""JSON Lines in, examples and padded batches out. `preflight` reads rows, `loop` and `evaluate` make batches.

A bad row is an error that names its line: silently training on less than the user gave would be worse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.chat import IGNORE, EncodedChat, Message, TemplateError, encode_chat

if TYPE_CHECKING:
    import torch

__all__ = ["Batch", "ChatDataset", "collate", "encode_rows", "read_rows"]

SHOWN = 60


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _check_messages(row: Any, column: str) -> list[Message]:
    """Return the messages of a row. Raises ValueError with what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError(f"is not a JSON object but {type(row).__name__}")
    if column not in row:
        names = ", ".join(sorted(map(str, row))) or "none"
        raise ValueError(f"has no field {column!r} (its fields: {names}); set spec.dataset.columns.messages")
    messages = row[column]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field {column!r} must be a list of at least one message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is not an object with role and content")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(f"message {number} needs a text {name!r}")
        if message["role"] not in {"system", "user", "assistant", "tool"}:
            role = _shorten(message["role"])
            raise ValueError(f"message {number} has role {role!r}; use system, user, assistant or tool")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no assistant message to learn from")
    return messages


def read_rows(path: Path, column: str, uri: str) -> Iterator[tuple[int, list[Message]]]:
    """Yield (line number from 1, messages) of every row; blank lines are passed over.

    Raises:
        UserError: a line is no JSON, or a row lacks what ChatSFT needs; the message names URI and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, _check_messages(json.loads(line), column)
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                shown = _shorten(line.decode(errors="replace").strip())
                message = f"{uri} line {number} is not valid JSON ({error}): {shown}"
                raise UserError(Reason.DATASET_INVALID, message) from error
            except ValueError as error:
                raise UserError(Reason.DATASET_INVALID, f"{uri} line {number} {error}") from error


@dataclass(frozen=True)
class ChatDataset:
    """Tokenized examples of one file."""

    examples: list[EncodedChat]
    truncated: int
    """Rows that were cut at maxLength."""
    skipped: int
    """Rows left out since the cut left nothing of the assistant in them."""

    def __len__(self) -> int:
        return len(self.examples)


def encode_rows(path: Path, tokenizer: Any, *, column: str, uri: str, max_length: int) -> ChatDataset:
    """Tokenize a file of conversations.

    Raises:
        UserError: a row is bad, the template refuses one, or maxLength leaves none to train on.
    """
    examples: list[EncodedChat] = []
    truncated = skipped = total = 0
    for number, messages in read_rows(path, column, uri):
        total += 1
        try:
            example = encode_chat(tokenizer, messages, max_length)
        except TemplateError as error:
            raise UserError(Reason.DATASET_INVALID, f"{uri} line {number}: {error}") from error
        truncated += len(example.input_ids) == max_length
        if example.trained_tokens:
            examples.append(example)
        else:
            skipped += 1
    if not total:
        raise UserError(Reason.DATASET_INVALID, f"{uri} has no rows")
    if not examples:
        message = (
            f"{uri}: in none of its {total} rows does anything the assistant says fit into spec.training.maxLength "
            f"{max_length} tokens; raise it"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    return ChatDataset(examples, truncated, skipped)


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch: input_ids, attention_mask and labels, each [examples, tokens]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def collate(examples: Sequence[EncodedChat], pad_id: int, device: torch.device) -> Batch:
    """Pad on the right to the longest of these examples."""
    import torch

    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        mask[row, :length] = 1
        labels[row, :length] = torch.tensor(example.labels)
    return Batch(ids.to(device), mask.to(device), labels.to(device))
