"""Quantization-aware training (Jacob et al., 2018): the forward pass sees weights as a later quantization rounds them.

The layers are torchao's FakeQuantizedLinear. The rounding is our own, since torchao has none that is GGUF's: with
groups of 32 it gives, bit for bit, what Q8_0 and Q4_0 will hold. Gradients pass through it unchanged (straight-through
estimator, Bengio et al., 2013) and move the float weights, which are what is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.method import QatScheme, QuantizationAwareTraining
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.structure import linear_layers, replace

__all__ = ["convert_qat", "prepare_qat", "rounded"]


def rounded(weight: torch.Tensor, scheme: QatScheme, group_size: int) -> torch.Tensor:
    """Return a weight as it comes out of quantization: [rows, columns] with groups of neighbours in a row.

    Int8 is GGUF's Q8_0: a group's scale is its largest magnitude / 127, rounding is to the nearest, halves away from 0.
    Int4 is Q4_0: the scale is the number of largest magnitude, with its sign, / -8, so that this one is hit exactly;
    the integers go from -8 to 7. Scales are held as float16. Source: ggml-quants.c, quantize_row_q8_0_ref, _q4_0_ref.
    """
    blocks = weight.float().reshape(-1, group_size)
    if scheme is QatScheme.INT8:
        scale = blocks.abs().amax(1, keepdim=True) / 127
        exact = blocks * _inverse(scale)
        integers = exact.sign() * (exact.abs() + 0.5).floor()
    else:
        place = blocks.abs().argmax(1, keepdim=True)
        scale = blocks.gather(1, place) / -8
        integers = (blocks * _inverse(scale) + 8.5).trunc().clamp(0, 15) - 8
    return (integers * scale.half().float()).view(weight.shape).to(weight.dtype)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


class _Rounding(nn.Module):
    """Stands in for torchao's fake quantizer of weights."""

    def __init__(self, scheme: QatScheme, group_size: int) -> None:
        super().__init__()
        self.scheme, self.group_size = scheme, group_size

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            change = rounded(weight, self.scheme, self.group_size) - weight
        return weight + change


def prepare_qat(model: nn.Module, settings: QuantizationAwareTraining, exclude: Sequence[str] = ()) -> int:
    """Make the linear layers compute with rounded weights; return how many do.

    All but the output head, which quantizations keep finer, those named in `exclude`, and those whose rows don't divide
    into groups.

    Raises:
        UserError: no layer's rows do.
    """
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    layers = linear_layers(model, exclude)
    fitting = {name: layer for name, layer in layers.items() if layer.in_features % settings.group_size == 0}
    if not fitting:
        widths = ", ".join(str(width) for width in sorted({layer.in_features for layer in layers.values()}))
        message = f"spec.method.qat.groupSize {settings.group_size} divides none of this model's layers ({widths} wide)"
        raise UserError(Reason.INVALID_SPEC, message)
    for name, layer in fitting.items():
        prepared: Any = FakeQuantizedLinear.from_linear(layer)
        prepared.weight_fake_quantizer = _Rounding(settings.scheme, settings.group_size)
        replace(model, name, prepared.train(layer.training))
    return len(fitting)


def convert_qat(model: nn.Module) -> None:
    """Turn the layers back into plain ones, with the weights that were trained, not rounded."""
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    for name, layer in list(model.named_modules()):
        if isinstance(layer, FakeQuantizedLinear):
            replace(model, name, layer.to_linear().train(layer.training))
