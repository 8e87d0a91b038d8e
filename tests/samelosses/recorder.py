"""A pytest plugin: after each test it writes down the numbers that the trainer left in the test's bucket.

`samelosses` copies this file out of its checkout and loads the copy into the pytest of either commit. So it imports
nothing of ours: all that it takes for granted are the fixtures `object_store` and `bucket`, and that a published model
has a `metrics.json` beside its weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECORDS = "SAME_LOSSES_RECORDS"
"""Names the file that gets one JSON object for each test."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    used = getattr(item, "funcargs", {})
    if call.when == "call" and {"object_store", "bucket"} <= set(used):
        record = {"test": item.name, "outcome": report.outcome, **left_in(used["object_store"], used["bucket"])}
        with Path(os.environ[RECORDS]).open("a") as file:
            file.write(json.dumps(record) + "\n")
    return report


def left_in(store: Any, bucket: str) -> dict[str, Any]:
    """What the test gave the trainer, and what the trainer published; weights and inputs as digests."""
    names = [uri.removeprefix(f"{bucket}/") for uri in store.list_keys(bucket)]
    folders = [name.rpartition("/")[0] for name in names if name.endswith("/metrics.json")]
    published = tuple(f"{folder}/" for folder in folders)

    def digests(chosen: list[str]) -> dict[str, str]:
        return {name: hashlib.sha256(store.get_bytes(f"{bucket}/{name}")).hexdigest() for name in chosen}

    inputs = [name for name in names if name.startswith("model/") or ("/" not in name and name.endswith(".jsonl"))]
    weights = [name for name in names if name.endswith(".safetensors") and name.startswith(published)]
    return {
        "inputs": digests(inputs),
        "weights": digests(weights),
        "runs": {folder: json.loads(store.get_bytes(f"{bucket}/{folder}/metrics.json")) for folder in folders},
    }
