"""Our own loop without a cluster: `python -m bench.ours BASE STEPS [OPTION=VALUE…]` under torchrun's variables.

Prints figures of its rank as JSON: `secondsPerStep`, `tokensPerStep`, `evalLoss`, `peakBytes`, `stallSeconds`,
`stateBytes` (weights and optimizer state that this rank holds), `trainSeconds`.
Options: `strategy=FSDP`, `every=25` (checkpoints), `batch=8`, `endpoint=http://…`, `warm=2` (steps not counted), `evaluate=1`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.peers import encoded, held_out_loss
from bench.workload import prepare
from tunesmith_store.memory import peak_resident_bytes
from tunesmith_store.router import store_of
from tunesmith_trainer.distributed.collectives import join_group
from tunesmith_trainer.distributed.parallel import held_bytes
from tunesmith_trainer.loop.run import TrainingRun
from tunesmith_trainer.pod.environment import PodEnvironment

__all__: list[str] = []


class Measured(TrainingRun):
    """The loop as it is, but for the end: nothing is exported, the weights are looked at instead."""

    def _finish(self) -> Any:
        return self.checkpoints.newest


def main() -> None:
    """Run one rank."""
    base, steps = sys.argv[1], int(sys.argv[2])
    options = dict(argument.split("=", 1) for argument in sys.argv[3:])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = prepare()
    changes: dict[str, Any] = {"strategy": options.get("strategy", "DDP"), "replicas": world}
    if "every" in options:
        changes["checkpoint_every_steps"] = int(options["every"])
    if "batch" in options:
        changes["global_batch_size"] = int(options["batch"])
    plan = work.plan(base, steps, options.get("endpoint"), **changes)
    plan = plan.model_copy(update={"dataset": plan.dataset.model_copy(update={"eval": None})})
    # ranks share a pod's folder, as they do in a pod with several
    scratch = Path(options.get("scratch") or tempfile.mkdtemp(prefix="bench"))
    scratch.mkdir(parents=True, exist_ok=True)
    pod = PodEnvironment(
        index=0, ip="127.0.0.1", token="", scratch=scratch, plan_path=scratch / "plan.json",
        termination_log=scratch / "end", cpu_millicores=1000 * int(os.environ["OMP_NUM_THREADS"]),
    )  # fmt: skip
    group = join_group(rank, world, f"127.0.0.1:{os.environ['MASTER_PORT']}", torch.device("cpu"))
    run = Measured(plan, pod, group, store_of(plan), "bench")
    began = time.monotonic()
    run.run()
    warm = int(options.get("warm", 2))
    history = run.history.state.history[warm:]
    found = {
        "secondsPerStep": [record["seconds"] for record in history],
        "tokensPerStep": sum(record["tokens"] for record in history) / len(history),
        "peakBytes": peak_resident_bytes(),
        "stallSeconds": run.checkpoints.checkpointer.stall_seconds,
        "stateBytes": held_bytes(run.parts.bare, run.parts.optimizer),
        "trainSeconds": run.history.state.train_seconds,
        "wallSeconds": time.monotonic() - began,
    }
    if options.get("evaluate"):
        tokenizer = run.inputs.task.processor
        found["evalLoss"] = held_out_loss(run.parts.bare, encoded(work, tokenizer, work.rows(work.eval)))
    if "scratch" not in options:
        shutil.rmtree(scratch, ignore_errors=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
