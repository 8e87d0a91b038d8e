"""Requests that wait are answered together: one pass of the model costs little more for several texts than for one.

Used by the classifiers and encoders of the engine `Transformers`. All but the pass itself runs in the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

__all__ = ["Batcher", "Sized", "TooBusy", "next_batch"]

MOST_TOKENS = 512
"""Of one pass, padding included: beyond it a CPU gains nothing and those behind wait longer."""
MOST_PADDING = 0.25
"""Of one pass: more of it costs more than another pass."""
MOST_WAITING = 4096
"""Inputs: those beyond would wait for longer than anybody does."""


class Sized(Protocol):
    """An input of the model."""

    @property
    def length(self) -> int:
        """Tokens."""


class TooBusy(Exception):
    """More waits already than can be answered in time."""


T = TypeVar("T", bound=Sized)


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    item: Any
    answer: asyncio.Future[Any]


def next_batch(lengths: Sequence[int], most_tokens: int = MOST_TOKENS) -> list[int]:
    """Return the indices of what is computed next: the one that waits longest, and those nearest to it in length.

    All of them together, padded to the longest, stay within `most_tokens` and hold at most MOST_PADDING of padding.
    The first is always among them.
    """
    chosen, shortest_sum, longest = [0], lengths[0], lengths[0]
    for index in sorted(range(1, len(lengths)), key=lambda it: (abs(lengths[it] - lengths[0]), it)):
        padded = max(longest, lengths[index]) * (len(chosen) + 1)
        used = shortest_sum + lengths[index]
        if padded > most_tokens or padded - used > MOST_PADDING * padded:
            continue
        chosen.append(index)
        shortest_sum, longest = used, max(longest, lengths[index])
    return chosen


class Batcher:
    """A bounded queue before one thread that computes."""

    def __init__(
        self,
        compute: Callable[[Sequence[Any]], Sequence[Any]],
        most_tokens: int = MOST_TOKENS,
        most_waiting: int = MOST_WAITING,
    ) -> None:
        """`compute` gets a batch and returns an answer for each of it; it runs in a thread of its own."""
        self._compute = compute
        self._most_tokens, self._most_waiting = most_tokens, most_waiting
        self._waiting: list[_Waiting] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self._worker: asyncio.Task[None] | None = None
        self.passes = 0

    async def answers(self, items: Sequence[Sized]) -> list[Any]:
        """Return the model's answer to each item, in their order.

        Raises:
            TooBusy: the queue is full; none of them is computed.
        """
        if len(self._waiting) + len(items) > self._most_waiting:
            raise TooBusy(f"{len(self._waiting)} inputs wait already: try again later, or raise spec.replicas")
        loop = asyncio.get_running_loop()
        mine = [_Waiting(item, loop.create_future()) for item in items]
        self._waiting += mine
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return await asyncio.gather(*(it.answer for it in mine))
        finally:  # one failed, or nobody waits any more: the rest need not be computed
            for it in mine:
                it.answer.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._waiting = [it for it in self._waiting if not it.answer.done()]
            if not self._waiting:
                return
            picked = [self._waiting[i] for i in next_batch([it.item.length for it in self._waiting], self._most_tokens)]
            for it in picked:
                self._waiting.remove(it)
            self.passes += 1
            try:
                found = await loop.run_in_executor(self._thread, self._compute, [it.item for it in picked])
            except Exception as error:  # the next batch may succeed
                for it in picked:
                    if not it.answer.done():
                        it.answer.set_exception(error)
                continue
            for it, answer in zip(picked, found, strict=True):
                if not it.answer.done():
                    it.answer.set_result(answer)
