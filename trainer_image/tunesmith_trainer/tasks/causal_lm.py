"""Causal language models: ChatSFT (conversations, loss on the assistant's tokens) and CausalLM (plain text).

Logits are computed for learned tokens only: for a conversation whose answer is a few words that saves most of the
output head. Examples are packed (no padding) where `attention.packs_exactly` says that the model can be.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_trainer.tasks.base import IGNORE, Assessment, BadRow, Batch, Example, Outcome, Prediction, Row, Task
from tunesmith_trainer.tasks.chat import TemplateError, encode_chat
from tunesmith_trainer.tasks.conversations import Message, read_conversation, read_message, template_arguments
from tunesmith_trainer.tasks.fields import shorten, text_field

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["CausalLM", "ChatSFT", "LanguageTask", "keeps_logits"]


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model can leave out logits that nobody asks for.

    The output head is a fifth of the work of a small model, and most of the memory.
    """
    return "logits_to_keep" in inspect.signature(model.forward).parameters


class LanguageTask(Task):
    """What both have in common: everything but how a row becomes tokens and labels."""

    supports_packing = True
    learns_tokens = True
    higher_is_better = frozenset({"tokenAccuracy", "exactMatch"})

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        self._keep: bool | None = None

    def load_processor(self, folder: Path) -> Any:
        from tunesmith_trainer.models.tokenizers import load_tokenizer

        self.processor = load_tokenizer(folder, chat=isinstance(self, ChatSFT))
        return self.processor

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        from tunesmith_trainer.models.loading import from_config, load_pretrained

        if self.plan.model_init is Init.RANDOM:
            model = from_config(AutoModelForCausalLM, folder, self.plan.training.seed, options["dtype"])
        else:
            model = load_pretrained(AutoModelForCausalLM, folder, **options)
        self._keep = keeps_logits(model)
        return model

    # ---- batches

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        import torch

        indices = [int(example.features.get("index", -1)) for example in examples]
        if packed:
            inputs, labels, owner = self._packed(examples, device)
        else:
            inputs, labels, owner = self._padded(examples, device)
        kept = (labels != IGNORE).nonzero().squeeze(1)
        units = float(len(kept))
        if not len(kept):  # a model wants at least one position to compute logits for
            kept = torch.zeros(1, dtype=torch.long, device=device)
        return Batch(
            inputs,
            labels[kept],
            units,
            {"kept": kept, "owner": owner[kept], "indices": indices, "examples": examples},
        )

    def _packed(
        self, examples: Sequence[Example], device: torch.device
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        import torch

        from tunesmith_trainer.models.attention import Layout

        lengths = [len(example.features["input_ids"]) for example in examples]
        ids = torch.tensor([token for example in examples for token in example.features["input_ids"]])
        positions = torch.cat([torch.arange(length) for length in lengths])
        owner = torch.repeat_interleave(torch.arange(len(examples)), torch.tensor(lengths))
        inputs = {
            "input_ids": ids[None].to(device),
            "position_ids": positions[None].to(device),
            "packed": Layout.of(lengths, device),
        }
        labels = torch.tensor([label for example in examples for label in self._next_labels(example)])
        return inputs, labels.to(device), owner.to(device)

    def _padded(
        self, examples: Sequence[Example], device: torch.device
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        import torch

        from tunesmith_trainer.models.tokenizers import padding_id

        shape = (len(examples), max(len(example.features["input_ids"]) for example in examples))
        ids = torch.full(shape, padding_id(self.processor), dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE, dtype=torch.long)
        for line, example in enumerate(examples):
            length = len(example.features["input_ids"])
            ids[line, :length] = torch.tensor(example.features["input_ids"])
            mask[line, :length] = 1
            labels[line, :length] = torch.tensor(self._next_labels(example))
        owner = torch.arange(len(examples))[:, None].expand(shape).flatten()
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        return inputs, labels.flatten().to(device), owner.to(device)

    @staticmethod
    def _next_labels(example: Example) -> list[int]:
        """For each position the token that comes next; nothing comes after the last."""
        return [*example.features["labels"][1:], IGNORE]

    # ---- computing

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        kept, owner = batch.extras["kept"], batch.extras["owner"]
        lines, columns = batch.inputs["input_ids"].shape
        if self._keep and lines == 1:
            logits = model(**batch.inputs, use_cache=False, logits_to_keep=kept).logits[0]
        elif self._keep:  # a padded block: those columns at which any line has a target
            wanted = (kept % columns).unique()
            block = model(**batch.inputs, use_cache=False, logits_to_keep=wanted).logits
            import torch

            logits = block[kept // columns, torch.searchsorted(wanted, kept % columns)]
        else:
            logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[kept]
        return Prediction(logits.float(), batch.labels, examples=owner)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.predict(model, batch))

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        import torch
        from torch.nn import functional

        found = self.predict(model, batch)
        assert found.examples is not None
        counted = found.targets != IGNORE
        losses = functional.cross_entropy(found.logits, found.targets, ignore_index=IGNORE, reduction="none")
        guesses = found.logits.argmax(-1)
        right = (guesses == found.targets) & counted
        count = len(batch.extras["indices"])

        def per_example(values: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(count, dtype=torch.float64, device=values.device)
            return zeros.index_add_(0, found.examples, values.double())

        tokens, hits, lost = per_example(counted), per_example(right), per_example(losses)
        outcomes = [
            Outcome(
                batch.extras["indices"][number],
                float(lost[number] / tokens[number].clamp(min=1)),
                self._text(found.targets[(found.examples == number) & counted]),
                self._text(guesses[(found.examples == number) & counted]),
            )
            for number in range(count)
        ]
        sums = {
            "loss": [float(lost.sum())],
            "units": [float(tokens.sum())],
            "right": [float(hits.sum())],
            "exact": [float((hits == tokens).sum())],
            "examples": [float(count)],
        }
        return Assessment(sums, outcomes)

    def pieces_of(self, example: Example) -> list[tuple[str, bool]]:
        """Return an example's text in runs of tokens that are learned, and that are not."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        runs = groupby(
            zip(example.features["input_ids"], example.features["labels"], strict=True), lambda pair: pair[1] != IGNORE
        )
        return [(str(tokenizer.decode([token for token, _ in run])), learned) for learned, run in runs]

    def _text(self, tokens: torch.Tensor) -> str:
        return shorten(str(self.processor.decode(tokens[:64].tolist(), skip_special_tokens=True)))

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per token in nats, its perplexity, and teacher-forced token accuracy and exact match."""
        sums = {name: values[0] for name, values in assessment.sums.items()}
        loss = sums["loss"] / max(1.0, sums["units"])
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 50.0)),
            "tokenAccuracy": sums["right"] / max(1.0, sums["units"]),
            "exactMatch": sums["exact"] / max(1.0, sums["examples"]),
        }


