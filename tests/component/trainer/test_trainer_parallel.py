"""However ranks share a model, the gradient is that of one process; so are norm, step and what is saved."""

import os
import shutil
import socket
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

CASES = ["ddp", "fsdp", "tensor", "tensor+fsdp"]
METHODS = ["Full", "LoRA", "DoRA", "Pruning", "QAT"]
CLIP = 0.005
RANKS = {"tensor+fsdp": 4, "hybrid": 4}
KEPT = []
"""What is never let go of, as in `tunesmith_trainer.group.worker`."""


def tiny():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def plan_for(method, world, tensor):
    from support.plans import training_plan

    settings = {
        "Full": "Full",
        "8bit": "Full",
        "LoRA": {"type": "LoRA", "lora": {"r": 4, "alpha": 8, "targetModules": ["q_proj", "down_proj"]}},
        "DoRA": {"type": "DoRA", "lora": {"r": 4, "alpha": 8}},
        "Pruning": {"type": "Full", "pruning": {"sparsityPercent": 50}},
        "QLoRA": {"type": "QLoRA", "lora": {"r": 4, "alpha": 8}},
        "QAT": {"type": "Full", "qat": {"scheme": "Int4"}},
    }[method]
    training = {"optim": "adamw_8bit"} if method == "8bit" else {}
    return training_plan(method=settings, training=training, replicas=world, tensor_parallel=tensor)


def load(method, plan, numerics, folder):
    if method != "QLoRA":
        return tiny()
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith_trainer.models.loading import load_options, load_pretrained

    return load_pretrained(AutoModelForCausalLM, folder, **load_options(plan, numerics, torch.float32))


def batches():
    """Four micro-batches of unlike numbers of learned tokens, so that a mean of means would be wrong."""
    import torch

    generator = torch.Generator().manual_seed(3)
    found = []
    for learned in (11, 3, 7, 1):
        ids = torch.randint(96, (2, 12), generator=generator)
        labels = torch.full_like(ids, -100)
        labels[:, 12 - learned :] = ids[:, 12 - learned :]
        found.append((ids, labels))
    return found


def loss_sum(model, ids, labels):
    from torch.nn import functional

    logits = model(input_ids=ids).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def train(rank, world, port, case, method, steps=2):
    """Train for two steps as one rank; return gradients of the first, norms, the logits at the end, and what rank 0 gathers."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from tunesmith_api.v1alpha1.training import Strategy
    from tunesmith_trainer import methods
    from tunesmith_trainer.distributed import parallel
    from tunesmith_trainer.distributed.collectives import join_group
    from tunesmith_trainer.loop.optimizer import make_optimizer
    from tunesmith_trainer.models.numerics import Numerics

    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    folder = Path(tempfile.mkdtemp())
    tiny().save_pretrained(folder)  # in a group, only rank 0 would
    group = join_group(rank, world, f"127.0.0.1:{port}", cpu)
    try:
        plan = plan_for(method, world, 2 if "tensor" in case else 1)
        mesh = parallel.mesh(plan, group)
        numerics = Numerics(cpu)
        model = parallel.shard_tensors(load(method, plan, numerics, folder), mesh)
        bare = methods.apply(model, plan, numerics, HeadlessTask(), list).model.train()
        if rank == 1 and method == "LoRA" and mesh is None:  # as if another CPU had drawn the adapters
            for parameter in bare.parameters():
                parameter.data.mul_(1 + parameter.requires_grad)
        strategy = {"hybrid": Strategy.HSDP}.get(case, Strategy.FSDP if "fsdp" in case else Strategy.DDP)
        wrapped = parallel.wrap(bare, group, strategy, numerics, mesh, within=2 if case == "hybrid" else 0)
        KEPT.append(wrapped)
        optimizer = make_optimizer(bare, plan.training, cpu)
        share = batches()[wrapped.dp_rank :: wrapped.dp_size]
        units = float(sum((labels[:, 1:] != -100).sum() for _, labels in batches()))
        norms, gradients = [], {}
        for step in range(steps):
            for number, (ids, labels) in enumerate(share, 1):
                with wrapped.sync(last=number == len(share)):
                    (loss_sum(wrapped.module, ids, labels) * (wrapped.dp_size / units)).backward()
            if step == 0:
                gradients = {name: whole(p.grad) for name, p in bare.named_parameters() if p.grad is not None}
            norms.append(wrapped.clip_grad_norm(CLIP if step else float("inf")))
            for options in optimizer.param_groups:
                options["lr"] = 1e-2
            optimizer.step()
            optimizer.zero_grad()
            evaluated = wrapped.for_evaluation().eval()
            with torch.no_grad():  # in between, as the loop does
                evaluated(input_ids=batches()[0][0])
            evaluated.train()
        held = parallel.held_bytes(bare, optimizer)
        if method == "8bit":
            check_packed_state(optimizer, bare.get_input_embeddings().weight)
        gathered = wrapped.gathered()
        assert (gathered is None) == (rank != 0)
        logits = {}
        if gathered is not None:
            finished = methods.finished_model(gathered, plan, folder, HeadlessTask()).eval()
            logits = finished(input_ids=batches()[0][0]).logits.detach().numpy()
            assert type(finished).__name__ == "LlamaForCausalLM"
            assert finished.lm_head.weight is finished.model.embed_tokens.weight
            if method == "Pruning":
                assert 0.49 < float((finished.model.layers[0].mlp.up_proj.weight == 0).float().mean()) < 0.51
        return {name: value.numpy() for name, value in gradients.items()}, norms, logits, held
    finally:
        shutil.rmtree(folder)
        if world > 1:
            torch.distributed.destroy_process_group()


def check_packed_state(optimizer, weight):
    """8-bit state comes out in the parameter's own layout, and goes in again."""
    import torch

    from tunesmith_trainer.checkpoint.optimizer_state import portable_state, restore_state

    assert optimizer.state[weight]["state1"].dtype is torch.uint8
    codes = optimizer.state[weight]["state1"].clone()
    state = portable_state(optimizer, weight)
    assert state["exp_avg"].shape == weight.shape
    assert getattr(state["exp_avg"], "placements", None) == getattr(weight, "placements", None)
    restore_state(optimizer, weight, state)
    assert torch.equal(optimizer.state[weight]["state1"], codes)


