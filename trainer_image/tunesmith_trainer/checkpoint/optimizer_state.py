"""An optimizer's state in a form that depends neither on its layout nor on the ranks. Used by `state` and `restore`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tunesmith_trainer.distributed.parallel import local_tensor

__all__ = ["portable_state", "restore_state"]

BLOCK = 256
"""Numbers of an 8-bit state that share a scale in bitsandbytes."""


def portable_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return a parameter's state as tensors of its own shape and layout, and scalars; empty before the first step.

    8-bit states are unpacked to float32 `exp_avg` and `exp_avg_sq`: so they can be shared out anew over another number
    of ranks. `restore_state` packs them again into the same codes.
    """
    state = optimizer.state.get(parameter, {})
    if "state1" not in state:
        return {
            name: value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
            for name, value in state.items()
            if value is not None
        }
    found = {"step": torch.tensor(float(state["step"]))}
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
        packed = state[f"state{number}"]
        whole = packed if packed.dtype is torch.float32 else _unpack(state, number)
        found[name] = _laid_out_like(parameter, whole)
    return found


def restore_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `portable_state` returned, on the parameter's device."""
    device = parameter.device
    if hasattr(optimizer, "get_state_buffer"):
        _restore_8bit(optimizer, parameter, state)
        return
    # the fused kernels read the step from where the parameter is, and as float32
    optimizer.state[parameter] = {name: value.to(device) for name, value in state.items()}


def _restore_8bit(optimizer: Any, parameter: nn.Parameter, state: Mapping[str, torch.Tensor]) -> None:
    place = next(
        (row, column)
        for row, group in enumerate(optimizer.param_groups)
        for column, other in enumerate(group["params"])
        if other is parameter
    )
    optimizer.init_state(optimizer.param_groups[place[0]], parameter, *place)
    kept = optimizer.state[parameter]
    kept["step"] = int(state["step"])
    for number, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
        whole = local_tensor(state[name]).to(parameter.device)
        if kept[f"state{number}"].dtype is torch.float32:
            kept[f"state{number}"].copy_(whole)
        else:
            _pack(kept, number, whole)


def _laid_out_like(parameter: nn.Parameter, part: torch.Tensor) -> torch.Tensor:
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    layout: Any = parameter
    laid: torch.Tensor = DTensor.from_local(
        part, layout.device_mesh, layout.placements, run_check=False, shape=layout.shape, stride=layout.stride()
    )
    return laid


def _unpack(state: Mapping[str, torch.Tensor], number: int) -> torch.Tensor:
    codes = state[f"state{number}"]
    values = state[f"qmap{number}"].index_select(0, codes.flatten().int())
    scales = state[f"absmax{number}"].repeat_interleave(BLOCK)[: len(values)]
    return (values * scales).view(codes.shape)


def _pack(state: Mapping[str, torch.Tensor], number: int, whole: torch.Tensor) -> None:
    """Write numbers that `_unpack` returned as codes and scales again.

    The scale of a block is its largest number, which has the code 1.0; a negative one has the lowest code, which is a
    little above -1.0 in bitsandbytes' table.
    """
    table, scales = state[f"qmap{number}"], state[f"absmax{number}"]
    flat = whole.flatten()
    blocks = nn.functional.pad(flat, (0, len(scales) * BLOCK - len(flat))).view(-1, BLOCK)
    largest = blocks.amax(1)
    if table[0] < 0:
        largest = torch.maximum(largest, blocks.amin(1) / table[0])
    scales.copy_(largest.clamp_min(0))
    relative = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(relative.flatten()[: len(flat)], middles)
    state[f"state{number}"].copy_(codes.view(whole.shape))
