"""The ranks of one run: how they find each other, what they agree on, and which of them hangs. Used by `loop`.

With one rank there is no process group at all. Ray Train places the ranks and restarts them; tests start them without
Ray.
"""

from __future__ import annotations

import itertools
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import Retryable

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Group", "HungCollective", "join_group"]

T = TypeVar("T")

POLL_SECONDS = 0.05
ROLL_CALL_SECONDS = 10.0
"""How long a rank that waited in vain listens for others that did: on a busy machine they are seconds behind."""
LOSS_SECONDS = 2.0
"""How long a rank that has lost another one listens whether the others wait in vain."""
TAKEN_SECONDS = 10.0


class HungCollective(Retryable):
    """A rank kept the others waiting in a collective operation for longer than is allowed."""

    def __init__(self, silent: Mapping[int, str], seconds: float) -> None:
        """`silent` has what to call each of them."""
        names = ", ".join(silent.values()) or "a rank"
        message = (
            f"{names} didn't take part in a collective operation for {seconds:.0f} s "
            "(spec.failurePolicy.collectiveTimeoutSeconds): it hangs, or its node or network is too slow"
        )
        super().__init__(message, Reason.COLLECTIVE_TIMEOUT, ExitCode.COLLECTIVE_TIMEOUT)
        self.ranks = list(silent)


@dataclass(frozen=True)
class Group:
    """This process among its peers."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout_seconds: float = 600.0
    local_world_size: int = 1
    """Ranks in this pod, which share its memory."""
    store: Any = None
    """The key-value store that rank 0 serves; None with one rank."""
    _turns: Iterator[int] = field(default_factory=itertools.count)
    _names: dict[int, str] = field(default_factory=dict)

    def name_of(self, rank: int) -> str:
        """Return what to call a rank: its number, and the worker that Ray Train has put it into."""
        key = f"name-{rank}"
        if rank not in self._names and self.store is not None and self.store.check([key]):
            self._names[rank] = self.store.get(key).decode()
        return self._names.get(rank, f"rank {rank}")

    def _introduce(self, name: str) -> None:
        """Tell the others what to call this rank, and ask for rank 0's name: it serves those of all."""
        self.store.set(f"name-{self.rank}", name)
        self._names[0] = self.store.get("name-0").decode()

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return [float(value) for value in tensor.tolist()]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sums over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise maxima over all ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def mesh(self, sizes: Mapping[str, int]) -> DeviceMesh:
        """Lay the ranks out in several dimensions, by their names; neighbours differ in the last one.

        Torch lets those along a dimension wait for each other for 10 or 30 minutes, whatever the whole group's timeout.
        """
        from torch.distributed.device_mesh import init_device_mesh

        found = init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        for name in sizes:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.timeout_seconds), found.get_group(name))
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def all_gather(self, value: T) -> list[T]:
        """Return every rank's value (any small picklable object), in order of rank, on all ranks."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        """Return rank 0's value (any small picklable object) on all ranks."""
        if self.world_size == 1:
            return value
        values = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, src=0, device=self.device)
        result: Any = values[0]
        return result

    def on_first(self, work: Callable[[], T]) -> T:
        """Have rank 0 do a piece of work that may take long, and return its result on all ranks.

        No collective: the others wait in the store, where no timeout takes them for hung.

        Raises:
            Retryable: rank 0 is gone.
        """
        if self.world_size == 1:
            return work()
        key = f"first-{next(self._turns)}"
        taken = [f"{key}-taken-{rank}" for rank in range(1, self.world_size)]
        if self.rank == 0:
            result = work()
            self.store.set(key, pickle.dumps(result))
            # this process serves the store: it may be at its end, but not before the others have read
            self._until(lambda: self.store.check(taken), TAKEN_SECONDS)
            return result
        self._until(lambda: self.store.check([key]))
        value: T = pickle.loads(self.store.get(key))  # noqa: S301 - from rank 0 of this very job
        self.store.set(taken[self.rank - 1], b"1")
        return value

    def exchange(self, value: T) -> list[T]:
        """Do what `all_gather` does, for ranks that get there at very different times, as after a download.

        No collective: no timeout takes those that wait for hung.

        Raises:
            Retryable: rank 0 is gone.
        """
        if self.world_size == 1:
            return [value]
        turn = next(self._turns)
        names = [f"exchange-{turn}-{rank}" for rank in range(self.world_size)]
        self.store.set(names[self.rank], pickle.dumps(value))
        self._until(lambda: self.store.check(names))
        values = [pickle.loads(self.store.get(name)) for name in names]  # noqa: S301 - from ranks of this very job
        gone = f"exchange-{turn}-gone"
        self.store.add(gone, 1)
        if self.rank == 0:  # who serves the store leaves last
            self._until(lambda: self.store.add(gone, 0) == self.world_size, TAKEN_SECONDS)
        return values

    def mark(self, name: str) -> None:
        """Let the ranks go on that wait in `await_mark`."""
        if self.store is not None:
            self.store.set(f"mark-{name}", b"1")

    def await_mark(self, name: str) -> None:
        """Wait until another rank has called `mark`, however long that takes; not with one rank.

        Raises:
            Retryable: rank 0 is gone.
        """
        self._until(lambda: self.store.check([f"mark-{name}"]))

    @staticmethod
    def _until(condition: Callable[[], bool], seconds: float = math.inf) -> None:
        deadline, pause = time.monotonic() + seconds, POLL_SECONDS / 64
        while not condition() and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what collectives raise into words.

        Raises:
            HungCollective: the wait for another rank took too long; names it.
            Retryable: another rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if _is_timeout(text):
                raise HungCollective(self._absent(), self.timeout_seconds) from error
            if isinstance(error, dist.DistError) or any(sign in text for sign in _SIGNS_OF_LOSS):
                # gloo takes a rank's connections down where one wait was too long, for those that come later as well
                if self._others_wait():
                    raise HungCollective(self._absent(), self.timeout_seconds) from error
                line = text.splitlines()[0][:200] if text else repr(error)
                raise Retryable(f"lost contact with another worker: {line}") from error
            raise

    def _absent(self) -> dict[int, str]:
        """Call the roll: all that wait in vain say so at about the same time, and who hangs doesn't."""
        if self.store is None:
            return {}
        missing = [{0: self._names[0]}]  # if the store doesn't answer either: rank 0 serves it

        def call() -> None:
            self.store.set(f"waited-{self.rank}", b"1")
            silent = {rank: self.name_of(rank) for rank in range(self.world_size)}

            def is_complete() -> bool:
                nonlocal silent
                silent = {rank: name for rank, name in silent.items() if not self._has_waited(rank)}
                missing[:] = [silent]
                return not silent

            self._until(is_complete, ROLL_CALL_SECONDS)

        _ask(call, 2 * ROLL_CALL_SECONDS)
        return missing[0]

    def _others_wait(self) -> bool:
        """Whether a rank has said within a moment that it waited in vain."""
        found = [False]

        def listen() -> None:
            def is_heard() -> bool:
                found[0] = any(self._has_waited(rank) for rank in range(self.world_size))
                return found[0]

            self._until(is_heard, LOSS_SECONDS)

        if self.store is not None:
            _ask(listen, 2 * LOSS_SECONDS)
        return found[0]

    def _has_waited(self, rank: int) -> bool:
        return bool(self.store.check([f"waited-{rank}"]))


