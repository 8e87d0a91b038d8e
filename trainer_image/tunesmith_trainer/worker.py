"""The bridge between Ray Train's worker process and `loop`: ranks, device, and errors in words. Started by `driver`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_store.store import S3Store
from tunesmith_trainer import rendezvous
from tunesmith_trainer.environment import PodEnvironment
from tunesmith_trainer.group import join_group, lost_peer
from tunesmith_trainer.loop import TrainingRun
from tunesmith_trainer.progress import ProgressPusher

__all__ = ["run"]


def run(run_digest: str) -> dict[str, Any]:
    """Train as one rank of Ray Train's group; return the RunResult as plain data."""
    import ray.train

    pod = PodEnvironment.read()
    plan = pod.plan()
    torch.set_num_threads(pod.threads)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    pusher = ProgressPusher(plan.head_host, pod.token) if rank == 0 else None
    if pusher:
        pusher.phase("workersStarted")
    pod.interrupted_file.unlink(missing_ok=True)
    with _announced(pod), _in_words(plan):
        device = torch.device("cuda" if plan.gpus_per_worker else "cpu")
        group = join_group(rank, world_size, rendezvous.address(), device)
        try:
            result = TrainingRun(plan, pod, group, S3Store(plan.storage), run_digest, pusher).run()
        finally:
            if pusher:
                pusher.close()
        if world_size > 1:
            dist.destroy_process_group()
    return {
        **asdict(result),
        "model": result.model.to_json() if result.model else None,
        "checkpoint": result.checkpoint.to_json() if result.checkpoint else None,
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


@contextmanager
def _in_words(plan: TrainingPlan) -> Iterator[None]:
    """Turn running out of memory and lost peers into what helps."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(plan, error) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise _out_of_memory(plan, error) from error
        if lost := lost_peer(error):
            raise lost from error
        raise


def _out_of_memory(plan: TrainingPlan, error: BaseException) -> UserError:
    training = plan.training
    where = "GPU memory" if plan.gpus_per_worker else "memory"
    message = (
        f"a worker ran out of {where} ({_memory_numbers()}) with microBatchSize {training.micro_batch_size} and "
        f"maxLength {training.max_length}; halve spec.training.microBatchSize (the result stays the same), lower "
        f"maxLength or raise spec.workers.resources.memory. {str(error).splitlines()[0][:300] if str(error) else ''}"
    )
    return UserError(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)


def _memory_numbers() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak = torch.cuda.max_memory_allocated()
        return f"peak {peak / 2**30:.1f} GiB, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return f"this process at most {int(status['VmHWM'].split()[0]) / 2**20:.1f} GiB"
