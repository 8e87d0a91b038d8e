"""Whole trainer pods: real supervisors, Ray, gloo, S3; killed in every way that a cluster kills."""

import os
import signal

import pytest

from support.plans import dataset
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import StoragePlan
from tunesmith_api.reports import Outcome

STEPS = 1200


def every_step_once(pods, plan, steps):
    assert [record["step"] for record in pods.history(plan.output_uri)] == list(range(1, steps + 1))


def long_training(make_training):
    """Steps enough that a fast machine is still training when a fault comes: progress is seen up to seconds late."""
    return make_training(max_steps=STEPS, learning_rate=1e-3)


def wait_for_a_new_rank(pods, pod, lost, step):
    """Wait until a rank that came after the lost ones trains, beyond `step`; return a step that it has left behind.

    What is reported of the step may be older than the loss, and an orphaned rank may train on for a moment.
    """
    reached = pods.wait_for(
        lambda report: report.restarts >= 1 and set(pod.ranks()) - lost and report.global_step >= step,
        what="training after a loss",
    ).global_step
    pods.wait_for(lambda report: report.global_step > reached, what="a step of the new rank")
    return reached


def test_a_lost_rank_and_a_lost_pod_cost_no_step(pods, job, make_plan, make_training):
    plan = make_plan(
        job,
        replicas=2,
        processes_per_worker=2,
        method="LoRA",
        training=long_training(make_training),
        checkpoint_every_steps=20,
    )
    head, other = pods.start(plan, 0), pods.start(plan, 1)
    pods.wait_for(lambda report: report.global_step >= 45, what="step 45")
    assert "2 of 2 workers have joined" in head.output()
    assert "worker 1 of 2, with 2 processes" in other.output()
    here, there = set(head.ranks()), set(other.ranks())
    assert (len(here), len(there)) == (2, 2)
    lost = min(there)
    # which pod has ranks 0 and 1 is Ray's choice
    names = [f"rank {first + other.number(lost)} (worker 1) ended unexpectedly" for first in (0, 2)]
    os.kill(lost, signal.SIGKILL)
    wait_for_a_new_rank(pods, other, there, 60)
    assert not here & set(head.ranks()), "the whole group has begun anew"
    assert any(f"restarting the workers: {name}" in head.output() for name in names)
    other.kill()
    replacement = pods.start(plan, 1)
    assert head.wait() == ExitCode.SUCCESS, head.output() + replacement.output()
    report = head.report()
    assert report.outcome is Outcome.SUCCEEDED
    assert report.global_step == report.max_steps == STEPS
    assert report.restarts >= 2
    assert report.metrics["evalLoss"] < report.metrics["evalLossBefore"]
    assert report.model.uri == plan.output_uri
    every_step_once(pods, plan, STEPS)
    replacement.term()  # as the Job controller does once index 0 has succeeded
    assert replacement.wait() in (ExitCode.INTERRUPTED, ExitCode.SUCCESS)


def test_a_new_head_is_joined_at_once(pods, job, make_plan, make_training):
    plan = make_plan(job, replicas=2, training=long_training(make_training), checkpoint_every_steps=20)
    head, other = pods.start(plan, 0), pods.start(plan, 1)
    pods.wait_for(lambda report: report.global_step >= 45, what="step 45")
    head.kill()
    head = pods.start(plan, 0)
    # a step alone says little: what rank 0 could not tell the old head, it may tell the new one
    pods.wait_for(lambda report: "joining it" in other.output(), what="the other pod to notice")
    pods.wait_for(lambda report: report.global_step >= 60, what="training with a new head")
    assert head.wait() == ExitCode.SUCCESS, head.output() + other.output()
    every_step_once(pods, plan, STEPS)


def test_a_lost_driver_a_lost_raylet_and_sigterm_cost_no_step(pods, job, make_plan, make_training):
    plan = make_plan(job, training=long_training(make_training), checkpoint_every_steps=20)
    pod = pods.start(plan)
    pods.wait_for(lambda report: report.global_step >= 25, what="step 25")
    first_ranks = set(pod.ranks())
    os.kill(pod.driver(), signal.SIGKILL)
    reached = wait_for_a_new_rank(pods, pod, first_ranks, 45)
    pod.term()
    assert pod.wait(60) == ExitCode.INTERRUPTED, pod.output()
    report = pod.report()
    assert report.outcome is Outcome.INTERRUPTED
    assert report.checkpoint, pod.output()
    assert report.checkpoint.step > reached
    again = pods.start(plan)
    first = pods.wait_for(lambda progress: progress.global_step > 0, what="the resumed run")
    assert first.global_step >= report.checkpoint.step
    assert again.wait() == ExitCode.SUCCESS, again.output()
    every_step_once(pods, plan, STEPS)
    # the same job once more: the model is there, nothing is trained again
    third = pods.start(plan)
    assert third.wait() == ExitCode.SUCCESS
    assert third.report().model == again.report().model
    assert "nothing to do" in third.output()


