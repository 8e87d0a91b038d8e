"""`python -m suite FLOOR...`: run pytest per floor, stream its output, end with one JSON object of counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("unit", "component", "contract", "faults", "integration", "e2e")
LANES = (("integration", "e2e"), ("component", "unit", "contract", "faults"))
"""Floors that run one after the other, each lane beside the others: tests on a cluster mostly wait and leave cores idle, which the
rest computes on. The order puts what starts pods of its own beside the floor that computes least."""
NICENESS = 5
"""Of all lanes but the first: what a cluster's parts promise within seconds holds beside the rest, too."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Of torch, in the same lanes: threads that wait for one whose core is taken lose more than they win on small models."""
LAST_WORDS_SECONDS = 10.0
SHOWN_LINES = 12
"""Of each failure, said again at the end: the place itself may be thousands of lines further up."""


@dataclass(frozen=True)
class Counts:
    """How the tests of one floor ended."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0
    failures: tuple[str, ...] = ()
    """Of each that failed its name and the last lines of what pytest says of it."""


def read_counts(report: Path, exit_status: int) -> Counts:
    """Sum up a junit file. A run that broke off without one counts as a failure."""
    if not report.is_file():
        return Counts(failed=1, failures=("no report: pytest broke off",))
    total = skipped = failed = 0
    root = ET.parse(report).getroot()
    for suite in root.iter("testsuite"):
        total += int(suite.get("tests", 0))
        skipped += int(suite.get("skipped", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    failures = tuple(failures_in(root))
    if exit_status not in (0, 1, 5) and failed == 0:
        failed, failures = 1, (f"pytest ended with exit status {exit_status}",)
    return Counts(passed=max(0, total - skipped - failed), skipped=skipped, failed=failed, failures=failures)


def failures_in(root: ET.Element) -> Iterator[str]:
    """What failed, by name and last lines, of the root of a junit file."""
    for case in root.iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            lines = (problem.text or problem.get("message", "")).rstrip().splitlines()[-SHOWN_LINES:]
            yield "\n".join(
                [f"{case.get('classname', '')}::{case.get('name', '')}", *(f"    {line}" for line in lines)]
            )


def lanes_of(floors: Sequence[str]) -> list[list[str]]:
    """Those floors by lane, without empty lanes."""
    lanes = [[floor for floor in lane if floor in floors] for lane in LANES]
    return [lane for lane in lanes if lane]


def run_floor(floor: str, extra: Sequence[str], beside: bool = False, niceness: int = 0) -> Counts:
    """Run the tests below tests/<floor>; where others run beside it, each line says whose it is."""
    folder = ROOT / "tests" / floor
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        print(f"== {floor}", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", str(folder), f"--junit-xml={report}", "--durations=5", *extra]
        environment = os.environ | (ONE_THREAD if niceness else {})
        command = ["nice", "-n", str(niceness), *command] if niceness else command
        if beside:
            status = streamed(command, environment, f"{floor} | ")
        else:
            status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        counts = read_counts(report, status)
        print(f"== {floor}: {counts.passed} passed in {time.monotonic() - started:.0f} s", flush=True)
        return counts


def streamed(command: Sequence[str], environment: Mapping[str, str], mark: str) -> int:
    """Run a command, print its lines behind a mark, return its exit status."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    lines = process.stdout

    def copy() -> None:
        for line in lines:
            # one write, so that lines of two floors never mix
            sys.stdout.write(f"{mark}{line.rstrip(os.linesep)}\n")
            sys.stdout.flush()

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    status = process.wait()
    copying.join(LAST_WORDS_SECONDS)  # whatever a failed test left running may hold the pipe open
    return status


def run_lanes(lanes: Sequence[Sequence[str]], extra: Sequence[str]) -> dict[str, Counts]:
    """Run lanes side by side, the floors of each one after the other."""
    interrupted = threading.Event()

    def run(number: int) -> dict[str, Counts]:
        beside, niceness = len(lanes) > 1, NICENESS if number else 0
        floors = (floor for floor in lanes[number] if not interrupted.is_set())
        return {floor: run_floor(floor, extra, beside, niceness) for floor in floors}

    with ThreadPoolExecutor(len(lanes)) as pool:
        try:
            return {floor: counts for lane in pool.map(run, range(len(lanes))) for floor, counts in lane.items()}
        except KeyboardInterrupt:  # which the floors under way have got, too
            interrupted.set()
            raise


def main() -> int:
    """Run the floors named on the command line, or all; arguments after `--` go to pytest."""
    arguments = sys.argv[1:]
    extra = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    results = run_lanes(lanes_of([name for name in arguments if name in FLOORS] or FLOORS), extra)
    passed = sum(counts.passed for counts in results.values())
    failed = sum(counts.failed for counts in results.values())
    skipped = sum(counts.skipped for counts in results.values())
    for floor, counts in results.items():
        for failure in counts.failures:
            print(f"FAILED {floor}: {failure}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    summary = {floor: results.get(floor, Counts()).passed for floor in FLOORS}
    print(json.dumps({**summary, "skipped": skipped, "failed": failed}), flush=True)
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