class HeadlessTask:
    def head_modules(self, model):
        return ()

    def load_model(self, folder, **options):
        return tiny()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


@pytest.fixture(scope="module")
def processes(forks):
    """Return a pool of new processes: one that has left a group keeps parts of it."""
    return lambda count: ProcessPoolExecutor(count, mp_context=forks)


@pytest.fixture(scope="module")
def alone():
    """What one process gets, by method."""
    found = {}

    def get(processes, method):
        if method not in found:
            with processes(1) as pool:
                found[method] = pool.submit(train, 0, 1, 0, "ddp", method).result(timeout=300)
        return found[method]

    return get


def together(processes, case, method):
    world = RANKS.get(case, 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with processes(world) as pool:
        ranks = [pool.submit(train, rank, world, port, case, method) for rank in range(world)]
        return [rank.result(timeout=300) for rank in ranks]


PAIRS = [
    *((case, method) for case in ("ddp", "fsdp") for method in METHODS),
    ("ddp", "QLoRA"),
    ("fsdp", "QLoRA"),
    ("fsdp", "8bit"),
    ("tensor", "Full"),
    ("tensor", "LoRA"),
    ("tensor+fsdp", "Full"),
    ("tensor+fsdp", "LoRA"),
    ("hybrid", "Full"),
    ("hybrid", "QLoRA"),
]


@pytest.mark.parametrize(("case", "method"), PAIRS)
def test_gradients_norms_and_result_are_those_of_one_process(processes, alone, case, method):
    import numpy

    gradients, norms, logits, _ = alone(processes, method)
    for rank, found in enumerate(together(processes, case, method)):
        assert found[0].keys() == gradients.keys()
        for name, expected in gradients.items():
            numpy.testing.assert_allclose(found[0][name], expected, atol=1e-5, err_msg=f"{name} of rank {rank}")
        assert found[1] == pytest.approx(norms, rel=1e-5)
        assert norms[1] > CLIP  # clipping had something to do
        if rank == 0:
            numpy.testing.assert_allclose(found[2], logits, atol=1e-4)


def test_fsdp_ranks_hold_half_of_what_replicas_do(processes):
    replica = together(processes, "ddp", "Full")[0][3]
    shares = [found[3] for found in together(processes, "fsdp", "Full")]
    assert max(shares) <= 0.6 * replica
