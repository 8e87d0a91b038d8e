"""Records what the operator does, so that a change of structure can be proven to change no behaviour.

`python -m support.recording OUT.json [PYTEST ARGUMENTS]` runs the operator's component tests and writes, for each of
them, every write, event, status, requeue and poll in their order, as canonical JSON. Record before and after the
change: the two files are the same byte for byte, or the change is one of behaviour. Hypothesis draws the same examples
in every run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from support.fakecluster import FakeCluster
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.workqueue import WorkQueue

TESTS = str(Path(__file__).parents[1] / "component" / "operator")
SEAMS = (
    (FakeCluster, ("create", "patch", "delete", "apply_status", "record")),
    (WorkQueue, ("add_after", "backoff")),
    (Poller, ("follow",)),
)


def plain(value: Any) -> Any:
    """The value as JSON knows it."""
    if hasattr(value, "body") and hasattr(value, "resource"):
        return plain(value.body)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {it.name: plain(getattr(value, it.name)) for it in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


class Recorder:
    """A pytest plugin: calls at the seams, by test."""

    def __init__(self) -> None:
        self.records: dict[str, list[Any]] = {}
        self._calls: list[Any] = []

    def watch(self) -> None:
        """Note every call at the seams from now on."""
        for owner, names in SEAMS:
            for name in names:
                setattr(owner, name, self._noted(name, getattr(owner, name)))

    def _noted(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def noting(instance: Any, *arguments: Any, **named: Any) -> Any:
            self._calls.append([name, plain(arguments), plain(named)])
            return function(instance, *arguments, **named)

        return noting

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self._calls = self.records[item.nodeid.partition("component/operator/")[2]] = []


def main(out: str, *arguments: str) -> int:
    """Run the tests and write the file; return pytest's exit code."""
    hypothesis.settings.register_profile("recorded", derandomize=True, database=None)
    hypothesis.settings.load_profile("recorded")
    recorder = Recorder()
    recorder.watch()
    code = pytest.main([TESTS, "-q", "-p", "no:cacheprovider", *arguments], plugins=[recorder])
    calls = sum(len(found) for found in recorder.records.values())
    lines = [
        f"{json.dumps(name)}: {json.dumps(recorder.records[name], sort_keys=True)}" for name in sorted(recorder.records)
    ]
    Path(out).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(recorder.records)} tests, {calls} calls: {out}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
