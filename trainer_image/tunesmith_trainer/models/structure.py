"""The parts of a loaded model: its layers, linear layers, dropouts. Used by `assembly`, `distributed` and `methods`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError

__all__ = ["apply_dropout", "enable_gradient_checkpointing", "linear_layers", "replace", "transformer_blocks"]


def apply_dropout(model: nn.Module, p: float) -> None:
    """Set every dropout of a bare model: its Dropout modules, and the probabilities that modules and config name.

    Attention, for one, reads `attention_dropout` as a number. Layer drop and stochastic depth leave whole layers out:
    they are no dropout and stay.
    """
    owners: list[Any] = list(model.modules())
    config: Any = getattr(model, "config", None)
    if config is not None:
        owners += [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    for owner in owners:
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            owner.p = p
        for name, value in list(vars(owner).items()):
            if _is_dropout(name) and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(owner, name, p)


def _is_dropout(name: str) -> bool:
    return any(part in name for part in ("dropout", "pdrop", "drop_prob", "drop_rate")) and "path" not in name


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Compute activations again in the backward pass. Works with frozen weights below adapters, too.

    Raises:
        UserError: transformers can't do it for this model.
    """
    bare: Any = model
    if not getattr(bare, "supports_gradient_checkpointing", False):
        message = f"spec.training.gradientCheckpointing: {type(model).__name__} doesn't offer it: set it to false"
        raise UserError(Reason.INVALID_SPEC, message)
    # the reentrant kind gives adapters no gradient unless the frozen embeddings are made to ask for one
    bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return a model's layers, of all its stacks, in order: what transformers says may not be split.

    Where it says nothing, the elements of the longest list of modules.
    """
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    found = [module for module in model.modules() if type(module).__name__ in names]
    if found:
        return found
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def linear_layers(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Return the linear layers by name: all but the output head and those in or below the modules in `exclude`."""
    bare: Any = model
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
        if not any(name == other or name.startswith(f"{other}.") for other in exclude)
    }


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
