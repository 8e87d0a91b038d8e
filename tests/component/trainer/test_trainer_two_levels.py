"""Pods of several training processes: the same losses and the same model however the processes lie in pods."""

from concurrent.futures import ProcessPoolExecutor

import pytest
from ranks import run_ranks
from safetensors.torch import load

from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.training import Strategy

STEPS = 4


@pytest.fixture
def trained(forks, object_store, bucket, tiny_model, rows, make_plan, make_training, tmp_path):
    """Trains with four processes; returns the losses, held-out ones included, and the model that was saved."""
    object_store.put_folder(tiny_model, f"{bucket}/model")
    object_store.put_json_lines(rows(40), f"{bucket}/train.jsonl")
    object_store.put_json_lines(rows(6, 1000), f"{bucket}/eval.jsonl")

    def train(pods, each, **changes):
        name = f"{pods}x{each}" + "".join(map(str, changes.values()))
        plan = make_plan(
            bucket, training=make_training(max_steps=STEPS), storage=StoragePlan(endpoint_url=object_store.endpoint_url), replicas=pods,
            processes_per_worker=each, output_uri=f"{bucket}/{name}", checkpoint_uri=f"{bucket}/{name}-checkpoints", **changes,
        )  # fmt: skip
        folder = tmp_path / name
        with ProcessPoolExecutor(4, mp_context=forks) as four:  # new ones: one that has left a group keeps parts of it
            result, state = run_ranks(
                four, plan, folder, 4, object_store.environment(), own_pod=pods == 4, per_pod=each
            )
        assert not isinstance(result, Exception), result
        assert len(list(folder.glob("pod-*/model"))) == pods, "each pod has fetched the model once"
        assert object_store.list_keys(f"{plan.checkpoint_uri}/tokens"), "rank 0 has saved what its pod has tokenized"
        losses = [record["loss"] for record in state.history] + [result.metrics["evalLoss"]]
        return losses, load(object_store.get_bytes(f"{plan.output_uri}/model.safetensors"))

    return train


def test_the_processes_of_a_pod_learn_what_pods_of_one_do(trained):
    losses, model = trained(4, 1)
    assert losses[STEPS - 1] < losses[0], "the model learns"
    for pods, each, changes in (
        (2, 2, {}),
        (1, 4, {}),
        (2, 2, {"tensor_parallel": 2, "strategy": Strategy.FSDP}),  # layers within a pod, shares across
        (2, 2, {"strategy": Strategy.HSDP}),  # shares within a pod, copies across
    ):
        again, same = trained(pods, each, **changes)
        assert again == pytest.approx(losses, abs=2e-5 if changes else 1e-6), (pods, each, changes)
        assert same.keys() == model.keys()
        for name, expected in model.items():
            assert same[name].float().sub(expected.float()).abs().max() < 1e-4, (pods, each, name)
