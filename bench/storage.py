"""Checkpoint bytes per second against bare boto3: `python -m bench.storage ENDPOINT BUCKET`, one JSON line.

The same bytes (weights and optimizer state of SmolLM2-135M in float32) go up and come down by boto3's own multipart
transfer with its default settings, and as a checkpoint: written, hashed, uploaded, manifest last; found, downloaded,
verified, loaded. Both take turns, and the first time of each doesn't count: it takes memory from the machine that those
after it find at hand. A file that one leaves is gone before the other begins: the kernel would still be writing it.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import boto3
import torch
from transformers import AutoModelForCausalLM

from bench.runs import median
from bench.workload import prepare
from tunesmith_api.artifacts import DataCursor
from tunesmith_api.plan import StoragePlan
from tunesmith_store.store import S3Store
from tunesmith_trainer.checkpoint import Checkpointer, RunState
from tunesmith_trainer.distributed.collectives import Group

__all__: list[str] = []

TIMES = 3


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one piece of work."""
    began = time.monotonic()
    work()
    return time.monotonic() - began


def in_turns(first: Callable[[], Any], second: Callable[[], Any], tidy: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of both. What one leaves is tidied up before the other begins, and doesn't count."""
    found: list[list[float]] = []
    for _ in range(1 + TIMES):
        found.append([])
        for work in (first, second):
            found[-1].append(timed(work))
            tidy()
    return median([pair[0] for pair in found[1:]]), median([pair[1] for pair in found[1:]])


def trained_model() -> tuple[Any, torch.optim.Optimizer]:
    """A model with an optimizer that has state, without the minutes that a real step would take."""
    model = AutoModelForCausalLM.from_pretrained(prepare().model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def main() -> None:
    """Measure both ways."""
    endpoint, bucket = sys.argv[1], sys.argv[2]
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    model, optimizer = trained_model()
    uri = f"s3://{bucket}/checkpoints"
    store = S3Store(StoragePlan(endpoint_url=endpoint))
    ours = Checkpointer(
        store=store, uri=uri, folder=folder / "ours", run_digest="bench", keep_last=1, keep_best=False, higher_is_better=False,
        describe={"max_steps": 1, "seed": 0, "attempt": 1}, group=Group(), log=lambda *_: None,
    )  # fmt: skip

    def save(step: int) -> None:
        ours.save(model, optimizer, RunState(step=step), DataCursor(epoch=0, step_in_epoch=step, examples_seen=8))
        ours.wait()

    steps = count(1)
    save(next(steps))
    size = sum(info.size for info in store.list(uri))
    plain, back = folder / "plain.bin", folder / "back.bin"
    with plain.open("wb") as file:
        for _ in range(size >> 20):
            file.write(torch.randint(0, 255, (1 << 20,), dtype=torch.uint8).numpy().tobytes())
    client = boto3.client("s3", endpoint_url=endpoint)
    up, plain_up = in_turns(
        lambda: save(next(steps)), lambda: client.upload_file(str(plain), bucket, "plain.bin"), ours.wait
    )
    plain.unlink()

    def tidy() -> None:
        ours.wait()
        back.unlink(missing_ok=True)

    fetch = partial(client.download_file, bucket, "plain.bin", str(back))
    down, plain_down = in_turns(lambda: ours.restore(model, optimizer), fetch, tidy)
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"bytes": size, "up": up, "down": down, "plainUp": plain_up, "plainDown": plain_down}))


if __name__ == "__main__":
    main()
