"""Low-rank adapters (Hu et al., 2021) by PEFT: added by `loop`, merged by `export`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_api.plan import LoraPlan
from tunesmith_store.errors import UserError

__all__ = ["add_adapters", "merge_adapters"]


def add_adapters(model: nn.Module, plan: LoraPlan, seed: int) -> nn.Module:
    """Freeze the model and add trainable float32 adapters, the same on every rank.

    Raises:
        UserError: no layer is named like `targetModules`.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = list(plan.target_modules)
    if "all-linear" in targets:
        targets = "all-linear"
    config = LoraConfig(
        r=plan.r,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        layers = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        message = (
            f"spec.method.lora.targetModules {targets}: {error}; this model's linear layers are {', '.join(layers)} "
            "(or use all-linear)"
        )
        raise UserError(Reason.INVALID_SPEC, message) from error


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters into the base weights, in float32 and refusing NaN; return the bare model."""
    merged: nn.Module = model.float().merge_and_unload(safe_merge=True)
    return merged
