"""From an assignment of Ray Train to `loop.run`: ranks, device, errors in words. Run by `training_process`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import distributed as dist

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import MemoryFacts
from tunesmith_store.errors import is_disk_full
from tunesmith_store.memory import memory_limit_bytes, peak_resident_bytes
from tunesmith_store.router import store_of
from tunesmith_trainer.distributed.collectives import Group, join_group
from tunesmith_trainer.errors import OutOfMemory, SmallerMicroBatch, full_disk
from tunesmith_trainer.group.handover import Assignment
from tunesmith_trainer.loop.run import TrainingRun
from tunesmith_trainer.pod.environment import PodEnvironment
from tunesmith_trainer.pod.progress import ProgressPusher

__all__ = ["run"]

_KEPT: list[object] = []
"""What is not taken apart before this process ends. Whoever lets go of a gloo group in Python holds the interpreter's
lock while it waits for gloo's thread, and that thread may need the lock to let go of its last work (PyTorch 2.13)."""


def run(assignment: Assignment) -> dict[str, Any]:
    """Train as one rank of Ray Train's group; return the RunResult as plain data."""
    pod = PodEnvironment.read()
    plan = pod.plan()
    torch.set_num_threads(pod.threads)
    rank, world_size = assignment.rank, assignment.world_size
    pusher = ProgressPusher(plan.head_host, pod.token, pod.progress_port) if rank == 0 else None
    if pusher:
        pusher.phase("workersStarted")
    pod.interrupted_file.unlink(missing_ok=True)
    with _announced(pod):
        device = torch.device("cuda" if plan.gpus_per_worker else "cpu")
        group = join_group(
            rank,
            world_size,
            assignment.address,
            device,
            plan.collective_timeout_seconds,
            name=pod.name_of(rank),
            local_world_size=pod.processes,
        )
        plan = _that_fits(plan, pod, group)
        run = TrainingRun(plan, pod, group, store_of(plan), assignment.run_digest, pusher)
        _KEPT.append(run)
        try:
            with _in_words(run):
                result = run.run()
        finally:
            if pusher:
                pusher.close()
        if world_size > 1:
            dist.destroy_process_group()
    return {
        **asdict(result),
        "model": result.model.to_json() if result.model else None,
        "checkpoint": result.checkpoint.to_json() if result.checkpoint else None,
        "dataset": result.dataset.to_json(),
    }


@contextmanager
def _announced(pod: PodEnvironment) -> Iterator[None]:
    """Let the pod's supervisor know that this process trains: on SIGTERM it waits for its checkpoint."""
    pod.ranks_folder.mkdir(parents=True, exist_ok=True)
    mark = pod.ranks_folder / str(os.getpid())
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)


def _that_fits(plan: TrainingPlan, pod: PodEnvironment, group: Group) -> TrainingPlan:
    """Return the plan with the smallest micro-batch that any pod has had to go down to."""
    own = int(pod.micro_batch_file.read_text()) if pod.micro_batch_file.exists() else plan.training.micro_batch_size
    training = plan.training.model_copy(update={"micro_batch_size": min(group.exchange(own))})
    return plan.model_copy(update={"training": training})


@contextmanager
def _in_words(run: TrainingRun) -> Iterator[None]:
    """Turn running out of memory, or of disk, into what helps."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(run, error) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            raise _out_of_memory(run, error) from error
        if is_disk_full(error):
            raise full_disk(run.pod.scratch, error) from error
        raise


def _out_of_memory(run: TrainingRun, error: BaseException) -> OutOfMemory | SmallerMicroBatch:
    plan, training = run.plan, run.plan.training
    memory = MemoryFacts(micro_batch_size=training.micro_batch_size, **_memory_numbers())
    where = "GPU memory" if plan.gpus_per_worker else "memory"
    half = training.micro_batch_size // 2
    if run.is_assembled and half:
        # the process ends, and with it whatever is in pieces in the GPU's memory; the pod and its GPU stay
        run.pod.micro_batch_file.write_text(str(half))
        return SmallerMicroBatch(
            f"a worker ran out of {where} with a micro-batch of {training.micro_batch_size}: going on with {half}, to "
            f"the same result; set spec.training.microBatchSize to {half} to have it from the start"
        )
    limit = f" of {memory.limit_bytes / 2**30:.1f}" if memory.limit_bytes else ""
    shared = run.pod.processes if not plan.gpus_per_worker else 1
    others = f", which {shared} processes share" if shared > 1 else ""
    message = (
        f"a worker ran out of {where} (at most {memory.peak_bytes / 2**30:.1f}{limit} GiB used{others}) with "
        f"microBatchSize {training.micro_batch_size} and maxLength {training.max_length}; halve "
        "spec.training.microBatchSize (the result stays the same), lower maxLength, set gradientCheckpointing, or "
        "raise spec.workers.resources.memory. "
        f"{str(error).splitlines()[0][:300] if str(error) else ''}"
    )
    return OutOfMemory(message, memory)


def _memory_numbers() -> dict[str, int]:
    if torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "limit_bytes": torch.cuda.mem_get_info()[1]}
    return {"peak_bytes": peak_resident_bytes(), "limit_bytes": memory_limit_bytes()}
