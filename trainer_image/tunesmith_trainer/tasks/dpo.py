"""DPO: learning from a better and a worse answer, by the model itself and a frozen copy of how it began."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.task import PreferenceLoss
from tunesmith_store.errors import UserError
from tunesmith_trainer.tasks.base import IGNORE, Assessment, BadRow, Batch, Example, Prediction, Row, Task
from tunesmith_trainer.tasks.causal_lm import LanguageTask
from tunesmith_trainer.tasks.collator import indices_of
from tunesmith_trainer.tasks.preference import assessment_of, changeable_prompts, per_pair, won
from tunesmith_trainer.tasks.preference_pairs import SIDES, PairEncoder, read_pair

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["DPO"]


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
        self.beta = plan.preference.beta
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
        return changeable_prompts(row, self.plan.dataset.columns)

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
        sides = [_of_side(example, side) for side in SIDES for example in examples]
        batch = super().collate(sides, device, packed)
        extras = {**batch.extras, "indices": indices_of(examples), "examples": examples}
        return replace(batch, units=float(len(examples)), extras=extras)

    def pieces_of(self, example: Example) -> list[tuple[str, bool]]:
        """Of the preferred answer, behind its prompt; the other one has the same prompt."""
        return super().pieces_of(_of_side(example, SIDES[0]))

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
        return assessment_of(self.processor, batch, losses, won(chosen, rejected), chosen=chosen, rejected=rejected)

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per pair; how often the better answer has the higher reward; mean rewards and their difference."""
        return {
            "loss": per_pair(assessment, "loss"),
            "rewardAccuracy": per_pair(assessment, "right"),
            "rewardMargin": per_pair(assessment, "chosen", "rejected"),
            "chosenReward": per_pair(assessment, "chosen"),
            "rejectedReward": per_pair(assessment, "rejected"),
        }


def _of_side(example: Example, side: str) -> Example:
    """One answer of a pair, behind its prompt, as an example of a language model."""
    features = {name: example.features[f"{side}_{name}"] for name in ("input_ids", "labels")}
    return Example(features, example.length, 1.0)
