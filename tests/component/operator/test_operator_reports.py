"""Whatever a pod says of itself, the job's status is one that the API server takes, and its verdict is reached.

The fake cluster refuses a status as the API server does, by the CRD's schema.
"""

import json
import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND
from tunesmith_api.reports import (
    CheckpointRef,
    DatasetFacts,
    MemoryFacts,
    ModelRef,
    Outcome,
    ProgressReport,
    TerminationReport,
    TrainerState,
)
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.pods.reports import read_progress, read_termination
from tunesmith_operator.core.reconcile.progress import ProgressSample

KEY = Key(FINETUNEJOB_KIND, "ml", "sentiment")

numbers = st.one_of(
    st.integers(-3, 99), st.sampled_from([-(2**63), 2**53, 2**63, 2**64, 10**40, -1, 0]), st.floats(), st.none()
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "x" * 9000, "s3://a/b", "\x1b[2J", "s3://" + "y" * 3000, "-1", "NaN", "\x00"]),
)
scalars = numbers | texts | st.booleans()
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


def like(contract, **kinds):
    """Documents with the contract's fields, each of a fitting kind or of any other."""
    fields = {}
    for name, info in contract.model_fields.items():
        alias = info.alias or name
        known = kinds.get(name)
        if name == "schema_version":
            known = st.just(1)
        elif known is None:
            known = texts if info.annotation is str else numbers
        fields[alias] = known
    return st.fixed_dictionaries({}, optional=fields)


checkpoints, models = like(CheckpointRef), like(ModelRef)
datasets, memories = like(DatasetFacts), like(MemoryFacts)
metrics = st.dictionaries(texts, numbers, max_size=70)
progress_documents = like(
    ProgressReport,
    state=st.sampled_from([*TrainerState, "Dreaming"]),
    checkpoint=checkpoints,
    dataset=datasets,
    phase_seconds=metrics,
)
terminations = like(
    TerminationReport,
    outcome=st.sampled_from([*Outcome, "Unclear"]),
    reason=st.sampled_from(["Completed", "Diverged", "Quantized", "OutOfMemory", "Whim"]),
    checkpoint=checkpoints,
    dataset=datasets,
    memory=memories,
    model=models,
    metrics=metrics,
    phase_seconds=metrics,
)


def documents(kind):
    return (kind | anything).map(lambda found: json.dumps(found, default=str))


def running():
    world = World()
    world.cluster.put(make.finetunejob(workers={"replicas": 1}))
    world.reconcile()
    pod = world.pod("sentiment-1", 0, ready=True)
    world.wait(11)
    return world, pod


def says(world, pod, text):
    report = read_progress(text.encode(errors="replace"))
    if report is not None:
        uid = world.cluster.get("Pod", pod)["metadata"]["uid"]
        world.samples[KEY] = ProgressSample(uid, report, world.now)
    world.wait(11)


def refused(world):
    return [
        sample.value
        for metric in (world.controller._metrics.refused_statuses, world.controller._metrics.reconciles)
        for sample in metric.collect()[0].samples
        if sample.name.endswith("_total") and sample.labels.get("result", "bug") in ("bug", "refused")
    ]


