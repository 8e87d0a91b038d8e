"""The ranks of one run: how they find each other and what they agree on. Used by `loop` and `evaluate`.

With one rank there is no process group at all. Ray Train places the ranks and restarts them; tests start them without
Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from tunesmith_store.errors import Retryable

__all__ = ["Group", "join_group", "lost_peer"]

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Group:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sums over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value (any small picklable object) on all ranks."""
        if self.world_size == 1:
            return value
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with its gradients averaged over ranks."""
        if self.world_size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def join_group(rank: int, world_size: int, address: str, device: torch.device) -> Group:
    """Join the process group whose rank 0 listens at `address` ("host:port"): NCCL on GPUs, else gloo."""
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, f"tcp://{address}", rank=rank, world_size=world_size, timeout=TIMEOUT)
    return Group(rank, world_size, device)


def lost_peer(error: RuntimeError) -> Retryable | None:
    """Return the Retryable that a collective's error means, if it means that a peer is gone.

    gloo raises plain RuntimeErrors whose text names its own source files.
    """
    text = str(error)
    signs = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL", "ncclRemoteError")
    if isinstance(error, dist.DistError) or any(sign in text for sign in signs):
        return Retryable(f"lost contact with another worker: {text.splitlines()[0][:200] if text else error!r}")
    return None
