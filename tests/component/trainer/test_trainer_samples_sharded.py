"""Ranks that share a model out ask it together: the report shows what one rank with all of it would have said."""

import re
import shutil

import pytest
from ranks import run_ranks

from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.training import Strategy


@pytest.fixture
def wordy_model(tiny_model, tmp_path):
    """Random weights large enough that each token calls for another one, not for itself."""
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path / "wordy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(pool, object_store, bucket, wordy_model, rows, make_plan, make_training, tmp_path):
    object_store.put_folder(wordy_model, f"{bucket}/model")
    object_store.put_json_lines(rows(48), f"{bucket}/train.jsonl")
    object_store.put_json_lines(rows(6, 1000), f"{bucket}/eval.jsonl")

    def train(name, ranks, **changes):
        """Return the answers before training, and those before and after of the report."""
        plan = make_plan(
            bucket, storage=StoragePlan(endpoint_url=object_store.endpoint_url), training=make_training(max_steps=3),
            output_uri=f"{bucket}/{name}", checkpoint_uri=f"{bucket}/{name}-checkpoints", replicas=ranks, **changes,
        )  # fmt: skip
        result, state = run_ranks(pool, plan, tmp_path / name, ranks, object_store.environment())
        assert not isinstance(result, Exception), result
        page = object_store.get_bytes(f"{plan.output_uri}/report.html").decode()
        return state.samples_before, re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)

    return train


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_the_answers_are_those_of_one_rank(trained, method):
    before, _ = trained("whole", 1, method=method)
    assert len(before) == 3
    assert all(before)
    for name, sharing in (("fsdp", {"strategy": Strategy.FSDP}), ("tensor", {"tensor_parallel": 2})):
        found, shown = trained(name, 2, method=method, **sharing)
        assert found == before
        after = shown[3::4]  # prompt, expected, before, after, for each
        assert len(after) == 3
        assert all(after)