class ChatSFT(LanguageTask):
    """Conversations; the loss counts what the assistant says and the token that ends its turn."""

    def check_row(self, row: Row) -> None:
        self.normalized(row)

    def normalized(self, row: Row) -> Row:
        return {**row, **read_conversation(row, self.plan.dataset.columns, self._read_message)}

    def _read_message(self, message: Any, where: str) -> Message:
        return read_message(message, where)

    def texts_of(self, row: Row) -> Mapping[str, str]:
        """The user's texts, as `messages.N`: what the assistant says is the answer to learn, not to be garbled."""
        messages = row[self.plan.dataset.columns.messages]
        return {
            f"messages.{number}": message["content"]
            for number, message in enumerate(messages)
            if message["role"] == "user"
        }

    def with_texts(self, row: Row, texts: Mapping[str, str]) -> Row:
        column = self.plan.dataset.columns.messages
        messages = [
            {**message, "content": texts.get(f"messages.{number}", message["content"])}
            for number, message in enumerate(row[column])
        ]
        return {**row, column: messages}

    def encode(self, row: Row) -> list[Example]:
        longest, columns = self.plan.training.max_length, self.plan.dataset.columns
        try:
            chats = encode_chat(self.processor, row[columns.messages], longest, template_arguments(row, columns))
        except TemplateError as error:
            raise BadRow(f": {error}") from error
        return [
            Example(
                {"input_ids": chat.input_ids, "labels": chat.labels},
                len(chat.input_ids),
                float(chat.trained_tokens),
                chat.truncated,
                chat.turns,
                chat.unlearned,
                chat.notes,
            )
            for chat in chats
        ]


class CausalLM(LanguageTask):
    """Plain text, every token is learned. A text longer than maxLength becomes several examples: none is lost."""

    def check_row(self, row: Row) -> None:
        text_field(row, self.plan.dataset.columns.text, "text")

    def texts_of(self, row: Row) -> Mapping[str, str]:
        column = self.plan.dataset.columns.text
        return {column: str(row[column])}

    def encode(self, row: Row) -> list[Example]:
        longest = self.plan.training.max_length
        tokenizer = self.processor
        ids = list(tokenizer(row[self.plan.dataset.columns.text], verbose=False)["input_ids"])
        end = tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        parts = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        # a part of one token has nothing to predict
        return [
            Example({"input_ids": part, "labels": part}, len(part), float(len(part) - 1))
            for part in parts
            if len(part) > 1
        ]
