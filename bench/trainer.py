"""The figures of the trainer, each beside its peer in the same run. `measure` returns them; `__main__` prints them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.runs import Figures, compared, median, repeated, run_module
from bench.workload import Workload, prepare
from objectstore import ObjectStore

__all__ = ["FIGURES", "Bench"]

WARM = 2
"""Steps at the start of every run that don't count: caches, thread pools, the allocator."""


class Bench:
    """One bench: the workload, a store with it, and how often everything is run."""

    def __init__(self, runs: int, steps: int, folder: Path, store: ObjectStore) -> None:
        self.runs, self.steps, self.folder, self.store = runs, steps, folder, store
        self.work: Workload = prepare()
        self._count = 0

    @contextmanager
    def bucket(self) -> Iterator[str]:
        """A bucket of its own for one run; what the run leaves in it would fill the disk in the end."""
        self._count += 1
        base = self.store.ensure_bucket(f"bench-{self._count}")
        try:
            yield base
        finally:
            self.store.drop_bucket(base)

    @contextmanager
    def workload(self) -> Iterator[str]:
        """A bucket for one run, with model and data."""
        with self.bucket() as base:
            self.store.put_folder(self.work.model, f"{base}/model")
            for name in ("train", "eval"):
                self.store.put_file(getattr(self.work, name), f"{base}/{name}.jsonl")
            yield base

    def ours(self, *options: str, ranks: int = 1, steps: int | None = None) -> list[Figures]:
        """Our loop under torchrun's variables; each rank's figures."""
        count = str((steps or self.steps) + WARM)
        scratch = tempfile.mkdtemp(prefix="bench", dir=self.folder)
        own = (f"endpoint={self.store.endpoint_url}", f"warm={WARM}", f"scratch={scratch}")
        environment = self.store.environment()
        try:
            with self.workload() as base:
                arguments = (base, count, *own, *options)
                return run_module("bench.ours", *arguments, ranks=ranks, threads=2 // ranks, environment=environment)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def peer(self, name: str, evaluate: bool = False) -> Figures:
        """Transformers' Trainer or TRL's, alone on both cores."""
        found = run_module("bench.peers", name, str(self.steps + WARM), *(["evaluate"] if evaluate else []))[0]
        found["secondsPerStep"] = found["secondsPerStep"][WARM:]
        return found

    # ---- the figures

    def tokens_vs_hf_trainer(self) -> Figures:
        """Useful tokens per second against transformers.Trainer, and the held-out loss after the same steps."""

        def compare(ours: Figures, theirs: Figures) -> Figures:
            # both see the same examples in each step: the ratio of tokens per second is that of seconds, inverted
            return {
                "tokens_vs_hf_trainer": median(theirs["secondsPerStep"]) / median(ours["secondsPerStep"]),
                "loss_gap_percent": 100 * abs(ours["evalLoss"] - theirs["evalLoss"]) / theirs["evalLoss"],
            }

        return compared(self.runs, lambda: self.ours("evaluate=1")[0], lambda: self.peer("hf", evaluate=True), compare)

    def tokens_vs_trl_packed(self) -> Figures:
        """Useful tokens per second against TRL's SFTTrainer with packing, padding left out."""

        def rate(run: Figures) -> float:
            return float(run["tokensPerStep"]) / median(run["secondsPerStep"])

        def compare(ours: Figures, theirs: Figures) -> Figures:
            return {"tokens_vs_trl_packed": rate(ours) / rate(theirs)}

        return compared(self.runs, lambda: self.ours()[0], lambda: self.peer("trl"), compare)

    def step_time_vs_torchrun(self) -> Figures:
        """Seconds per step under Ray against the same loop without it; 2 ranks, a core each."""

        def compare(ray: Figures, plain: Figures) -> Figures:
            # step by step: both see the same examples in a step, and some steps have more of them to learn
            pairs = zip(ray["secondsPerStep"], plain["secondsPerStep"], strict=True)
            return {"step_time_vs_torchrun": median([mine / other for mine, other in pairs])}

        steps = 4 * self.steps  # a difference of a few percent takes a longer look
        return compared(self.runs, lambda: self._under_ray(steps), lambda: self.ours(ranks=2, steps=steps)[0], compare)

    def _under_ray(self, steps: int) -> Figures:
        with self.workload() as base, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as scratch:
            return self._run_by_cli(base, Path(scratch), steps + WARM)

    def _run_by_cli(self, base: str, scratch: Path, steps: int) -> Figures:
        plan = self.work.plan(base, steps)
        spec: dict[str, Any] = {
            "task": "ChatSFT", "model": {"uri": f"{base}/model"}, "dataset": {"train": {"uri": f"{base}/train.jsonl"}},
            "method": {"type": "Full"}, "workers": {"replicas": 2, "resources": {"cpu": "1", "memory": "6Gi"}},
            "training": {
                "maxSteps": steps, "learningRate": 2e-5, "lrSchedulerType": "constant", "weightDecay": 0,
                "globalBatchSize": plan.training.global_batch_size, "microBatchSize": plan.training.micro_batch_size,
                "maxLength": plan.training.max_length, "precision": "FP32", "seed": plan.training.seed,
            },
            "checkpoint": {"uri": f"{base}/checkpoints", "everySteps": 10_000}, "output": {"uri": f"{base}/tuned"},
            "storage": {"endpointURL": self.store.endpoint_url},
        }  # fmt: skip
        job = scratch / "job.json"
        head = {"apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bench"}}
        job.write_text(json.dumps({**head, "spec": spec}))
        command = [sys.executable, "-m", "tunesmith_cli", "run", "-f", str(job), "--work-dir", str(scratch)]
        environment = {**os.environ, **self.store.environment()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"tunesmith run failed:\n{(done.stdout + done.stderr)[-3000:]}")
        history = json.loads(self.store.get_bytes(f"{base}/tuned/metrics.json"))["history"]
        return {"secondsPerStep": [record["seconds"] for record in history[WARM:]]}

    def peak_memory_vs_plain(self) -> Figures:
        """Peak resident memory of a rank, checkpoints and all, against the plain loop; 2 ranks."""

        def plain() -> Figures:
            return max(
                run_module("bench.plain", str(self.steps + WARM), ranks=2, threads=1), key=lambda run: run["peakBytes"]
            )

        def ours() -> Figures:
            return max(self.ours("every=4", ranks=2), key=lambda run: run["peakBytes"])

        def compare(mine: Figures, other: Figures) -> Figures:
            return {"peak_memory_vs_plain": mine["peakBytes"] / other["peakBytes"]}

        return compared(self.runs, ours, plain, compare)

    def fsdp_memory_vs_ddp(self) -> Figures:
        """Bytes of weights and optimizer state on a rank; 2 ranks. The same every time: one run is enough."""
        fsdp, ddp = (self.ours(f"strategy={name}", ranks=2, steps=2) for name in ("FSDP", "DDP"))
        held = [max(run["stateBytes"] for run in runs) for runs in (fsdp, ddp)]
        return {"fsdp_memory_vs_ddp": held[0] / held[1]}

    def checkpoint_stall_percent(self) -> Figures:
        """Part of the training time that steps wait for checkpoints: every 25 steps of a full fine-tune to S3."""

        def once(_: int) -> Figures:
            ranks = self.ours("every=25", ranks=2, steps=2 * 25 - WARM)
            return {"checkpoint_stall_percent": max(100 * run["stallSeconds"] / run["trainSeconds"] for run in ranks)}

        return repeated(self.runs, once)

    def storage_vs_multipart(self) -> Figures:
        """Checkpoint bytes per second against a bare multipart copy of the same bytes."""

        def once(_: int) -> Figures:
            with self.bucket() as base:
                arguments = (self.store.endpoint_url, base.removeprefix("s3://"))
                run = run_module("bench.storage", *arguments, environment=self.store.environment())[0]
            return {
                "upload_vs_multipart": run["plainUp"] / run["up"],
                "restore_vs_multipart": run["plainDown"] / run["down"],
            }

        return repeated(self.runs, once)

    def seconds_to_first_step(self) -> Figures:
        """Seconds from apply to the first step in a real cluster of two nodes."""
        from bench.first_step import measure

        return {"seconds_to_first_step": measure(self.runs)}


FIGURES: tuple[Callable[[Bench], Figures], ...] = (
    Bench.tokens_vs_hf_trainer,
    Bench.tokens_vs_trl_packed,
    Bench.step_time_vs_torchrun,
    Bench.peak_memory_vs_plain,
    Bench.fsdp_memory_vs_ddp,
    Bench.checkpoint_stall_percent,
    Bench.storage_vs_multipart,
    Bench.seconds_to_first_step,
)


@contextmanager
def opened(runs: int, steps: int) -> Iterator[Bench]:
    """Start a store and clean up behind the bench, also when it is told to stop."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="bench") as scratch:
        folder = Path(scratch)
        with ObjectStore.start(folder / "store", die_with_parent=True) as store:
            yield Bench(runs, steps, folder, store)
