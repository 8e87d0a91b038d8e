"""Seq2Seq: a text → another text, with an encoder-decoder (T5, BART, Marian): translation, summarization.

Training and the held-out loss give the decoder the true text so far. BLEU, chrF and ROUGE are taken from texts that
the model wrote by itself, as `spec.generation` says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.tokenizers import padding_id
from tunesmith_trainer.tasks.base import IGNORE, Assessment, Batch, Example, Outcome, Prediction, Row, Task
from tunesmith_trainer.tasks.classes import position_limit
from tunesmith_trainer.tasks.collator import indices_of, pad, text_inputs
from tunesmith_trainer.tasks.fields import shorten, text_field
from tunesmith_trainer.tasks.languages import begin_in, set_languages, tail_length

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Seq2Seq", "text_scores"]


class Seq2Seq(Task):
    """Pairs of a source and a target text; every token of the target is learned."""

    pipeline_tag = "text2text-generation"
    higher_is_better = frozenset({"tokenAccuracy", "bleu", "chrf", "rougeL"})

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        self.source, self.target = plan.dataset.columns.source, plan.dataset.columns.target
        self._longest = plan.training.max_length
        self._answer = plan.generation.max_new_tokens
        self._tail = 1

    # ---- rows

    def check_row(self, row: Row) -> None:
        text_field(row, self.source, "source")
        text_field(row, self.target, "target")

    def texts_of(self, row: Row) -> Mapping[str, str]:
        return {self.source: str(row[self.source])}

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from transformers import AutoTokenizer

        try:
            # Marian's has no fast form
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken folder makes transformers raise
            raise UserError(Reason.MODEL_INVALID, f"spec.model.uri: the tokenizer can't be loaded: {error}") from error
        set_languages(tokenizer, self.plan.translation)
        self._tail = tail_length(tokenizer)
        self._longest = position_limit(folder, self.plan.training.max_length)
        # the first position is the decoder's start
        self._answer = position_limit(folder, self.plan.generation.max_new_tokens + 1) - 1
        self.processor = tokenizer
        return tokenizer

    def encode(self, row: Row) -> list[Example]:
        source, cut_source = self._cut(self.processor(row[self.source], verbose=False)["input_ids"])
        target, cut_target = self._cut(self.processor(text_target=row[self.target], verbose=False)["input_ids"])
        features = {"input_ids": source, "labels": target}
        return [Example(features, len(source) + len(target), float(len(target)), cut_source or cut_target)]

    def _cut(self, ids: Sequence[int]) -> tuple[list[int], bool]:
        # these models end a text with a token for its end, some with one for its language, too: they must stay
        if len(ids) <= self._longest:
            return list(ids), False
        return [*ids[: self._longest - self._tail], *ids[-self._tail :]], True

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForSeq2SeqLM

        from tunesmith_trainer.models.loading import load_pretrained

        model = load_pretrained(AutoModelForSeq2SeqLM, folder, **options)
        begin_in(model, self.processor)
        return model

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        inputs = text_inputs(examples, padding_id(self.processor), device)
        units = sum(example.units for example in examples)
        return Batch(inputs, pad(examples, "labels", IGNORE, device), units, {"indices": indices_of(examples)})

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        import torch

        counted = batch.labels != IGNORE
        logits = model(**batch.inputs, **_decoder_inputs(model, batch.labels), use_cache=False).logits[counted].float()
        owner = torch.arange(len(counted), device=counted.device)[:, None].expand_as(counted)[counted]
        return Prediction(logits, batch.labels[counted], examples=owner)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.predict(model, batch))

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        import torch
        from torch.nn import functional

        found = self.predict(model, batch)
        assert found.examples is not None
        losses = functional.cross_entropy(found.logits, found.targets, reduction="none").double()
        count = len(batch.labels)

        def per_example(values: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(count, dtype=torch.float64, device=values.device)
            return zeros.index_add_(0, found.examples, values)

        means = per_example(losses) / per_example(torch.ones_like(losses))
        sums = {
            "loss": [float(losses.sum())],
            "units": [float(len(losses))],
            "right": [float((found.logits.argmax(-1) == found.targets).sum())],
        }
        texts = list(zip(self._generate(model, batch), self._decode(batch.labels), strict=True))
        outcomes = [
            Outcome(index, mean, shorten(expected), shorten(produced))
            for index, mean, (produced, expected) in zip(batch.extras["indices"], means.tolist(), texts, strict=True)
        ]
        return Assessment(sums, outcomes, texts)

    def _generate(self, model: nn.Module, batch: Batch) -> list[str]:
        from torch.distributed.fsdp import FSDPModule

        shared_out = isinstance(model, FSDPModule)
        if shared_out:
            model.unshard()  # generate calls the encoder without going through the whole model, which would do it
        produced = _bare(model).generate(
            **batch.inputs,
            max_new_tokens=self._answer,
            num_beams=self.plan.generation.num_beams,
            do_sample=False,
            use_cache=True,
            # ranks that share out a model have to run it equally often
            synced_gpus=shared_out,
        )
        return self._decode(produced)

    def _decode(self, tokens: torch.Tensor) -> list[str]:
        filled = tokens.masked_fill(tokens == IGNORE, padding_id(self.processor))
        return [text.strip() for text in self.processor.batch_decode(filled.tolist(), skip_special_tokens=True)]

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per token in nats, its perplexity, teacher-forced token accuracy; and `text_scores`."""
        sums = {name: values[0] for name, values in assessment.sums.items()}
        units = max(1.0, sums["units"])
        loss = sums["loss"] / units
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 50.0)),
            "tokenAccuracy": sums["right"] / units,
            **text_scores(assessment.texts),
        }


def _bare(model: nn.Module) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model


def _decoder_inputs(model: nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    # each architecture shifts its labels in its own way; the few that don't say how do it themselves, given labels
    shift = getattr(_bare(model), "prepare_decoder_input_ids_from_labels", None)
    return {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}


class _Words:
    """ROUGE's words, of any script; rouge-score's own tokenizer knows a-z and 0-9 only. The same on English text."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def text_scores(texts: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Compare (produced, expected) texts.

    Returns:
        `bleu` (Papineni et al., 2002) and `chrf` (Popović, 2015) of the whole corpus, 0 to 100, as sacrebleu computes
        them; `rougeL` (Lin, 2004), the mean F-measure of the longest common subsequence of words, 0 to 1.
    """
    if not texts:
        return {}
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    produced, expected = [text for text, _ in texts], [text for _, text in texts]
    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    overlaps = [rouge.score(true, said)["rougeL"].fmeasure for said, true in texts]
    return {
        "bleu": float(BLEU().corpus_score(produced, [expected]).score),
        "chrf": float(CHRF().corpus_score(produced, [expected]).score),
        "rougeL": math.fsum(overlaps) / len(overlaps),
    }