def test_ray_answers_nobody_without_its_token(pods, job, make_plan, make_training):
    pods.start(make_plan(job, training=long_training(make_training)))
    pods.wait_for(lambda report: report.workers_joined == 1, what="Ray")
    code, said = pods.ask_ray("another-token-0123456789abcdef")
    assert code != 0
    assert "joined" not in said
    assert "token" in said.lower(), said
    assert pods.ask_ray(pods.token)[0] == 0, "else the refusal says nothing"


def fails(pods, plan, code, reason):
    pod = pods.start(plan)
    assert pod.wait() == code, pod.output()
    return failure(pod.report(), reason)


def refused(pods, plan, code, reason):
    """By the driver alone, which checks its input before it needs Ray; `fails` shows that the pod passes it on."""
    driver = pods.start(plan, module="tunesmith_trainer.group.driver")
    assert driver.wait() == code, driver.output()
    return failure(driver.result(), reason)


def failure(report, reason):
    assert report.outcome is Outcome.FAILED
    assert report.reason is reason, report
    return report.message


def test_a_bad_row_names_its_line(pods, pod_store, job, make_plan):
    text = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": [{"role"\n'
    pod_store.put_text(text, f"{job}/train.jsonl")
    message = fails(pods, make_plan(job), ExitCode.INVALID_INPUT, Reason.DATASET_INVALID)
    assert f"{job}/train.jsonl line 2 is not valid JSON" in message


def test_an_unwritable_bucket_ends_the_job_and_says_why(pods, pod_store, job, make_plan):
    pod_store.credentials, admin = pod_store.read_only, pod_store.credentials
    try:
        message = refused(pods, make_plan(job), ExitCode.STORAGE_DENIED, Reason.STORAGE_UNWRITABLE)
    finally:
        pod_store.credentials = admin
    assert "spec.checkpoint.uri" in message
    assert "AccessDenied" in message
    assert "secretRef" in message


@pytest.mark.parametrize(
    ("field", "value", "reason", "words"),
    [
        (
            "model_uri",
            "s3://nobody-has-this/model",
            Reason.STORAGE_UNREADABLE,
            "bucket 'nobody-has-this' does not exist",
        ),
        ("dataset", "{job}/typo.jsonl", Reason.DATASET_NOT_FOUND, "spec.dataset.train.uri"),
        ("model_uri", "{job}/typo", Reason.MODEL_NOT_FOUND, "spec.model.uri"),
    ],
)
def test_missing_input_names_the_field(pods, job, make_plan, field, value, reason, words):
    code = ExitCode.STORAGE_DENIED if reason is Reason.STORAGE_UNREADABLE else ExitCode.INVALID_INPUT
    uri = value.format(job=job)
    change = {"dataset": dataset(uri)} if field == "dataset" else {field: uri}
    assert words in refused(pods, make_plan(job, **change), code, reason)


def test_a_diverging_run_ends_with_its_reason(pods, job, make_plan, make_training):
    training = make_training(learning_rate=0.99, max_grad_norm=0.0, max_steps=300, weight_decay=0.0, adam_epsilon=0.0)
    training = training.model_copy(update={"learning_rate": 1e30})
    message = fails(pods, make_plan(job, training=training), ExitCode.DIVERGED, Reason.DIVERGED)
    assert "learningRate" in message
    assert "after 3 rollbacks" in message


def test_an_unreachable_store_is_tried_again_and_then_given_up(pods, job, make_plan):
    plan = make_plan(job, max_restarts=1)
    pods.store.endpoint_url, right = "http://10.77.0.1:9", pods.store.endpoint_url
    try:
        pod = pods.start(plan)
    finally:
        pods.store.endpoint_url = right
    assert plan.storage == StoragePlan()
    assert pod.wait() == ExitCode.CRASHED, pod.output()
    report = pod.report()
    assert report.reason is Reason.STORAGE_UNREACHABLE
    for words in ("http://10.77.0.1:9", "spec.storage.endpointURL", "gave up after maxRestarts (1)"):
        assert words in report.message
