"""`python -m suite FLOOR...`: run pytest per floor, stream its output, end with one JSON object of counts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("unit", "component", "contract", "faults", "integration", "e2e")


@dataclass(frozen=True)
class Counts:
    """How the tests of one floor ended."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0


def read_counts(report: Path, exit_status: int) -> Counts:
    """Sum up a junit file. A run that broke off without one counts as a failure."""
    if not report.is_file():
        return Counts(failed=1)
    total = skipped = failed = 0
    for suite in ET.parse(report).getroot().iter("testsuite"):
        total += int(suite.get("tests", 0))
        skipped += int(suite.get("skipped", 0))
        failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    if exit_status not in (0, 1, 5) and failed == 0:
        failed = 1
    return Counts(passed=max(0, total - skipped - failed), skipped=skipped, failed=failed)


def run_floor(floor: str, extra: list[str]) -> Counts:
    """Run the tests below tests/<floor>."""
    folder = ROOT / "tests" / floor
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        print(f"== {floor}", flush=True)
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", str(folder), f"--junit-xml={report}", "--durations=5", *extra]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        counts = read_counts(report, status)
        print(f"== {floor}: {counts.passed} passed in {time.monotonic() - started:.0f} s", flush=True)
        return counts


def main() -> int:
    """Run the floors named on the command line, or all; arguments after `--` go to pytest."""
    arguments = sys.argv[1:]
    extra = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    floors = [name for name in arguments if name in FLOORS] or list(FLOORS)
    results = {floor: run_floor(floor, extra) for floor in floors}
    passed = sum(counts.passed for counts in results.values())
    failed = sum(counts.failed for counts in results.values())
    skipped = sum(counts.skipped for counts in results.values())
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    summary = {floor: results.get(floor, Counts()).passed for floor in FLOORS}
    print(json.dumps({**summary, "skipped": skipped, "failed": failed}), flush=True)
    return 0 if failed == 0 and passed > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
