"""Models that ranks share out learn as whole ones do, whatever is shared; and no rank ever holds a whole one."""

import ctypes
import shutil
import threading
from pathlib import Path

import pytest
import torch
from ranks import SECONDS, Stopped, free_address, run_rank, run_ranks
from safetensors.torch import load_file

from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.training import Strategy

FSDP = {"strategy": Strategy.FSDP}
TENSOR = {"tensor_parallel": 2}


def preferences(conversations):
    questions = ((row["messages"][0]["content"], row["messages"][1]["content"]) for row in conversations)
    return [{"prompt": text, "chosen": answer, "rejected": answer + " or so"} for text, answer in questions]


def stored_short(folder, made):
    """The same model in a file of 16-bit numbers, as most are."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(folder, made)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(made)
    return made


@pytest.fixture
def plan_of(object_store, bucket, tiny_model, rows, make_plan, make_training, tmp_path):
    object_store.put_folder(stored_short(tiny_model, tmp_path / "short"), f"{bucket}/model")

    def plan(name, task, method, **changes):
        for kind, found in (("train", rows(48)), ("eval", rows(6, 1000))):
            lines = preferences(found) if task == "DPO" else found
            object_store.put_json_lines(lines, f"{bucket}/{kind}.jsonl")
        return make_plan(
            bucket, task=task, method=method, storage=StoragePlan(endpoint_url=object_store.endpoint_url), training=make_training(max_steps=5),
            output_uri=f"{bucket}/{name}", checkpoint_uri=f"{bucket}/{name}-checkpoints", **changes,
        )  # fmt: skip

    return plan


CASES = [
    ("ChatSFT", "Full", FSDP),
    ("ChatSFT", "Full", TENSOR),
    ("ChatSFT", "LoRA", FSDP),
    ("ChatSFT", "QLoRA", FSDP),
    ("DPO", "Full", FSDP),
]


@pytest.mark.parametrize(("task", "method", "sharing"), CASES)
def test_two_ranks_with_a_part_each_learn_what_one_does(pool, plan_of, object_store, tmp_path, task, method, sharing):
    curves, models = [], []
    for ranks, changes in ((1, {}), (2, sharing)):
        plan = plan_of(f"by-{ranks}", task, method, replicas=ranks, **changes)
        result, state = run_ranks(pool, plan, tmp_path / f"by-{ranks}", ranks, object_store.environment())
        assert not isinstance(result, Exception), result
        curves.append([record["loss"] for record in state.history] + [result.metrics["evalLoss"]])
        path = tmp_path / f"{ranks}.safetensors"
        path.write_bytes(object_store.get_bytes(f"{plan.output_uri}/model.safetensors"))
        models.append(load_file(path))
    assert curves[1] == pytest.approx(curves[0], abs=2e-5)
    assert curves[0][4] < curves[0][0], "the model learns"
    assert models[0].keys() == models[1].keys()
    for name, expected in models[0].items():
        assert models[1][name].dtype is expected.dtype is torch.bfloat16
        # the last bit may be rounded the other way
        assert torch.allclose(models[1][name].float(), expected.float(), rtol=2**-7, atol=1e-4), name


def anonymous_bytes():
    """Memory of this process that isn't a file's."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096


def return_what_is_freed():
    """Have glibc give back every larger block that is freed, as it does with all those of a large model's tensors.

    Those of this one are small enough for its arenas, which keep what was freed by chance: the more threads ran in turn.
    """
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 << 10) == 1


def most_while_assembling(plan, folder, rank, address, environment):
    """Make the model as one of two ranks; return how much memory that took either at most, beyond what was there before."""
    from torch.distributed import fsdp, tensor  # noqa: F401 - which take memory, too

    return_what_is_freed()
    from tunesmith_trainer.loop import run

    assemble = run.assemble

    def measured(plan, inputs, group, *arguments):
        before, done = anonymous_bytes(), threading.Event()
        most = [before]

        def watch():
            while not done.wait(0.001):
                most.append(anonymous_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assemble(plan, inputs, group, *arguments)
        finally:
            done.set()
            watcher.join()
        raise Stopped(group.exchange(max(most) - before))

    run.assemble = measured
    try:
        stopped, _ = run_rank(plan, folder, rank, 2, address, environment=environment)
    finally:
        run.assemble = assemble
    if not isinstance(stopped, Stopped):
        raise stopped
    return stopped.args[0]


def test_no_rank_ever_holds_a_whole_model(pool, plan_of, object_store, bucket, tiny_model, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 512, 2048, 16
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = 64
    folder = shutil.copytree(tiny_model, tmp_path / "large")
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    whole = 4 * sum(parameter.numel() for parameter in model.parameters())
    plan = plan_of("large", "ChatSFT", "Full", replicas=2, **FSDP)
    object_store.put_folder(folder, f"{bucket}/model")
    address = free_address()
    ranks = [
        pool.submit(most_while_assembling, plan, tmp_path / "scratch", rank, address, object_store.environment())
        for rank in range(2)
    ]
    most = [of_rank / whole for of_rank in ranks[0].result(timeout=SECONDS)]
    assert max(most) < 0.9, f"{most} of the whole model in float32"
