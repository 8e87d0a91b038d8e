"""Learning from a better and a worse answer: DPO (the model itself) and Reward (a model that scores answers).

A pair is computed in one forward pass, all better answers of a batch first, then all worse ones: gradients are averaged
over ranks per forward pass, and a second one in the same loss would be averaged wrongly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.dataset import Columns
from tunesmith_api.v1alpha1.task import PreferenceLoss
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.tokenizers import padding_id
from tunesmith_trainer.tasks.base import IGNORE, Assessment, BadRow, Batch, Example, Outcome, Prediction, Row, Task
from tunesmith_trainer.tasks.causal_lm import LanguageTask, shorten
from tunesmith_trainer.tasks.classes import position_limit
from tunesmith_trainer.tasks.collator import indices_of, length_mask, pad_rows
from tunesmith_trainer.tasks.objectives import head_modules, load_with_head
from tunesmith_trainer.tasks.preference_pairs import SIDES, PairEncoder, read_pair, shared_length

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["DPO", "Reward"]

SHOWN_TOKENS = 64


def _answers_of(tokenizer: Any, example: Example) -> tuple[str, str]:
    """Return where the better and the worse answer differ, as short texts for the report."""
    chosen, rejected = (example.features[f"{side}_input_ids"] for side in SIDES)
    start = shared_length(chosen, rejected)

    def text(ids: Sequence[int]) -> str:
        return shorten(str(tokenizer.decode(ids[start : start + SHOWN_TOKENS], skip_special_tokens=True)).strip())

    return text(chosen), text(rejected)


def _prompts_of(row: Row, columns: Columns) -> Mapping[str, str]:
    pair = read_pair(row, columns)
    # a prompt that the answers repeat can't be changed in one place
    return {columns.prompt: pair.prompt} if isinstance(pair.prompt, str) and pair.templated else {}


# ---- DPO


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while, leaving each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class _LogProbabilities:
    """Of the answers of a batch, better ones first: [2 * pairs] sums over tokens, and how many tokens those are."""

    sums: torch.Tensor
    tokens: torch.Tensor


class DPO(LanguageTask):
    """Direct preference optimization (Rafailov et al., 2023, arXiv:2305.18290), and IPO (Azar et al., 2023).

    The reward of an answer is beta times what the model has become likelier to say it than the one it started from,
    in nats. `freeze_reference` has to be called with the starting model before anything is trained or restored.
    """

    higher_is_better = frozenset({"rewardAccuracy", "rewardMargin", "chosenReward"})

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        self.beta = float(plan.preference.beta)
        self._is_ipo = plan.preference.loss_type is PreferenceLoss.IPO
        if self._is_ipo and plan.training.label_smoothing_factor:
            message = "spec.training.labelSmoothingFactor means nothing with preference.lossType IPO: set it to 0"
            raise UserError(Reason.INVALID_SPEC, message)
        self.reference: nn.Module | None = None
        """A frozen copy of the starting model, on the device that it was on; None where adapters are trained."""
        self._adapted: Any = None
        self._stored: torch.dtype | None = None

    # ---- rows

    def check_row(self, row: Row) -> None:
        columns = self.plan.dataset.columns
        if not read_pair(row, columns).prompt:
            raise BadRow(
                f"has no field {columns.prompt!r}, and {columns.chosen!r} and {columns.rejected!r} begin with nothing "
                "in common that could be the prompt; set spec.dataset.columns.prompt"
            )

    def texts_of(self, row: Row) -> Mapping[str, str]:
        """The prompt, where it is a text of its own."""
        return _prompts_of(row, self.plan.dataset.columns)

    def encode(self, row: Row) -> list[Example]:
        pair = read_pair(row, self.plan.dataset.columns)
        chosen, rejected = PairEncoder(self.processor, self.plan.training.max_length).sides(pair)
        if not chosen.is_learned or not rejected.is_learned or chosen.input_ids == rejected.input_ids:
            return []  # the cut has left no difference
        features = {
            "chosen_input_ids": chosen.input_ids,
            "chosen_labels": chosen.labels,
            "rejected_input_ids": rejected.input_ids,
            "rejected_labels": rejected.labels,
        }
        length = len(chosen.input_ids) + len(rejected.input_ids)
        return [Example(features, length, 1.0, chosen.truncated or rejected.truncated)]

    # ---- the reference

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from tunesmith_trainer.models.loading import stored_dtype

        self._stored = stored_dtype(folder)
        return super().load_model(folder, **options)

    def freeze_reference(self, model: nn.Module, is_shared: bool = False) -> nn.Module | None:
        """Keep the model as it starts: the bare one, after methods were applied, before it is wrapped or restored.

        With adapters that is the same model with its adapters switched off, which costs no memory. Otherwise it is a
        copy; where training computes in 16 bits anyway, the copy is held in the format that the model was stored in.
        """
        from torch import nn

        from tunesmith_trainer.models.numerics import Numerics

        if self.plan.method.has_adapters:
            self._adapted = model
            return None
        memo: dict[int, Any] = {}
        if is_shared:
            memo = {id(own): nn.Parameter(own.detach(), requires_grad=False) for own in model.parameters()}
        self.reference = copy.deepcopy(model, memo).requires_grad_(False).eval()
        if not is_shared and self._stored is not None:
            numerics = Numerics.choose(self.plan.training.precision, self.plan.gpus_per_worker)
            self.reference.to(numerics.frozen_dtype(self._stored))
        return self.reference

    def _reference(self, batch: Batch) -> _LogProbabilities:
        """Compute what the starting model gives the answers, without gradients and without dropout."""
        import torch

        from tunesmith_trainer.models.attention import packed_implementation

        with torch.no_grad():
            if self.reference is not None:
                with packed_implementation(self.reference, "packed" in batch.inputs):
                    return self._log_probabilities(self.reference, batch)
            if self._adapted is None:
                raise RuntimeError("freeze_reference was not called before the first loss")
            with self._adapted.disable_adapter(), _evaluated(self._adapted):
                return self._log_probabilities(self._adapted, batch)

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        sides = [
            Example({name: example.features[f"{side}_{name}"] for name in ("input_ids", "labels")}, example.length, 1.0)
            for side in SIDES
            for example in examples
        ]
        batch = super().collate(sides, device, packed)
        extras = {**batch.extras, "indices": indices_of(examples), "examples": examples}
        return replace(batch, units=float(len(examples)), extras=extras)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """DPO has no logits over classes or tokens that a teacher's could be held against."""
        return Task.predict(self, model, batch)

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> _LogProbabilities:
        import torch
        from torch.nn import functional

        found = super().predict(model, batch)
        assert found.examples is not None
        nll = functional.cross_entropy(found.logits, found.targets, ignore_index=IGNORE, reduction="none")
        zeros = torch.zeros(2 * len(batch.extras["examples"]), device=nll.device)
        counted = (found.targets != IGNORE).to(zeros.dtype)
        return _LogProbabilities(zeros.index_add(0, found.examples, -nll), zeros.index_add(0, found.examples, counted))

    def _pairs(
        self, model: nn.Module, batch: Batch, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return [pairs] losses, and the rewards of better and worse answers."""
        # first, so that the two passes' activations are never held together
        reference = self._reference(batch)
        policy = self._log_probabilities(model, batch)
        ratios = policy.sums - reference.sums
        chosen, rejected = ratios.chunk(2)
        losses = self.pair_losses(chosen, rejected, policy.tokens, smoothing)
        return losses, self.beta * chosen, self.beta * rejected

    def pair_losses(
        self, chosen: torch.Tensor, rejected: torch.Tensor, tokens: torch.Tensor, smoothing: float = 0.0
    ) -> torch.Tensor:
        """Return the loss of each pair.

        Args:
            chosen: [pairs] log-probability ratio (policy to reference, in nats, summed over tokens) of better answers.
            rejected: the same of the worse ones.
            tokens: [2 * pairs] how many tokens the sums are over, those of better answers first.
            smoothing: part of the probability that is spread over both orders of a pair; not for IPO.

        Returns:
            [pairs]. Sigmoid: -log sigmoid(beta (chosen - rejected)), Rafailov et al., 2023, equation 7. IPO:
            (chosen - rejected - 1 / (2 beta))², Azar et al., 2023, equation 17, of ratios per token, as the paper's
            results and TRL have it.
        """
        from torch.nn import functional

        if self._is_ipo:
            counts = tokens.clamp(min=1).chunk(2)
            return (chosen / counts[0] - rejected / counts[1] - 1 / (2 * self.beta)).square()
        margin = self.beta * (chosen - rejected)
        flipped = smoothing / 2
        return -(1 - flipped) * functional.logsigmoid(margin) - flipped * functional.logsigmoid(-margin)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._pairs(model, batch, self.plan.training.label_smoothing_factor)[0].sum()

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        losses, chosen, rejected = (part.double() for part in self._pairs(model, batch, 0.0))
        better = chosen > rejected
        sums = {
            "loss": [float(losses.sum())],
            "units": [float(len(losses))],
            "right": [float(better.sum())],
            "chosen": [float(chosen.sum())],
            "rejected": [float(rejected.sum())],
        }
        return Assessment(sums, _outcomes(self.processor, batch, losses, better))

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per pair; how often the better answer has the higher reward; mean rewards and their difference."""
        sums = {name: values[0] for name, values in assessment.sums.items()}
        pairs = max(1.0, sums["units"])
        return {
            "loss": sums["loss"] / pairs,
            "rewardAccuracy": sums["right"] / pairs,
            "rewardMargin": (sums["chosen"] - sums["rejected"]) / pairs,
            "chosenReward": sums["chosen"] / pairs,
            "rejectedReward": sums["rejected"] / pairs,
        }


def _outcomes(tokenizer: Any, batch: Batch, losses: torch.Tensor, better: torch.Tensor) -> list[Outcome]:
    texts = [_answers_of(tokenizer, example) for example in batch.extras["examples"]]
    return [
        Outcome(index, loss, chosen, chosen if right else rejected)
        for index, loss, right, (chosen, rejected) in zip(
            batch.extras["indices"], losses.tolist(), better.tolist(), texts, strict=True
        )
    ]


# ---- Reward


class Reward(Task):
    """A model that gives an answer one number; the better of two should have the higher (Bradley & Terry, 1952).

    The loss of a pair is -log sigmoid(better - worse). That is the cross entropy of the two numbers, the better one
    being right: so label smoothing and distillation are those of a classifier with two classes.
    """

    higher_is_better = frozenset({"accuracy", "margin"})
    pipeline_tag = "text-classification"

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        self._longest = plan.training.max_length

    # ---- rows

    def check_row(self, row: Row) -> None:
        read_pair(row, self.plan.dataset.columns)

    def texts_of(self, row: Row) -> Mapping[str, str]:
        """The prompt, where it is a text of its own."""
        return _prompts_of(row, self.plan.dataset.columns)

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from tunesmith_trainer.models.tokenizers import load_tokenizer

        self._longest = position_limit(folder, self.plan.training.max_length)
        tokenizer = load_tokenizer(folder, chat=False)
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            # a classifier reads its score at the last token that isn't padding: who uses it later has to know that one
            tokenizer.pad_token = tokenizer.eos_token
        self.processor = tokenizer
        return tokenizer

    def encode(self, row: Row) -> list[Example]:
        pair = read_pair(row, self.plan.dataset.columns)
        chosen, rejected = PairEncoder(self.processor, self._longest).sides(pair)
        if chosen.input_ids == rejected.input_ids:
            return []  # the cut has left no difference
        features = {"chosen_input_ids": chosen.input_ids, "rejected_input_ids": rejected.input_ids}
        length = len(chosen.input_ids) + len(rejected.input_ids)
        return [Example(features, length, 1.0, chosen.truncated or rejected.truncated)]

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        seed = self.plan.training.seed
        model = load_with_head(AutoModelForSequenceClassification, folder, seed, num_labels=1, **options)
        # causal models read their score at the last token that is no padding
        model.config.pad_token_id = padding_id(self.processor)
        return model

    def head_modules(self, model: nn.Module) -> Sequence[str]:
        return head_modules(model)

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        import torch

        rows = [example.features[f"{side}_input_ids"] for side in SIDES for example in examples]
        inputs = {
            "input_ids": pad_rows(rows, padding_id(self.processor), device),
            "attention_mask": length_mask([len(row) for row in rows], device),
        }
        # of each pair's two numbers the first is the better one's
        labels = torch.zeros(len(examples), dtype=torch.long, device=device)
        extras = {"indices": indices_of(examples), "examples": examples}
        return Batch(inputs, labels, float(len(examples)), extras)

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        """Score both answers of each pair: logits are [pairs, 2], the better one first."""
        scores = model(**batch.inputs).logits.float().reshape(2, -1)
        return Prediction(scores.T, batch.labels)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.predict(model, batch))

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        from torch.nn import functional

        scores = self.predict(model, batch).logits.double()
        margins = scores[:, 0] - scores[:, 1]
        losses, better = -functional.logsigmoid(margins), margins > 0
        sums = {
            "loss": [float(losses.sum())],
            "units": [float(len(losses))],
            "right": [float(better.sum())],
            "margin": [float(margins.sum())],
        }
        return Assessment(sums, _outcomes(self.processor, batch, losses, better))

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per pair, how often the better answer scores higher, and by how much on average."""
        sums = {name: values[0] for name, values in assessment.sums.items()}
        pairs = max(1.0, sums["units"])
        return {
            "loss": sums["loss"] / pairs,
            "accuracy": sums["right"] / pairs,
            "margin": sums["margin"] / pairs,
        }
