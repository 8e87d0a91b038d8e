"""What a checkpoint remembers: the run's numbers, and the tensors of a model and its optimizer under stable names.

`saving` collects them, `loading` fills them again. A tensor is known by its parameter's
name (`layers.0.weight`), one of the optimizer's by `<parameter>:<its name>` (`layers.0.weight:exp_avg`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError

__all__ = [
    "Numbers",
    "Room",
    "RunState",
    "Whole",
    "is_optimizer_key",
    "make_room",
    "optimizer_state",
    "trained_tensors",
]

Numbers = dict[str, int | float]
"""Plain numbers of an optimizer's state by key, such as the step count of bitsandbytes."""

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What torch.compile and activation checkpointing put into names: a checkpoint doesn't depend on them."""


@dataclass
class RunState:
    """What a run remembers besides tensors.

    One record per logged step or evaluation. No step is counted twice: a restart goes back to the state that its
    checkpoint holds.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    tokens: int = 0
    restarts: int = 0
    rollbacks: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    best_metric: float | None = None
    best_step: int = 0
    evaluations_without_improvement: int = 0
    events: list[dict[str, int | str]] = field(default_factory=list)
    """What went wrong and was healed: `step` and `text`."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the fp16 GradScaler; empty for other number formats."""

    def to_json(self) -> bytes:
        """Serialize."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> RunState:
        """Parse. Fields that an older version didn't write get their defaults; those of a newer one are left out.

        Raises:
            ValueError: it is no JSON object.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("the run's state is no JSON object")
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True)
class Whole:
    """Type and shape of a tensor over all ranks, as a checkpoint holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def is_optimizer_key(key: str) -> bool:
    """Whether a key names something of the optimizer."""
    return ":" in key


def _stable(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((_stable(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes in the bare model: trained parameters, and buffers that `state_dict` would hold.

    The tensors share their memory with the model.
    """
    found = {name: parameter.detach() for name, parameter in _trained(model)}
    for prefix, module in model.named_modules():
        lasting = set(module._buffers) - module._non_persistent_buffers_set
        for name in sorted(lasting):
            buffer = module._buffers[name]
            if buffer is not None:
                found[_stable(f"{prefix}.{name}" if prefix else name)] = buffer.detach()
    return found


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], Numbers]:
    """Return the optimizer's tensors, which share its memory, and its plain numbers.

    Raises:
        UserError: the optimizer keeps something for a sharded parameter that is not sharded like it.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: Numbers = {}
    for name, parameter in _trained(model):
        for part, value in optimizer.state.get(parameter, {}).items():
            key = f"{name}:{part}"
            if isinstance(value, int | float):
                numbers[key] = value
            elif isinstance(value, torch.Tensor):
                if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.numel() > 1:
                    message = (
                        "spec.training.optim: this optimizer's state can't be shared out over workers; "
                        "use adamw_torch, or strategy DDP"
                    )
                    raise UserError(Reason.INVALID_SPEC, message)
                tensors[key] = value.detach()
    return tensors, numbers


@dataclass(frozen=True)
class Room:
    """An optimizer's state that is yet to be filled; the optimizer learns of it by `install`."""

    tensors: dict[str, torch.Tensor]
    """To be filled, by key."""
    _states: list[tuple[nn.Parameter, dict[str, Any]]]

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer this state in place of its own."""
        for parameter, state in self._states:
            optimizer.state.pop(parameter, None)
            if state:
                optimizer.state[parameter] = state


def make_room(
    model: nn.Module, optimizer: torch.optim.Optimizer, wholes: Mapping[str, Whole], numbers: Numbers
) -> Room:
    """Make room for the state that a checkpoint describes.

    Tensors that the optimizer has already are used again where they fit: going back takes no second copy.

    Args:
        model: the bare model, whose parameters the optimizer holds.
        optimizer: it is not changed.
        wholes: all tensors of the checkpoint by key; those of the model are passed over.
        numbers: plain numbers of the state by key.
    """
    parts: dict[str, dict[str, Whole | int | float]] = {}
    for key, value in (*wholes.items(), *numbers.items()):
        if is_optimizer_key(key):
            name, _, part = key.rpartition(":")
            parts.setdefault(name, {})[part] = value
    settings = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    room = Room({}, [])
    for name, parameter in _trained(model):
        before = optimizer.state.get(parameter, {})
        state: dict[str, Any] = {}
        for part, value in parts.get(name, {}).items():
            if not isinstance(value, Whole):
                state[part] = value
                continue
            old = before.get(part)
            fits = isinstance(old, torch.Tensor) and (tuple(old.shape), old.dtype) == (value.shape, value.dtype)
            on_device = part != "step" or _steps_on_device(settings.get(id(parameter), {}))
            state[part] = old if fits else _empty(value, parameter, on_device)
            room.tensors[f"{name}:{part}"] = state[part].detach()
        room._states.append((parameter, state))
    return room


def _steps_on_device(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer counts steps where the parameter is: torch does so if it is fused or capturable."""
    return bool(settings.get("fused") or settings.get("capturable"))


def _empty(whole: Whole, parameter: nn.Parameter, on_device: bool) -> torch.Tensor:
    """Make a tensor for one part of a parameter's state, sharded as the parameter is where it has its shape."""
    if whole.shape and whole.shape == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=whole.dtype)
    return torch.zeros(whole.shape, dtype=whole.dtype, device=parameter.device if on_device else "cpu")
