"""Resuming continues the very same loss curve: on one rank, on two, and on another number than before."""

import pytest
from ranks import Stopped, run_ranks

from support.plans import dataset
from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.training import EarlyStopping
from tunesmith_trainer.errors import Interrupted

STEPS = 12


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.fixture
def local_job(object_store, bucket, tiny_model, rows):
    object_store.put_folder(tiny_model, f"{bucket}/model")
    object_store.put_json_lines(rows(93), f"{bucket}/train.jsonl")
    object_store.put_json_lines(rows(9, 1000), f"{bucket}/eval.jsonl")
    return bucket


@pytest.fixture
def plan_of(local_job, object_store, make_plan):
    def make(**changes):
        storage = StoragePlan(endpoint_url=object_store.endpoint_url)
        return make_plan(local_job, storage=storage, **changes)

    return make


def losses(state):
    return [record["loss"] for record in state.history]


def steps(state):
    return [record["step"] for record in state.history]


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_resumed_loss_equals_uninterrupted_loss(
    pool, plan_of, object_store, tmp_path, uninterrupted, method, before, after
):
    environment = object_store.environment()
    plan = plan_of(method=method)
    if method not in uninterrupted:
        whole = plan.model_copy(
            update={"checkpoint_uri": plan.checkpoint_uri + "-whole", "output_uri": plan.output_uri + "-whole"}
        )
        result, state = run_ranks(pool, whole, tmp_path / "whole", 1, environment)
        assert not isinstance(result, Exception), result
        uninterrupted[method] = losses(state), result.metrics
    expected, metrics = uninterrupted[method]
    # checkpoints at 4 and 8; the crash at 10 loses steps 9 and 10
    crashed, _ = run_ranks(pool, plan, tmp_path / "first", before, environment, crash_after=10)
    assert isinstance(crashed, Stopped)
    result, state = run_ranks(pool, plan, tmp_path / "second", after, environment)
    assert not isinstance(result, Exception), result
    assert steps(state) == list(range(1, STEPS + 1))
    assert losses(state) == pytest.approx(expected, abs=1e-5)
    assert [record["step"] for record in state.evaluations] == [0, STEPS]
    assert result.metrics["evalLoss"] == pytest.approx(metrics["evalLoss"], abs=1e-5)
    assert result.metrics["evalLossBefore"] == pytest.approx(metrics["evalLossBefore"], abs=1e-5)
    assert expected[-1] < expected[0] - 0.1, "the model learns"
    assert state.events == [{"step": 8, "kind": "Restart", "text": "resumed from step 8"}]


@pytest.mark.parametrize("world_size", [1, 2])
def test_sigterm_saves_the_very_step_and_the_next_pod_goes_on_from_it(
    pool, plan_of, object_store, tmp_path, world_size
):
    environment = object_store.environment()
    plan = plan_of(checkpoint_every_steps=100)
    stopped, _ = run_ranks(pool, plan, tmp_path / "first", world_size, environment, stop_after=5)
    assert isinstance(stopped, Interrupted), stopped
    assert stopped.checkpoint.step == 5
    assert (tmp_path / "first" / "interrupted.json").exists()
    result, state = run_ranks(pool, plan, tmp_path / "second", world_size, environment)
    assert not isinstance(result, Exception), result
    assert steps(state) == list(range(1, STEPS + 1))
    assert result.restarts == 1


def test_a_run_that_stopped_early_has_ended_also_for_who_resumes_it(
    pool, plan_of, object_store, tmp_path, make_training
):
    training = make_training(eval_steps=2, early_stopping=EarlyStopping(patience=2, min_delta=100))
    plan = plan_of(training=training)
    stopped, state = run_ranks(pool, plan, tmp_path / "first", 1, object_store.environment())
    assert not isinstance(stopped, Exception), stopped
    assert state.step == 6, "the first evaluation is the best, two more are not better"
    assert [event["kind"] for event in state.events] == ["EarlyStop"]
    again = plan.model_copy(update={"output_uri": plan.output_uri + "-again"})
    result, state = run_ranks(pool, again, tmp_path / "second", 1, object_store.environment())
    assert not isinstance(result, Exception), result
    assert state.step == 6
    assert [event["kind"] for event in state.events] == ["EarlyStop", "Restart"]
    assert b"Stopped early at step 6" in object_store.get_bytes(f"{again.output_uri}/report.html")


def test_rows_left_out_while_streaming_are_counted_once(
    pool, plan_of, local_job, object_store, tmp_path, rows, make_training
):
    # 48 rows, 8 to a step: every row twice in 12 steps, the bad ones on either rank
    mixed = [{"messages": "none"} if number % 7 == 3 else row for number, row in enumerate(rows(48))]
    object_store.put_json_lines(mixed, f"{local_job}/mixed.jsonl")
    source = dataset(f"{local_job}/mixed.jsonl", f"{local_job}/eval.jsonl", streaming=True, onBadRow="Skip")
    plan = plan_of(dataset=source, training=make_training(max_steps=STEPS))
    environment = object_store.environment()
    crashed, _ = run_ranks(pool, plan, tmp_path / "first", 2, environment, crash_after=5)
    assert isinstance(crashed, Stopped)
    result, state = run_ranks(pool, plan, tmp_path / "second", 1, environment)
    assert not isinstance(result, Exception), result
    assert steps(state) == list(range(1, STEPS + 1))
    assert result.dataset.bad_rows == sum(number % 7 == 3 for number in range(48))
    assert f"{local_job}/mixed.jsonl line " in result.dataset.first_bad_row


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 8), (2, 1), (2, 3)])
def test_the_curve_depends_neither_on_workers_nor_on_the_micro_batch(
    pool, plan_of, object_store, tmp_path, uninterrupted, make_training, world_size, micro
):
    training = make_training(micro_batch_size=micro)
    plan = plan_of(training=training)
    result, state = run_ranks(pool, plan, tmp_path, world_size, object_store.environment())
    assert not isinstance(result, Exception), result
    if "Full" in uninterrupted:
        assert losses(state) == pytest.approx(uninterrupted["Full"][0], abs=1e-5)
    else:
        _reference, other = run_ranks(
            pool,
            plan_of(checkpoint_uri=plan.checkpoint_uri + "-reference"),
            tmp_path / "r",
            1,
            object_store.environment(),
        )
        assert losses(state) == pytest.approx(losses(other), abs=1e-5)
