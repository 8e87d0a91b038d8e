"""Runs `TrainingRun` on one or several real gloo ranks without Ray. Imported by the tests beside it (see conftest.py)."""

import os
import socket
import traceback
from pathlib import Path

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.pod.environment import PodEnvironment

KEPT = []
"""What is never let go of, as in `tunesmith_trainer.group.worker`."""


SECONDS = 280
"""Within which ranks end, on a machine with much else to do; below pytest's own limit, which doesn't end them."""


class Stopped(Exception):
    """What a test stops a run with, in place of a crash."""


def pod_at(folder: Path, index: int = 0, processes: int = 1) -> PodEnvironment:
    folder.mkdir(parents=True, exist_ok=True)
    return PodEnvironment(
        index=index, ip="127.0.0.1", token="", scratch=folder, plan_path=folder / "plan.json",
        termination_log=folder / "termination", cpu_millicores=1000, processes=processes,
    )  # fmt: skip


def run_rank(
    plan,
    folder,
    rank,
    world_size,
    address,
    crash_after=None,
    stop_after=None,
    digest="digest",
    environment=None,
    own_pod=False,
    per_pod=1,
):
    """Train as one rank, in a pod of its own or in one with all the others; return the result, or the exception.

    With `per_pod`, in one with so many, as the operator makes them.
    """
    os.environ.update(environment or {})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from tunesmith_store.router import store_of
    from tunesmith_trainer.distributed.collectives import join_group
    from tunesmith_trainer.loop.run import TrainingRun

    torch.set_num_threads(1)
    # Ray gives ranks to pods in an order of its own, but pod by pod
    if own_pod or per_pod > 1:
        place = rank // per_pod
        pod = pod_at(Path(folder) / f"pod-{place}", world_size // per_pod - 1 - place, per_pod)
    else:
        pod = pod_at(Path(folder))
    group = join_group(
        rank, world_size, address, torch.device("cpu"), name=pod.name_of(rank), local_world_size=pod.processes
    )

    def after_step(step):
        if step == crash_after:
            run.checkpoints.checkpointer.wait()
            raise Stopped(step)
        if step == stop_after and rank == 0:
            pod.stop_file.touch()

    run = TrainingRun(plan, pod, group, store_of(plan), digest, after_step=after_step)
    KEPT.append(run)
    try:
        return run.run(), run.history.state
    except Exception as error:
        traceback.print_exc()  # the traceback doesn't cross processes: pytest shows it beside a failure
        return error, run.history.state
    finally:
        if world_size > 1:
            torch.distributed.destroy_process_group()


def free_address() -> str:
    """Return "host:port" of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_ranks(pool, plan: TrainingPlan, folder: Path, world_size: int, environment: dict, **options):
    """Train on several ranks, each a process of its own; return rank 0's outcome and state."""
    address = free_address()
    ranks = [
        pool.submit(run_rank, plan, folder, rank, world_size, address, environment=environment, **options)
        for rank in range(world_size)
    ]
    results = [rank.result(timeout=SECONDS) for rank in ranks]
    return results[0]
