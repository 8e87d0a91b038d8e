"""Taking weights away before training: the smallest of each layer, or whole layers.

By magnitude (Han et al., 2015), with torch's own pruning and parametrization: a mask stands between the weights and all
that uses them, so no optimizer step can bring one back. By layers (Men et al., 2024: ShortGPT): those go that change
their input least, measured on the job's own data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.utils import parametrize, prune

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.structure import linear_layers
from tunesmith_trainer.tasks.base import Batch

__all__ = ["block_influence", "keep_sparse", "prune_layers", "remove_layers", "stay_sparse"]


class _Mask(nn.Module):
    """What a pruned weight is seen through."""

    kept: torch.Tensor

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        # a function of the base: no need to save it
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.kept


def keep_sparse(model: nn.Module, percent: int, exclude: Sequence[str] = ()) -> None:
    """Set the smallest weights of each linear layer to zero and keep them there, until `stay_sparse`.

    All layers but the output head and those named in `exclude`. The masks are a function of the loaded weights.
    """
    for layer in linear_layers(model, exclude).values():
        weight = layer.weight
        mask = prune.L1Unstructured(percent / 100).compute_mask(weight, torch.ones_like(weight))
        with torch.no_grad():
            weight.mul_(mask)
        parametrize.register_parametrization(layer, "weight", _Mask(mask.bool()))


def stay_sparse(model: nn.Module) -> None:
    """Take the masks off and leave zeros where they were."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def prune_layers(model: nn.Module, batches: Sequence[Batch], percent: int) -> tuple[int, ...]:
    """Remove the layers that do least; return their numbers. All ranks remove those that rank 0 chose.

    Raises:
        UserError: the model has no single stack of layers.
    """
    stack = _stack(model)
    count = min(len(stack) - 1, max(1, round(len(stack) * percent / 100)))
    if count < 1:
        message = "spec.method.pruning.type Layers: the model has one layer only: set Magnitude"
        raise UserError(Reason.INVALID_SPEC, message)
    influence = block_influence(model, batches)
    least = sorted(sorted(range(len(stack)), key=lambda number: influence[number])[:count])
    if dist.is_available() and dist.is_initialized():
        values: list[Any] = [least]
        dist.broadcast_object_list(values, src=0)
        least = values[0]
    remove_layers(model, least)
    return tuple(least)


def _stack(model: nn.Module) -> nn.ModuleList:
    """Return the one list of layers of a model.

    Raises:
        UserError: it has none, or several: an encoder and a decoder.
    """
    config: Any = model.config
    text = config.get_text_config()
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == getattr(text, "num_hidden_layers", None)
        and type(module[0]).__name__ in names
    ]
    if len(found) != 1 or getattr(config, "is_encoder_decoder", False):
        message = f"spec.method.pruning.type Layers needs a model of one stack of layers, not {type(model).__name__}"
        raise UserError(Reason.INVALID_SPEC, f"{message}: set Magnitude")
    return found[0]


@torch.no_grad()
def block_influence(model: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """Return how much each layer changes its input: 1 - the mean cosine of a token before and after it.

    Men et al. (2024), "ShortGPT", equation 1. Padding doesn't count.
    """
    stack = _stack(model)
    sums, counts = [0.0] * len(stack), [0] * len(stack)
    real: list[torch.Tensor | None] = [None]

    def note(number: int) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before = given[0] if given else named["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            mask = real[0]
            cosine = cosine[mask.bool()] if mask is not None and mask.shape == cosine.shape else cosine.flatten()
            sums[number] += float(cosine.sum())
            counts[number] += cosine.numel()

        return hook

    handles = [layer.register_forward_hook(note(number), with_kwargs=True) for number, layer in enumerate(stack)]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            real[0] = batch.inputs.get("attention_mask")
            model(**batch.inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [1 - total / max(1, count) for total, count in zip(sums, counts, strict=True)]


def remove_layers(model: nn.Module, numbers: Sequence[int]) -> None:
    """Take layers out of a model and its config, so that what is saved loads again."""
    stack = _stack(model)
    before = len(stack)
    kept = [number for number in range(before) if number not in set(numbers)]
    layers = [stack[number] for number in kept]
    while len(stack):
        del stack[-1]
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # where a layer keeps its keys when generating
        stack.append(layer)
    config: Any = model.config
    text = config.get_text_config()
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == before:  # what differs by layer, as `layer_types`
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)
