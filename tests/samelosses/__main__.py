"""`python -m samelosses BASE [HEAD]`: the same losses to the last bit before and after, for every task and method?

Runs the tests of every task (`--tests`) as each commit has them, one commit after the other, each in a git worktree in a
temporary folder, both in this environment with one thread, one hash seed and the CPU, and compares what their runs
published: each recorded step (loss, gradient norm, learning rate, tokens), the evaluations, the final metrics and the
digests of the weights. Nothing of the two commits is imported here, so modules may have moved between them. Times, speed
and memory are left out.

The last line is the verdict; the exit status is 1 where something that decides (`--only`) differs, where a test fails
in either commit, and where the commits' tests made different models or data: then nothing can be said (before the tests'
own tokenizer was learned the same each time, that was so wherever it is used). `-k` picks cases as in pytest. The same
commit as BASE and HEAD shows how far equal runs are equal at all. A commit takes four minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from samelosses import recorder
from samelosses.compare import PARTS, rows_of, table

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/component/trainer/test_trainer_every_task.py"
FIXED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
}
"""What could make equal runs differ, the same for both commits."""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of the commit, gone afterwards."""
    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def records_of(commit: str, tests: Sequence[str], chosen: str | None) -> list[dict[str, Any]]:
    """Run a commit's own tests; return what each of them left."""
    with tempfile.TemporaryDirectory(prefix="same-losses-") as scratch:
        folder, records = Path(scratch), Path(scratch) / "records.jsonl"
        records.touch()
        with checked_out(commit, folder / "tree") as tree:
            shutil.copy(recorder.__file__, folder / "same_losses_recorder.py")
            settings = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
            paths = [folder, *(tree / name for name in settings.get("pythonpath", []))]
            environment = {
                **os.environ,
                **FIXED,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "HF_HOME": str(folder / "hf"),
                recorder.RECORDS: str(records),
            }
            command = [sys.executable, "-m", "pytest", "-q", "-p", "same_losses_recorder", "-p", "no:cacheprovider"]
            command += [f"--basetemp={folder / 'tmp'}", *(["-k", chosen] if chosen else []), *tests]
            status = _status_of(command, tree, environment)
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise SystemExit(f"pytest ended with status {status} at {commit}: see above")
        return [json.loads(line) for line in records.read_text().splitlines()]


def _status_of(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Run a command to its end; nothing that it started is left, also where this process is interrupted."""
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True) as process:
        try:
            return process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="samelosses", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="the commit before")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="HEAD", help="the commit after (default: HEAD)")
    parser.add_argument("-k", dest="chosen", metavar="EXPR", help="only these cases, as in pytest")
    parser.add_argument("--only", metavar="PART,…", default=",".join(PARTS), help=f"what decides, of {','.join(PARTS)}")
    parser.add_argument("--tests", nargs="+", metavar="PATH", default=[TESTS], help=f"tests to run (default: {TESTS})")
    given = parser.parse_args()
    given.only = given.only.split(",")
    if unknown := set(given.only) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: choose from {','.join(PARTS)}")
    return given


def main() -> int:
    """Run both commits, print the table and the verdict."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the worktree goes first
    if git("status", "--porcelain"):
        print("warning: changes that are not committed take no part")
    names, sides = (given.base, given.head), []
    commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in names]
    for name, commit in zip(names, commits, strict=True):
        print(f"== {name}: {git('log', '-1', '--format=%h %s', commit)}", flush=True)
        began = time.monotonic()
        sides.append(records_of(commit, given.tests, given.chosen))
        print(f"== {name}: {len(sides[-1])} runs in {time.monotonic() - began:.0f} s", flush=True)
    rows = rows_of(*sides)
    print(*table(rows, given.only), sep="\n")
    same = [row for row in rows if row.is_same(given.only)]
    print(f"{len(same)} of {len(rows)} runs the same to the last bit in {', '.join(given.only)}")
    return 0 if rows and len(same) == len(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
