"""Rows on disk turned into examples on disk, by as many processes as the worker has CPUs where there are many rows.

Called by `preprocessing`. The processes share nothing but files: each reads its rows from the table and writes its own
part of the set, so the result is the same for any number of them.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith_store.errors import Failure, Retryable
from tunesmith_trainer.data.arrow_files import PartReader
from tunesmith_trainer.data.examples import ExampleWriter
from tunesmith_trainer.data.rows import BadRows
from tunesmith_trainer.data.table import RowTable
from tunesmith_trainer.tasks.base import BadRow, Task

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tunesmith_trainer.data.clean import Numbers

__all__ = ["Encoded", "encode"]

ROWS_PER_PROCESS = 10_000
"""Fewer are encoded sooner than a process is started and transformers imported."""
MOST_PROCESSES = 8
"""Each has its own copy of the libraries in memory."""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Encoded:
    """What came of the rows."""

    lengths: npt.NDArray[np.int32]
    """Tokens of each example."""
    truncated: int
    skipped: int
    """Examples left out since there is nothing to learn in them."""
    bad: int
    """Rows that couldn't be encoded."""
    units: float
    """What is learned: of all examples together."""
    largest_token: int
    longest: int
    """Tokens that stand in one line, at most."""
    turns: int
    """Of conversations: the assistant's turns that are learned."""
    unlearned_turns: int
    """Those that are not."""
    notes: Mapping[str, int]
    """What was done to examples so that they can be learned, and to how many."""

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.lengths)


@dataclass
class _Share:
    """A part of the rows, for one process; its counts come back."""

    task: Task
    folder: Path
    name: str
    rows: str
    numbers: Numbers
    bad: BadRows
    skipped: int = 0
    turns: int = 0
    unlearned_turns: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    failure: Failure | None = None

    def run(self, told: Callable[[int], None] = lambda done: None) -> None:
        """Encode the rows."""
        table = RowTable(self.folder, self.rows)
        with ExampleWriter(self.folder, self.name) as writer:
            for done, number in enumerate(map(int, self.numbers)):
                try:
                    examples = self.task.encode(table.row(number))
                except BadRow as error:
                    self.bad.refuse(table.where(number), error)
                    continue
                for part, example in enumerate(examples):
                    self.turns += example.turns
                    self.unlearned_turns += example.unlearned_turns
                    self.notes.update(example.notes)
                    if example.units:
                        writer.add(example, number, part)
                    else:
                        self.skipped += 1
                told(done + 1)


def encode(
    task: Task,
    folder: Path,
    name: str,
    rows: str,
    numbers: Numbers,
    bad: BadRows,
    cpus: float,
    told: Callable[[int], None],
    rows_per_process: int = ROWS_PER_PROCESS,
) -> Encoded:
    """Encode rows of a table into a set of examples.

    Args:
        task: encodes; it has been prepared.
        folder: where the table is and the set goes.
        name: of the set.
        rows: name of the table.
        numbers: of the rows, in the set's order.
        bad: takes rows that can't be encoded.
        cpus: how many CPUs the worker has.
        told: called with the number of rows done.
        rows_per_process: how many make another process worth its start.

    Raises:
        UserError: a row can't be encoded, and none may be left out.
        Retryable: a process was killed.
    """
    import numpy as np

    processes = min(int(cpus), len(os.sched_getaffinity(0)), len(numbers) // rows_per_process, MOST_PROCESSES)
    before = bad.count
    pieces = np.array_split(numbers, processes) if processes > 1 and _travels(task) else [numbers]
    shares = [
        _Share(task, folder, f"{name}-{number:03d}", rows, piece, BadRows(bad.policy))
        for number, piece in enumerate(pieces)
    ]
    if len(shares) == 1:
        shares[0].bad = bad
        shares[0].run(told)
    else:
        shares = _in_processes(shares, told)
        for share in shares:
            bad.add(share.bad)
            if share.failure is not None:
                raise share.failure
    parts = PartReader(folder, name)
    truncated = parts.column("truncated")
    return Encoded(
        parts.column("length").astype(np.int32),
        int(truncated.sum()),
        sum(s.skipped for s in shares),
        bad.count - before,
        float(parts.column("units").sum()),
        *_extremes(parts),
        sum(s.turns for s in shares),
        sum(s.unlearned_turns for s in shares),
        sum((s.notes for s in shares), Counter()),
    )


def _extremes(parts: PartReader) -> tuple[int, int]:
    """Return the largest number of a token, and the most tokens that stand in one line."""
    from pyarrow import compute

    largest = longest = 0
    for number in range(parts.batches):
        batch = parts.batch(number)
        for name in batch.schema.names:
            if name.endswith("input_ids"):
                column = batch.column(name)
                largest = max(largest, compute.max(compute.list_flatten(column)).as_py() or 0)
                longest = max(longest, compute.max(compute.list_value_length(column)).as_py() or 0)
    return largest, longest


def _travels(task: Task) -> bool:
    """Whether a task can be handed to another process; nearly every tokenizer can."""
    try:
        pickle.dumps(task)
    except Exception:  # whatever a processor's parts raise
        return False
    return True


def _in_processes(shares: list[_Share], told: Callable[[int], None]) -> list[_Share]:
    """Run each share in a process of its own; return them with their counts."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-encode-") as folder:
        files = [Path(folder) / f"{number}" for number in range(len(shares))]
        for share, file in zip(shares, files, strict=True):
            file.write_bytes(pickle.dumps(share))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "tunesmith_trainer.data.encoder"]
        children = [subprocess.Popen([*command, str(file)], env=environment, stdout=sys.stderr) for file in files]
        try:
            while any(child.poll() is None for child in children):
                told(sum(_done(file) for file in files))
                time.sleep(POLL_SECONDS)
        finally:
            for child in children:
                child.kill()
                child.wait()
        killed = [child.returncode for child in children if child.returncode]
        if killed:
            raise Retryable(
                f"a process that encodes rows ended with code {killed[0]}; its memory may not have sufficed"
            )
        return [pickle.loads(file.read_bytes()) for file in files]  # noqa: S301 - written by our own process


def _done(file: Path) -> int:
    try:
        return int(file.with_suffix(".done").read_text() or 0)
    except FileNotFoundError:
        return 0


def main(path: str) -> None:
    """Encode the share in a file, and write it back with its counts."""
    file = Path(path)
    share: _Share = pickle.loads(file.read_bytes())  # noqa: S301 - written by our own process

    parent = os.getppid()

    def told(done: int) -> None:
        if done % 1000 == 0:
            if os.getppid() != parent:
                sys.exit("the process that asked for this has ended")
            file.with_suffix(".done").write_text(str(done))

    try:
        share.run(told)
    except Failure as failure:
        share.failure = failure
    share.task, share.numbers = None, None  # type: ignore[assignment]
    file.write_bytes(pickle.dumps(share))


if __name__ == "__main__":
    main(sys.argv[1])
