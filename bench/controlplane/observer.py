"""Sees what a patient user would: when each object first shows something. A thread with watches of its own.

Used to wait for many objects without asking for them again and again, and to measure from one watch to another.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.controlplane.api import JSON, Api

__all__ = ["Observer", "condition", "job_marks", "status_marks"]

Marks = Callable[[JSON], Iterator[str]]


def condition(body: JSON, type_: str) -> JSON:
    """That condition of an object's status, or nothing."""
    return next((it for it in body.get("status", {}).get("conditions", ()) if it["type"] == type_), {})


def job_marks(body: JSON) -> Iterator[str]:
    """A Job is there; it is bound to succeed, or has."""
    yield "job"
    if any(condition(body, it).get("status") == "True" for it in ("SuccessCriteriaMet", "Complete")):
        yield "job-succeeding"


def status_marks(body: JSON) -> Iterator[str]:
    """A custom resource of ours is there; its summing condition has that reason; it has ended."""
    yield "there"
    summary = condition(body, "Succeeded") or condition(body, "Ready")
    yield f"reason:{summary.get('reason', '')}"
    if summary.get("status") == "True":
        yield "good"


class Observer:
    """`marks` says what an object of each path shows; the first time of each is kept, by the object's name."""

    def __init__(self, kubeconfig: Path, watched: dict[str, Marks]) -> None:
        self._seen: dict[str, dict[str, float]] = {}
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(kubeconfig, watched), daemon=True)
        self._thread.start()

    def _run(self, kubeconfig: Path, watched: dict[str, Marks]) -> None:
        async def work() -> None:
            async with Api(kubeconfig) as api:
                self._tasks = [
                    asyncio.ensure_future(api.follow(path, self._on(marks))) for path, marks in watched.items()
                ]
                await asyncio.gather(*self._tasks)

        try:
            self._loop.run_until_complete(work())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._failed = error

    def _on(self, marks: Marks) -> Callable[[str, JSON], None]:
        def event(change: str, body: JSON) -> None:
            now = time.time()
            name = body["metadata"]["name"]
            with self._changed:
                for mark in ("gone",) if change == "DELETED" else marks(body):
                    self._seen.setdefault(mark, {}).setdefault(name, now)
                self._changed.notify_all()

        return event

    def first(self, mark: str) -> dict[str, float]:
        """When each object first showed it, by name."""
        with self._changed:
            return dict(self._seen.get(mark, {}))

    def wait(self, mark: str, names: set[str], seconds: float, tell: Callable[[str], Any] = lambda _: None) -> float:
        """Wait until all of them have shown it; return the time at which the last one did.

        Raises:
            RuntimeError: it took too long, or the watches failed.
        """
        deadline, told = time.monotonic() + seconds, time.monotonic()
        with self._changed:
            while missing := names - self._seen.get(mark, {}).keys():
                if self._failed is not None:
                    raise RuntimeError(f"the observer's watches failed: {self._failed}")
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{len(missing)} of {len(names)} don't show {mark} after {seconds:.0f} s: {sorted(missing)[:3]}"
                    )
                if time.monotonic() - told > 15:
                    told = time.monotonic()
                    tell(f"{mark}: {len(names) - len(missing)} of {len(names)}")
                self._changed.wait(1)
            return max(self._seen[mark][name] for name in names)

    def close(self) -> None:
        """End the watches."""
        for task in self._tasks:
            self._loop.call_soon_threadsafe(task.cancel)
        self._thread.join(timeout=10)
