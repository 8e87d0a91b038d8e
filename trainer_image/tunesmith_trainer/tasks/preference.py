"""What DPO and Reward have in common: how pairs of a better and a worse answer are counted and shown.

A pair is computed in one forward pass, all better answers of a batch first, then all worse ones: gradients are averaged
over ranks per forward pass, and a second one in the same loss would be averaged wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith_api.v1alpha1.dataset import Columns
from tunesmith_trainer.tasks.base import Assessment, Batch, Example, Outcome, Row
from tunesmith_trainer.tasks.fields import shorten
from tunesmith_trainer.tasks.preference_pairs import SIDES, read_pair, shared_length

if TYPE_CHECKING:
    import torch

__all__ = ["assessment_of", "changeable_prompts", "per_pair", "won"]

SHOWN_TOKENS = 64


def _answers_of(tokenizer: Any, example: Example) -> tuple[str, str]:
    """Return where the better and the worse answer differ, as short texts for the report."""
    chosen, rejected = (example.features[f"{side}_input_ids"] for side in SIDES)
    start = shared_length(chosen, rejected)

    def text(ids: Sequence[int]) -> str:
        return shorten(str(tokenizer.decode(ids[start : start + SHOWN_TOKENS], skip_special_tokens=True)).strip())

    return text(chosen), text(rejected)


def changeable_prompts(row: Row, columns: Columns) -> Mapping[str, str]:
    """Return the prompt of a checked row by its column, where it is a text of its own."""
    pair = read_pair(row, columns)
    # a prompt that the answers repeat can't be changed in one place
    return {columns.prompt: pair.prompt} if isinstance(pair.prompt, str) and pair.templated else {}


def won(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Return [pairs]: 1 where the better answer's number is the higher one, and a half for a tie.

    Before the first step of DPO all are ties: model and reference are the same. Counted as lost, every run would seem
    to begin at 0 %.
    """
    return (better > worse).double() + (better == worse).double() / 2


def _outcomes(tokenizer: Any, batch: Batch, losses: torch.Tensor, better: torch.Tensor) -> list[Outcome]:
    texts = [_answers_of(tokenizer, example) for example in batch.extras["examples"]]
    return [
        Outcome(index, loss, chosen, chosen if right > 0.5 else rejected)
        for index, loss, right, (chosen, rejected) in zip(
            batch.extras["indices"], losses.tolist(), better.tolist(), texts, strict=True
        )
    ]


def assessment_of(
    tokenizer: Any, batch: Batch, losses: torch.Tensor, better: torch.Tensor, **values: torch.Tensor
) -> Assessment:
    """Count the pairs of a batch, and show their answers by the tokenizer.

    Args:
        tokenizer: the model's.
        batch: has the examples and their indices among its extras.
        losses: [pairs].
        better: [pairs], whether the better answer came out as such, as `won` has it.
        values: [pairs] each; summed up under their names.
    """
    counted = {"loss": losses, "right": better, **values}
    sums = {name: [float(numbers.sum())] for name, numbers in counted.items()} | {"units": [float(len(losses))]}
    return Assessment(sums, _outcomes(tokenizer, batch, losses, better))


def per_pair(assessment: Assessment, plus: str, minus: str = "") -> float:
    """Return the mean over all pairs of one sum, or of the difference of two."""
    sums = assessment.sums
    total = sums[plus][0] - sums[minus][0] if minus else sums[plus][0]
    return total / max(1.0, sums["units"][0])
