"""Runs one measurement as a process of its own and reads the JSON object that it prints last. Used by all of bench.

A process of its own, since memory, thread pools and caches of one run would colour the next.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = [
    "Figures", "Reach", "Skipped", "compared", "free_port", "measure_all", "median", "repeated", "run_module", "say",
    "show_verdicts", "verdict",
]  # fmt: skip

Figures = dict[str, Any]
Reach = Mapping[str, tuple[str, float]]
"""Figure → "≤", "≥" or "±" (within), and the bound."""


class Skipped(Exception):
    """What a figure needs isn't on this machine; the message says what, and what brings it."""


def say(text: str) -> None:
    """Tell people how far it is; results go to standard output, this to standard error."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def verdict(name: str, value: object, reach: Reach) -> str:
    """One line for people: the figure, what was to be reached, whether it was."""
    if isinstance(value, dict) and "total" in value.get("warm", value):
        value = value.get("warm", value)["total"]
    if not isinstance(value, int | float):
        return f"{name:32} {json.dumps(value)}"
    if name not in reach:
        return f"{name:32} {value:9.3f}"
    sign, bound = reach[name]
    reached = {"≤": value <= bound, "≥": value >= bound, "±": abs(value) <= bound}[sign]
    return f"{name:32} {value:9.3f}   reach {sign} {bound:g}   {'reached' if reached else 'MISSED'}"


def show_verdicts(reach: Reach) -> Callable[[str, Figures], None]:
    """What `measure_all` shows people of each measurement."""

    def show(_: str, found: Figures) -> None:
        print(*(verdict(key, value, reach) for key, value in found.items()), sep="\n", file=sys.stderr)

    return show


def measure_all(measurements: Mapping[str, Callable[[], Figures]], show: Callable[[str, Figures], None]) -> int:
    """Measure one after the other, print all figures as one JSON object; 1 where one couldn't be measured, else 0."""
    results: Figures = {}
    failed = []
    for name, measure in measurements.items():
        say(f"measuring {name}")
        try:
            found = measure()
        except Skipped as reason:
            say(f"{name} is skipped: {reason}")
            results[name] = {"skipped": str(reason)}
            continue
        except RuntimeError as error:  # the other figures are worth having
            failed.append(name)
            say(f"{name} could not be measured: {error}")
            continue
        results |= found
        show(name, found)
    if failed:
        say(f"not measured: {', '.join(failed)}")
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in results.items()}))
    return 1 if failed else 0


def median(values: Sequence[float]) -> float:
    """The median, as a plain float."""
    return float(statistics.median(values))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_module(
    module: str, *arguments: str, ranks: int = 1, threads: int = 2, environment: Mapping[str, str] | None = None
) -> list[Figures]:
    """Run `python -m module` on `ranks` processes under torchrun's variables; return each rank's last JSON line.

    Raises:
        RuntimeError: a process failed; with the end of what it said.
    """
    port = free_port()
    processes = []
    for rank in range(ranks):
        variables = {
            **os.environ,
            **(environment or {}),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, "-m", module, *arguments]
        processes.append(
            subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    results = []
    for process in processes:
        out, err = process.communicate(timeout=1800)
        if process.returncode:
            raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{err[-3000:]}")
        results.append(json.loads(out.strip().splitlines()[-1]))
    return results


def repeated(runs: int, once: Callable[[int], Figures]) -> Figures:
    """Run a measurement, which is told its number from 0, tell what it gave; return the median of each figure."""
    found = []
    for number in range(runs):
        found.append(once(number))
        given = ", ".join(f"{name} {value:.3f}" for name, value in found[-1].items())
        say(f"run {number + 1} of {runs}: {given}")
    return {name: median([figures[name] for figures in found]) for name in found[0]}


def compared(
    runs: int,
    ours: Callable[[], Figures],
    theirs: Callable[[], Figures],
    compare: Callable[[Figures, Figures], Figures],
) -> Figures:
    """Run two measurements in turns, so that both see the same moods of the machine; return the medians of `compare`."""

    def once(number: int) -> Figures:
        # who begins alternates: neither always finds the warmer machine
        mine, other = (ours(), theirs()) if number % 2 == 0 else (theirs(), ours())[::-1]
        return compare(mine, other)

    return repeated(runs, once)
