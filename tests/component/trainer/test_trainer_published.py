"""What a run reports is what anybody measures on its files: for every method, and however ranks share the model."""

import json
import math

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_trainer_shared_out import preferences, stored_short

from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_api.v1alpha1.training import Precision, Strategy

STEPS = 3
SMALL = 2e-5
"""A learning rate whose few steps move most weights by less than half of bfloat16's last bit."""
LORA = {"type": "LoRA", "lora": {"r": 4, "alpha": 8}}
METHODS = {
    "LoRA": LORA,
    "DoRA": {**LORA, "type": "DoRA"},
    "QLoRA": {**LORA, "type": "QLoRA"},
    "Full": {"type": "Full"},
    "QAT": {"type": "Full", "qat": {"scheme": "Int4"}},
    "pruning": {"type": "Full", "pruning": {"type": "Layers", "sparsityPercent": 50}},
}
SHARED = {
    "DDP": {"strategy": Strategy.DDP},
    "FSDP": {"strategy": Strategy.FSDP},
    "tensor": {"tensor_parallel": 2},
}


@pytest.fixture
def trained(pool, object_store, bucket, tiny_model, rows, make_plan, make_training, tmp_path):
    """Train on a base of 16-bit weights; return the result, the state, and the report's record."""
    object_store.put_folder(stored_short(tiny_model, tmp_path / "short"), f"{bucket}/model")

    def run(name, ranks=1, rate=1e-2, model="model", steps=STEPS, task="ChatSFT", own_pod=False, **changes):
        for kind, found in (("train", rows(48)), ("eval", rows(6, 1000))):
            lines = preferences(found) if task == "DPO" else found
            object_store.put_json_lines(lines, f"{bucket}/{kind}.jsonl")
        changes.setdefault("training", make_training(max_steps=steps, learning_rate=rate))
        plan = make_plan(
            bucket, task=task, storage=StoragePlan(endpoint_url=object_store.endpoint_url), replicas=ranks, model_uri=f"{bucket}/{model}",
            output_uri=f"{bucket}/{name}",
            checkpoint_uri=f"{bucket}/{name}-checkpoints", **changes,
        )  # fmt: skip
        result, state = run_ranks(pool, plan, tmp_path / name, ranks, object_store.environment(), own_pod=own_pod)
        assert not isinstance(result, Exception), result
        return result, state, json.loads(object_store.get_bytes(f"{bucket}/{name}/report.json"))

    return run


@pytest.fixture
def weights(object_store, bucket, tmp_path):
    def load(name):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(object_store.get_bytes(f"{bucket}/{name}/model.safetensors"))
        return load_file(path)

    return load


def formats(found):
    return {tensor.dtype for tensor in found.values()}


def assert_measured_alike(trained, result):
    """Another run, on one rank, begins with the files, and evaluates before its first step."""
    _, again, _ = trained("again", model="tuned", steps=1, method={"type": "Full"})
    for name, value in again.evaluations[0].items():
        if name != "step":
            assert result.metrics[f"eval{name[0].upper()}{name[1:]}"] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("dtype", [Precision.AUTO, Precision.BF16])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_reported_is_what_the_files_hold(trained, method, dtype):
    result, state, report = trained("tuned", method=METHODS[method], output_dtype=dtype)
    assert_measured_alike(trained, result)
    assert report["model"]["metrics"]["loss"] == result.metrics["evalLoss"]
    assert result.model.rehearsed == ("Q4_0" if method == "QAT" else None)
    # what chose the best model, and is drawn as a curve, is that of the weights that were trained
    assert [record["step"] for record in state.evaluations] == [0, STEPS]
    if dtype is Precision.BF16:
        assert state.evaluations[-1]["loss"] != result.metrics["evalLoss"]


@pytest.mark.parametrize("method", ["LoRA", "Full"])
@pytest.mark.parametrize("sharing", SHARED)
def test_so_it_is_where_two_ranks_share_the_work(trained, method, sharing):
    result, _, report = trained("tuned", 2, method=METHODS[method], output_dtype=Precision.BF16, **SHARED[sharing])
    assert_measured_alike(trained, result)
    assert report["samples"]


@pytest.mark.parametrize("sharing", ["DDP", "FSDP"])
def test_so_it_is_where_the_other_rank_has_to_fetch_the_files(trained, object_store, bucket, tmp_path, sharing):
    result, _, _ = trained("tuned", 2, own_pod=True, method=LORA, output_dtype=Precision.BF16, **SHARED[sharing])
    assert_measured_alike(trained, result)
    written, fetched = (tmp_path / "tuned" / f"pod-{rank}" / "export" / "model.safetensors" for rank in range(2))
    assert fetched.read_bytes() == written.read_bytes()
    manifest = ModelManifest.from_json(object_store.get_bytes(f"{bucket}/tuned/tunesmith-manifest.json"))
    for entry in manifest.files:
        assert object_store.get_bytes(f"{bucket}/tuned/{entry.path}")


@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_a_small_update_is_not_rounded_away(trained, weights, method):
    result, state, report = trained("tuned", rate=SMALL, method=METHODS[method])
    assert formats(weights("tuned")) == {torch.float32}
    assert result.metrics["evalLoss"] == pytest.approx(state.evaluations[-1]["loss"], abs=1e-6)
    assert result.metrics["evalLoss"] < result.metrics["evalLossBefore"]
    assert "float32: rounding to bfloat16 would take" in report["model"]["rounding"]


def test_a_large_update_keeps_the_format_of_the_base(trained, weights):
    _, _, report = trained("tuned", steps=12, method=METHODS["Full"])
    assert formats(weights("tuned")) == {torch.bfloat16}
    assert report["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("method", "sharing", "ranks"),
    [("LoRA", {}, 1), ("LoRA", SHARED["FSDP"], 2), ("LoRA", SHARED["tensor"], 2), ("Full", {}, 1)],
)
def test_preferences_that_rounding_took_away_are_not_reported(trained, weights, method, sharing, ranks):
    asked = {"output_dtype": Precision.BF16, "method": METHODS[method]}
    result, state, report = trained("tuned", ranks, rate=SMALL / 20, task="DPO", **asked, **sharing)
    assert state.evaluations[-1]["rewardMargin"] != 0
    kept = weights("tuned")
    same = [torch.equal(kept[name], tensor) for name, tensor in weights("model").items()]
    if all(same):
        assert result.metrics["evalRewardMargin"] == 0
        assert result.metrics["evalLoss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(result.metrics["evalRewardMargin"]) < abs(state.evaluations[-1]["rewardMargin"])
    assert "bfloat16: rounding to it takes" in report["model"]["rounding"]


@pytest.mark.parametrize("sharing", [{}, SHARED["FSDP"]])
def test_an_adapter_alone_is_reported_as_it_was_trained(trained, sharing):
    result, state, report = trained(
        "tuned", 2 if sharing else 1, method=METHODS["LoRA"], save=SaveMode.ADAPTER, **sharing
    )
    assert result.metrics["evalLoss"] == state.evaluations[-1]["loss"]
    assert report["model"]["dtype"] == ""
    assert report["samples"]


def test_the_best_model_is_measured_as_it_was_written(trained, make_training):
    # no answer is ever right as a whole: the first evaluation stays the best
    best = {"metric_for_best_model": "exactMatch", "load_best_model_at_end": True}
    training = {"max_steps": 4, "eval_steps": 2, **best}
    result, _, report = trained("tuned", method=METHODS["Full"], training=make_training(**training))
    assert report["model"]["step"] == 2
    assert_measured_alike(trained, result)
