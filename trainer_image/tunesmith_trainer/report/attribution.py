"""Which words made a text classifier say what it said: integrated gradients on the input embeddings, by captum.

Sundararajan et al. (2017), "Axiomatic Attribution for Deep Networks". A token's score is its part of the difference
between the class's logit for the text and for the same text with every word blanked out. Called at the end of a run for
the held-out examples that the model got most wrong. Works for every sequence classifier of transformers that has input
embeddings (BERT-like and Llama-like), with or without adapters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith_trainer.report.record import WorstExample

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["TokenScore", "attribute", "explained"]

TokenScore = tuple[str, float]
"""A piece of the text as it stands there, and how much it spoke for the class; below 0: against it."""

STEPS = 16
"""Points of the path at which gradients are taken."""
AT_ONCE = 8
"""Points that are computed together: bounds memory."""
MOST_TOKENS = 256
BUDGET_SECONDS = 30.0
ZERO = 0.1
"""Part of the usual length of an embedding below which one counts as zero."""


@dataclass(frozen=True)
class _Inputs:
    ids: torch.Tensor
    """[1, tokens]"""
    blank: torch.Tensor
    """The same with every word replaced by a token that says nothing; special tokens stay."""
    others: dict[str, torch.Tensor]


def attribute(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    target: int | None = None,
    *,
    pair: str | None = None,
    steps: int = STEPS,
    max_length: int = MOST_TOKENS,
) -> list[TokenScore]:
    """Score the tokens of one text.

    Args:
        model: a sequence classifier without a wrapper (DDP), on any device. Its mode and gradients stay as they are.
        tokenizer: its fast tokenizer.
        text: the text.
        target: class number whose logit is explained; None for the one that the model puts first.
        pair: the second text of a pair.
        steps: points of the path; the error falls quickly with more.
        max_length: tokens that are looked at; the text behind them is shown as `…`.

    Returns:
        (piece, score) in the text's order. The pieces together are the text, of a pair both with a line break between.
    """
    import torch
    from captum.attr import LayerIntegratedGradients  # type: ignore[import-untyped]

    encoding = tokenizer(
        text, pair, truncation=True, max_length=max_length, return_tensors="pt", return_offsets_mapping=True
    )
    embeddings: Any = getattr(model, "get_input_embeddings")()  # noqa: B009 - nn.Module's own type hides it
    inputs = _inputs(tokenizer, encoding, embeddings)
    names = list(inputs.others)

    def logits(ids: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, **dict(zip(names, others, strict=True))).logits
        return found.float()

    was_training = model.training
    model.eval()
    try:
        if target is None:
            with torch.no_grad():
                target = int(logits(inputs.ids, *inputs.others.values())[0].argmax())
        with torch.enable_grad():
            found = LayerIntegratedGradients(logits, embeddings).attribute(
                inputs.ids,
                baselines=inputs.blank,
                additional_forward_args=tuple(inputs.others.values()),
                target=target,
                n_steps=steps,
                internal_batch_size=AT_ONCE,
            )
    finally:
        model.train(was_training)
    scores = found[0].detach().float().sum(-1).tolist()
    return _pieces(encoding, [text] if pair is None else [text, pair], scores)


def explained(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[WorstExample],
    *,
    budget_seconds: float | None = BUDGET_SECONDS,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[WorstExample, ...]:
    """Return the examples with attributions for the class that the model puts first.

    An error is logged and ends it: a model that can't be explained is still a trained model.

    Args:
        model: as for `attribute`.
        tokenizer: without a fast tokenizer the examples come back as they are.
        examples: worst first.
        budget_seconds: no further example is begun after that; None for no bound. Ranks that share out a model's layers
            (FSDP, tensor parallel) have to call this together, and without a bound.
        log: takes lines for people.
    """
    began = time.monotonic()
    done: list[WorstExample] = []
    if not getattr(tokenizer, "is_fast", False):
        return tuple(examples)
    for example in examples:
        if budget_seconds is not None and time.monotonic() - began > budget_seconds:
            break
        try:
            scores = attribute(model, tokenizer, example.text, pair=example.text_pair)
        except Exception as error:  # whatever a model's own code makes of captum's hooks
            log(f"warning: the report does without token attributions: {error}")
            break
        done.append(example.model_copy(update={"attributions": tuple(scores)}))
    return (*done, *examples[len(done) :])


def _inputs(tokenizer: Any, encoding: Any, embeddings: Any) -> _Inputs:
    import torch

    device = embeddings.weight.device
    ids = encoding["input_ids"].to(device)
    special = torch.tensor([[place is None for place in encoding.sequence_ids(0)]], device=device)
    names = [name for name in ("attention_mask", "token_type_ids") if name in encoding]
    return _Inputs(
        ids,
        torch.where(special, ids, torch.full_like(ids, _blank(tokenizer, embeddings))),
        {name: encoding[name].to(device) for name in names},
    )


def _blank(tokenizer: Any, embeddings: Any) -> int:
    """Return the token that stands for "nothing said": padding, or another special one.

    A padding token whose embedding is zero won't do: the first normalization divides by its length, so that nearly all
    of the change would happen in the first moment of the path, where no point lies.
    """
    known = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    candidates = [int(token) for token in known if token is not None] or [0]
    weight = embeddings.weight.detach()
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # sharded
    lengths = weight[candidates].float().norm(dim=-1)
    usual = weight[:1000].float().norm(dim=-1).median()
    long_enough = (lengths > ZERO * usual).tolist()
    return next((token for token, fits in zip(candidates, long_enough, strict=True) if fits), candidates[0])


def _pieces(encoding: Any, texts: Sequence[str], scores: Sequence[float]) -> list[TokenScore]:
    """Give each token the piece of text that it stands for, with the space before it; tokens of one character join."""
    pieces: list[TokenScore] = []
    reached = [0] * len(texts)
    current = 0
    spans = encoding["offset_mapping"][0].tolist()
    for place, (_, end), score in zip(encoding.sequence_ids(0), spans, scores, strict=True):
        if place is None:
            continue
        if place != current:
            pieces.append((texts[current][reached[current] :] + "\n", 0.0))
            reached[current], current = len(texts[current]), place
        if end > reached[place]:
            pieces.append((texts[place][reached[place] : end], score))
            reached[place] = end
        elif pieces:
            text, sum_so_far = pieces[-1]
            pieces[-1] = (text, sum_so_far + score)
    if reached[current] < len(texts[current]):
        rest = texts[current][reached[current] :]
        pieces.append((rest if len(rest) < 3 else " …", 0.0))
    return pieces
