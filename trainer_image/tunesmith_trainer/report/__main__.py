"""`python -m tunesmith_trainer.report RECORD.json OUT.html`: draw a report again from its record."""

from __future__ import annotations

import argparse
from pathlib import Path

from pydantic import ValidationError

from tunesmith_trainer.report.page import render
from tunesmith_trainer.report.record import RunRecord


def main() -> int:
    """Draw the page and return the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith_trainer.report", description=__doc__)
    parser.add_argument("record", type=Path, help="a report.json")
    parser.add_argument("page", type=Path, help="where the HTML page goes")
    arguments = parser.parse_args()
    try:
        record = RunRecord.from_json(arguments.record.read_bytes())
    except (OSError, ValidationError) as error:
        parser.exit(2, f"{arguments.record} is no report.json of this version: {error}\n")
    arguments.page.write_text(render(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