def _ask(questions: Callable[[], None], seconds: float) -> None:
    """Ask the store, for so long at most. What was heard until it was gone counts."""

    def ask() -> None:
        with suppress(RuntimeError):  # rank 0 may end when it has heard enough itself, and the store with it
            questions()

    # a thread, since asking a store whose process hangs takes for ever
    thread = threading.Thread(target=ask, name="roll-call", daemon=True)
    thread.start()
    thread.join(seconds)


# gloo raises plain RuntimeErrors whose text names its own source files
_SIGNS_OF_LOSS = (
    "gloo/",
    "Connection closed by peer",
    "Connection reset by peer",
    "NCCL",
    "ncclRemoteError",
    "TCPStore",
)


def _is_timeout(text: str) -> bool:
    return "Timed out waiting" in text or "Watchdog caught collective operation timeout" in text


def join_group(
    rank: int,
    world_size: int,
    address: str,
    device: torch.device,
    timeout_seconds: float = 600.0,
    *,
    name: str = "",
    local_world_size: int = 1,
) -> Group:
    """Join the process group whose rank 0 listens at `address` ("host:port"): NCCL on GPUs, else gloo.

    `name` is what to call this rank where it is the one that keeps the others waiting.
    """
    if world_size == 1:
        return Group(device=device)
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_seconds)
    # the wait for slow pods at the start is longer than what a collective may take
    store = dist.TCPStore(host, int(port), world_size, is_master=rank == 0, timeout=max(timeout, timedelta(minutes=10)))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    shared = dist.PrefixStore("tunesmith", store)
    group = Group(rank, world_size, device, timeout_seconds, local_world_size, shared)
    group._introduce(name or f"rank {rank}")
    return group