@settings(max_examples=150, deadline=None)
@given(documents(progress_documents), documents(terminations), st.sampled_from([0, 1, 43, 137]))
@example('{"globalStep": -1, "maxSteps": 10, "state": "Training"}', "", 43)
@example('{"maxSteps": 10, "state": "Training", "heartbeatUnix": 1e300}', '{"globalStep": -1}', 43)
@example('{"maxSteps": 10, "state": "Training", "heartbeatUnix": Infinity, "loss": NaN}', "", 0)
@example("[" * 5000, "{" * 5000, 0)
@example("{}", '{"outcome": "Failed", "reason": "Diverged", "maxSteps": 3, "globalStep": -1}', 43)
@example(
    "{}", '{"outcome": "Succeeded", "reason": "Completed", "model": {"uri": "", "digest": "", "sizeBytes": -1}}', 0
)
def test_whatever_a_pod_sends_the_verdict_is_reached(progress, termination, code):
    logging.disable(logging.CRITICAL)
    try:
        world, pod = running()
        says(world, pod, progress)
        world.ends(pod, code, termination)
        if code == 0:
            world.job_is("sentiment-1", "Complete", "CompletionsReached")
        else:
            world.job_is("sentiment-1", "FailureTarget", "PodFailurePolicy" if code == 43 else "BackoffLimitExceeded")
            world.job_is("sentiment-1", "Failed", "PodFailurePolicy" if code == 43 else "BackoffLimitExceeded")
        world.wait(11)
    finally:
        logging.disable(logging.NOTSET)
    assert world.condition("Succeeded")[0] == ("True" if code == 0 else "False")
    assert not any(refused(world)), "no status was refused, and nothing raised"
    status = world.status()
    assert "\x1b" not in json.dumps(status)
    assert len(json.dumps(status)) < 40_000


@settings(max_examples=60, deadline=None)
@given(documents(terminations), st.sampled_from(["Complete", "Failed"]))
@example('{"outcome": "Succeeded", "reason": "Quantized", "model": {"uri": "s3://a/b", "digest": "", "sizeBytes": -5}}', "Complete")  # fmt: skip
def test_whatever_a_quantizer_leaves_its_revision_moves_on(termination, end):
    logging.disable(logging.CRITICAL)
    try:
        world = World()
        world.cluster.put(make.modeldeployment())
        world.reconcile()
        pod = world.pod("sentiment-r1-quantize")
        world.wait(11)
        world.ends(pod, 0 if end == "Complete" else 1, termination)
        world.job_is("sentiment-r1-quantize", end)
        world.wait(11)
    finally:
        logging.disable(logging.NOTSET)
    phase = world.status(MODELDEPLOYMENT_KIND)["revisions"][-1]["phase"]
    assert phase == ("RollingOut" if end == "Complete" else "Failed")
    assert not any(refused(world))


REPORT = ProgressReport(
    state=TrainerState.EVALUATING,
    message="step 5 of 10, «naïve» 数据\n\tdone",
    global_step=5,
    max_steps=10,
    epoch=0.5,
    loss=2.5,
    eval_loss=1e-9,
    learning_rate=3e-4,
    grad_norm=1e20,
    eta_seconds=12,
    dataset=DatasetFacts(train_examples=9, first_bad_row="a.jsonl line 3: 'x'"),
    checkpoint=CheckpointRef(step=5, uri="pvc://claim/checkpoints/step-00000005"),
    heartbeat_unix=make.NOW.timestamp(),
    phase_seconds={"ray": 1.5},
)


def test_our_own_reports_come_out_as_they_were():
    assert read_progress(REPORT.to_json()) == REPORT
    ended = make.succeeded(
        memory=MemoryFacts(micro_batch_size=4, peak_bytes=2**34, limit_bytes=2**35),
        metrics={"evalLoss": 0.5, "evalAccuracy(top-5)": 1.0},
        phase_seconds={"model": 2.0},
    )
    assert read_termination(ended.to_bounded_json()) == ended


def test_a_heartbeat_of_the_future_is_now():
    world, pod = running()
    says(world, pod, REPORT.model_copy(update={"heartbeat_unix": 4e9}).to_json())
    seen = world.status()["progress"]["lastHeartbeatTime"]
    assert make.stamp() < seen <= world.stamp()


@pytest.mark.parametrize("uri", ["", "http://elsewhere/x", "s3://a b", "s3://" + "x" * 2000, "file:///etc/passwd"])
def test_a_place_that_is_none_is_dropped(uri):
    document = json.loads(REPORT.to_json()) | {"checkpoint": {"step": 5, "uri": uri}}
    assert read_progress(json.dumps(document)) == REPORT.model_copy(update={"checkpoint": None})
