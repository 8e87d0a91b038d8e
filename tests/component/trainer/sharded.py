"""Trains a tiny Llama on real gloo ranks by any strategy, and saves and restores it. Imported by the test beside it."""

import faulthandler
import os
import socket
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

from tunesmith_api.artifacts import DataCursor

CURSOR = DataCursor(epoch=0, step_in_epoch=1, examples_seen=8)
LAYERS = 2
PATIENCE = 280
"""Seconds that ranks may take, on a machine with much else to do."""


@dataclass(frozen=True)
class Setup:
    """One group of ranks and what it does: the strategy is DDP, FSDP, HSDP, TP or FSDP+TP."""

    strategy: str
    world_size: int
    uri: str
    folder: str
    environment: dict[str, str]
    optimizer: str = "adamw_torch"
    seed: int = 0
    steps: int = 2
    save: bool = False
    restore: bool = False
    after: int = 0
    """Steps after saving or restoring."""
    trouble: str = ""
    """`no-manifest`: end before the parts are known to be up; `rank-1-fails`, `rank-1-full`."""


@dataclass
class Found:
    """What one rank saw: whole tensors of the model and its optimizer as lists, and what went on."""

    saved: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)
    error: Exception | None = None
    newest: int | None = None
    restored: int | None = None
    written: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def build(setup: Setup, rank: int):
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(setup.seed)
    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    data, tensor = None, None
    if setup.strategy == "FSDP+TP":
        mesh = init_device_mesh("cpu", (setup.world_size // 2, 2), mesh_dim_names=("dp", "tp"))
        data, tensor = mesh["dp"], mesh["tp"]
    elif setup.strategy == "HSDP":
        data = init_device_mesh("cpu", (2, setup.world_size // 2), mesh_dim_names=("copy", "shard"))
    elif setup.strategy == "FSDP":
        data = init_device_mesh("cpu", (setup.world_size,))
    elif setup.strategy == "TP":
        tensor = init_device_mesh("cpu", (setup.world_size,))
    if tensor is not None:
        for layer in model.model.layers:
            plan = {
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(),
            }
            parallelize_module(layer, tensor, plan)
    if data is not None:
        for layer in model.model.layers:
            fully_shard(layer, mesh=data)
        fully_shard(model, mesh=data)
    wrapped = model
    if setup.strategy == "DDP" and setup.world_size > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    return model, wrapped


def make_optimizer(model, kind: str):
    import torch

    if kind == "adamw_8bit":
        from tunesmith_trainer.loop.optimizer import _adamw_8bit

        return _adamw_8bit([{"params": list(model.parameters()), "lr": 0.01}], (0.9, 0.999), 1e-8)
    groups = {}
    for parameter in model.parameters():  # fused steps take tensors of one layout at once
        groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=0.01, fused=True)


def train(model, optimizer, number: int) -> None:
    """One step on the same examples on all ranks, so that every strategy does the same."""
    import torch

    ids = torch.randint(0, 67, (2, 16), generator=torch.Generator().manual_seed(number))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def wholes(model, optimizer) -> dict:
    """All tensors, gathered, as NumPy arrays."""
    from tunesmith_trainer.checkpoint.state import held_tensors

    found = {}
    for key, held in held_tensors(model, optimizer).items():
        values = held.values()
        found[key] = (values.full_tensor() if hasattr(values, "full_tensor") else values).detach().clone().numpy()
    return found


def _store(found: Found, setup: Setup, rank: int):
    import threading

    from tunesmith_api.keys import Reason
    from tunesmith_api.plan import StoragePlan
    from tunesmith_store.errors import UserError
    from tunesmith_store.store import S3Store

    class Watched(S3Store):
        lock = threading.Lock()

        def upload(self, path, uri):
            if setup.trouble == "rank-1-fails" and rank == 1:
                raise UserError(Reason.STORAGE_UNWRITABLE, "rank 1 may not write")
            super().upload(path, uri)
            with self.lock:
                found.written.append(uri)

        def get_range(self, uri, start, size):
            data = super().get_range(uri, start, size)
            with self.lock:
                if not start:
                    found.read.append(uri)
            return data

    return Watched(StoragePlan(endpoint_url=os.environ["AWS_ENDPOINT_URL"]))


def run_rank(setup: Setup, rank: int, address: str, answer: Connection) -> None:
    os.environ.update(setup.environment)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from tunesmith_store.errors import Failure
    from tunesmith_trainer.checkpoint import Checkpointer, RunState
    from tunesmith_trainer.distributed.collectives import join_group

    torch.set_num_threads(1)
    group = join_group(rank, setup.world_size, address, torch.device("cpu"), 60)
    found = Found()
    try:
        model, wrapped = build(setup, rank)
        optimizer = make_optimizer(model, setup.optimizer)
        usage = type(
            "Usage", (), {"total": 10**9, "free": 0 if setup.trouble == "rank-1-full" and rank == 1 else 10**9}
        )
        checkpointer = Checkpointer(
            store=_store(found, setup, rank), uri=setup.uri, folder=Path(setup.folder), group=group, run_digest="d",
            keep_last=2, describe={"max_steps": 9, "seed": 1, "attempt": 1}, log=found.lines.append,
            disk_usage=lambda folder: usage, ranks_per_pod=setup.world_size,
        )  # fmt: skip
        state = RunState()
        if setup.restore:
            restored = checkpointer.restore(model, optimizer)
            if restored is not None:
                state, found.restored = restored, restored.step
            found.saved = wholes(model, optimizer)
        else:
            for _ in range(setup.steps):
                train(wrapped, optimizer, state.step)
                state.step += 1
        if setup.save:
            found.saved = wholes(model, optimizer)
            checkpointer.save(model, optimizer, state, CURSOR)
            if setup.trouble == "no-manifest":
                checkpointer._part.result(60)
            else:
                reference = checkpointer.wait()
                found.newest = reference.step if reference else None
        for _ in range(setup.after):
            train(wrapped, optimizer, state.step)
            state.step += 1
        found.after = wholes(model, optimizer)
    except Failure as error:
        found.error = error
    answer.send(found)
    # taking down a process group whose peers are gone may hang in torch
    os._exit(0)


def _child(setup: Setup, rank: int, address: str, answer: Connection) -> None:
    faulthandler.dump_traceback_later(PATIENCE - 20)  # says where a rank hangs
    try:
        run_rank(setup, rank, address, answer)
    except BaseException:
        answer.send(traceback.format_exc())


def run_ranks(context: BaseContext, setup: Setup, timeout: float = PATIENCE) -> list[Found]:
    """Each rank is a new process: torch keeps what it knows of a mesh beyond the life of a process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    pipes = [context.Pipe(duplex=False) for _ in range(setup.world_size)]
    ranks = [
        context.Process(target=_child, args=(setup, rank, address, there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    try:
        found = []
        for rank, (here, _) in enumerate(pipes):
            assert here.poll(timeout), f"rank {rank} says nothing"
            found.append(here.recv())
            assert isinstance(found[-1], Found), f"rank {rank}: {found[-1]}"
        return found
    finally:
        for process in ranks:
            process.join(1 if len(found) == len(ranks) else 0)
            process.kill()
