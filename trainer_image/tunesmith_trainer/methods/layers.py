"""Finding and replacing the linear layers of a model. Used by the methods that change weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["linear_layers", "replace"]


def linear_layers(model: nn.Module, apart: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Return the linear layers by name: all but the output head and those in or below the modules named in `apart`."""
    bare: Any = model
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
        if not any(name == other or name.startswith(f"{other}.") for other in apart)
    }


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in the place of the one of this name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
