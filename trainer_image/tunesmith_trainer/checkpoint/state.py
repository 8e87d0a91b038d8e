"""What a checkpoint remembers: the run's numbers, and the tensors of a model and its optimizer under stable names.

`snapshot` collects them, `restore` fills them again. A tensor is known by its parameter's
name (`layers.0.weight`), one of the optimizer's by `<parameter>:<its name>` (`layers.0.weight:exp_avg`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import partial

import torch
from torch import nn

from tunesmith_trainer.checkpoint.optimizer_state import portable_state

__all__ = ["Held", "RunState", "held_tensors", "is_optimizer_key", "trained_parameters", "trained_tensors"]

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
    """What happened on the way, for the report: `step`, `kind` (one of its IncidentKinds) and `text`."""
    bad_rows: int = 0
    """Training rows left out so far, where they are read while training."""
    first_bad_row: str = ""
    began_unix: float = field(default_factory=time.time)
    """When the run was first started, in seconds since 1970."""
    samples_before: list[str] = field(default_factory=list)
    """What the model answered to the report's questions before its first step."""
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
class Held:
    """A tensor as this rank holds it."""

    like: torch.Tensor
    """A tensor of its shape, sharded as it is; its values may be others'."""
    dtype: torch.dtype
    values: Callable[[], torch.Tensor]
    """Returns the tensor itself, or makes it where the optimizer keeps it in another form."""


def is_optimizer_key(key: str) -> bool:
    """Whether a key names something of the optimizer."""
    return ":" in key


def _stable(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of the bare model by their stable names."""
    return {_stable(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes in the bare model: trained parameters, and buffers that `state_dict` would hold.

    The tensors share their memory with the model.
    """
    found = {name: parameter.detach() for name, parameter in trained_parameters(model).items()}
    for prefix, module in model.named_modules():
        for name in sorted(set(module._buffers) - module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None:
                found[_stable(f"{prefix}.{name}" if prefix else name)] = buffer.detach()
    return found


def held_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Held]:
    """Return all that a checkpoint holds of the bare model and its optimizer, by key. Nothing is copied."""

    def held(tensor: torch.Tensor) -> Held:
        return Held(tensor, tensor.dtype, lambda: tensor)

    found = {name: held(tensor) for name, tensor in trained_tensors(model).items()}
    for name, parameter in trained_parameters(model).items():
        if "state1" in optimizer.state.get(parameter, {}):  # 8-bit: unpacked only once it is written
            found[f"{name}:step"] = held(torch.tensor(float(optimizer.state[parameter]["step"])))
            for part in ("exp_avg", "exp_avg_sq"):
                values = partial(_unpacked, optimizer, parameter, part)
                found[f"{name}:{part}"] = Held(parameter.detach(), torch.float32, values)
        else:
            for part, value in portable_state(optimizer, parameter).items():
                found[f"{name}:{part}"] = held(value.detach())
    return found


def _unpacked(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, part: str) -> torch.Tensor:
    return portable_state(optimizer, parameter)[part]
