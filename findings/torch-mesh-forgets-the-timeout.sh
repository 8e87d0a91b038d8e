#!/usr/bin/env bash
# torch 2.13.0, device mesh with gloo: ranks that meet along one dimension wait half an hour, whatever timeout was asked for.
#
# One would guess: init_process_group(timeout=…) holds for everything that comes after it, as its documentation speaks of all
#   operations of the process group; a mesh that is laid over that group has no timeout of its own to give.
# What happens: each dimension of a mesh of several is a group of its own, made with the backend's default: 30 minutes with gloo,
#   10 with NCCL. FSDP over two dimensions (HSDP) and tensor parallelism meet in those groups only.
# Seen: a timeout of 3 s. Along a dimension a rank that is 9 s late is waited for, and all is well; in the whole group the others
#   give up after 3 s.
# What follows: a hung rank of a sharded job is noticed after half an hour, a node full of GPUs idle meanwhile. Set each
#   dimension's timeout after the mesh is made, or give init_device_mesh options of the backend for each.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ${TUNESMITH_WHEELS:+--find-links "$TUNESMITH_WHEELS"} torch==2.13.0 numpy==2.4.6
cat > "$work/mesh.py" <<'PYTHON'
import os
import sys
import time
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

TIMEOUT, LATE = 3.0, 9.0


def waited(rank, store, name, group):
    """Return how long a sum took in which rank 3 takes part late, and whether it came about."""
    store.add(name, 1)
    while store.add(name, 0) < 4:
        time.sleep(0.05)
    begun = time.monotonic()
    if rank == 3:
        time.sleep(LATE)
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError:
        return time.monotonic() - begun, False
    return time.monotonic() - begun, True


def run(rank, folder, answers):
    store = dist.FileStore(f"{folder}/store", 4)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4, timeout=timedelta(seconds=TIMEOUT))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    answers.put((rank, waited(rank, store, "first", mesh.get_group("shards")), waited(rank, store, "second", None)))
    answers.close()
    answers.join_thread()
    os._exit(0)


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=run, args=(rank, sys.argv[1], answers)) for rank in range(4)]
    for process in processes:
        process.start()
    found = {rank: rest for rank, *rest in (answers.get(timeout=120) for _ in processes)}
    (along, along_good), (whole, whole_good) = found[2]
    print(f"timeout {TIMEOUT:.0f} s, rank 3 is {LATE:.0f} s late: along a dimension rank 2 waited {along:.0f} s, and got the sum: {along_good};")
    print(f"in the whole group it waited {whole:.0f} s, and got the sum: {whole_good}")
    assert along_good and along > LATE - 1, "the timeout holds along a dimension by now"
    assert not whole_good and whole < LATE - 1, "the timeout doesn't hold in the whole group"
PYTHON
GLOO_SOCKET_IFNAME=lo "$work/venv/bin/python" "$work/mesh.py" "$work"
