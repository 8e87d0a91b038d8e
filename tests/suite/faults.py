"""`make faults-api`: run the tests below tests/faults and end with one JSON object of what was tried and survived.

The tests record it as properties of their results: `crash_points` and `kind:NAME` as survived/tried, `generated` and
`crashes` as numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from suite.__main__ import ROOT, read_counts


def survival(report: Path) -> dict[str, Any]:
    """Sum up what the tests of a junit file have recorded."""
    points, kinds = {"tried": 0, "survived": 0}, {}
    numbers = {"generated": 0, "crashes": 0}
    entries = ET.parse(report).getroot().iter("property") if report.is_file() else ()
    for entry in entries:
        name, value = entry.get("name", ""), entry.get("value", "")
        if name in numbers:
            numbers[name] += int(value)
        elif name == "crash_points" or name.startswith("kind:"):
            target = points if name == "crash_points" else kinds.setdefault(name[5:], {"tried": 0, "survived": 0})
            survived, _, tried = value.partition("/")
            target["survived"] += int(survived)
            target["tried"] += int(tried)
    return {"crash_points": points, "kinds": kinds, **numbers}


def main() -> int:
    """Return 1 where anything did not survive."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            str(ROOT / "tests" / "faults"),
            f"--junit-xml={report}",
            "--durations=5",
        ]
        counts = read_counts(report, subprocess.run(command, cwd=ROOT, check=False).returncode)
        print(json.dumps(survival(report)), flush=True)
    return 0 if counts.failed == 0 and counts.passed > 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())
