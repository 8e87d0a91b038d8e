"""The report of a run: `report.html`, a page that needs nothing else, and `report.json`, the numbers behind it.

`loop` makes a `record.RunRecord` on rank 0 at the end of a run and calls `write`; `card.model_card` makes the model
card of the same record. No torch is needed to draw: `python -m tunesmith_trainer.report RECORD.json OUT.html` does it.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith_trainer.report.record import RunRecord

__all__ = ["PAGE", "RECORD", "RunRecord", "write"]

PAGE = "report.html"
RECORD = "report.json"


def write(record: RunRecord, folder: Path) -> Path:
    """Write page and record into an existing folder, and return the page's path."""
    from tunesmith_trainer.report.page import render

    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")
    page = folder / PAGE
    page.write_text(render(record), encoding="utf-8")
    return page
