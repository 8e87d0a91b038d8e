"""Back-translation: a text is translated into another language and back, which says the same in other words.

`prepare` has a part of the training texts paraphrased once, before anything is encoded; the results are cached with
the tokens. Any pair of sequence-to-sequence models of transformers will do (MarianMT, T5, …).
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_store.files import fetch_model
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.data.rows import Located, to_json
from tunesmith_trainer.tasks.base import Task

__all__ = ["BackTranslator", "Paraphraser", "paraphrased"]

CHUNK = 256
BATCH = 16
LONGEST = 512
FIELD = "spec.dataset.augmentation.backTranslation"


class Paraphraser(Protocol):
    """Says the same in other words."""

    def paraphrase(self, texts: Sequence[str]) -> list[str]:
        """Return one text for each."""


class BackTranslator:
    """Two translation models on one device."""

    def __init__(self, forward: _Translator, backward: _Translator) -> None:
        self._forward, self._backward = forward, backward

    @classmethod
    def fetch(cls, plan: TrainingPlan, store: ObjectStore, scratch: Path) -> BackTranslator:
        """Download and load the plan's two models.

        Raises:
            UserError: one of them isn't there, or is no translation model.
        """
        assert plan.dataset.augmentation is not None
        settings = plan.dataset.augmentation.back_translation
        assert settings is not None
        device = "cuda" if plan.gpus_per_worker else "cpu"
        pair = [
            _Translator.load(fetch_model(store, uri, scratch / "translators" / name, field), field, device)
            for name, field, uri in (
                ("forward", f"{FIELD}.forwardUri", settings.forward_uri),
                ("backward", f"{FIELD}.backwardUri", settings.backward_uri),
            )
        ]
        return cls(*pair)

    def paraphrase(self, texts: Sequence[str]) -> list[str]:
        """Translate there and back, line by line: such models know sentences. What comes back empty stays as it was."""
        lines = [text.split("\n") for text in texts]
        flat = [line for block in lines for line in block if line.strip()]
        back = iter(self._backward.translate(self._forward.translate(flat)))
        return ["\n".join((next(back) or line) if line.strip() else line for line in block) for block in lines]

    def close(self) -> None:
        """Give the memory of the models back."""
        import torch

        del self._forward, self._backward
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Translator:
    def __init__(self, model: Any, tokenizer: Any, device: str) -> None:
        self._model, self._tokenizer, self._device = model, tokenizer, device

    @classmethod
    def load(cls, folder: Path, field: str, device: str) -> _Translator:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken folder makes transformers raise
            message = f"{field}: it can't be loaded as a sequence-to-sequence model: {error}"
            raise UserError(Reason.MODEL_INVALID, message) from error
        return cls(model.to(device).eval(), tokenizer, device)

    def translate(self, texts: Sequence[str]) -> list[str]:
        """Translate greedily: nothing is drawn, so all runs get the same."""
        import torch

        done = {number: "" for number, text in enumerate(texts) if not text}
        order = sorted((number for number, text in enumerate(texts) if text), key=lambda number: len(texts[number]))
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            batch = [texts[number] for number in numbers]
            inputs = self._tokenizer(batch, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
            longest = 2 * inputs["input_ids"].shape[1] + 16
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=inputs["input_ids"].to(self._device),
                    attention_mask=inputs["attention_mask"].to(self._device),
                    max_new_tokens=longest,
                    num_beams=1,
                    do_sample=False,
                )
            decoded = self._tokenizer.batch_decode(output, skip_special_tokens=True)
            done.update(zip(numbers, (text.strip() for text in decoded), strict=True))
        return [done[number] for number in range(len(texts))]


def paraphrased(
    rows: Iterable[Located], task: Task, paraphraser: Paraphraser, chance: float, seed: int, told: Callable[[int], None]
) -> Iterator[Located]:
    """Yield the rows, the texts of some said in other words: which ones depends on their content and the seed only.

    Args:
        rows: checked rows.
        task: knows which texts of a row may be changed.
        paraphraser: changes them.
        chance: part of the rows that are changed.
        seed: of the job.
        told: called with the number of rows done.
    """
    rest = iter(rows)
    done = 0
    while chunk := list(islice(rest, CHUNK)):
        chosen = {number: task.texts_of(row) for number, (_, row) in enumerate(chunk) if _draw(seed, row) < chance}
        texts = iter(paraphraser.paraphrase([text for found in chosen.values() for text in found.values()]))
        for number, (where, row) in enumerate(chunk):
            found = chosen.get(number, {})
            changed = {name: next(texts) for name in found}
            yield Located(where, task.with_texts(row, changed) if changed else row)
        done += len(chunk)
        told(done)


def _draw(seed: int, row: Any) -> float:
    """Return a number from 0 to 1 that belongs to this row."""
    digest = hashlib.blake2b(f"tunesmith-paraphrase:{seed}:{to_json(row)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
