"""The operator process on a real control plane: a FineTuneJob's life as users see it. Pod statuses are scripted."""

import contextlib
import http.server
import json
import re
import threading
import time
from datetime import UTC, datetime

import pytest

from devcluster import CommandFailed
from support import make
from support.fakekubelet import ended, index_of, running, waiting
from tunesmith_api import keys
from tunesmith_api.reports import CheckpointRef, ProgressReport, TrainerState

HEAD_IP = "127.0.0.77"


@contextlib.contextmanager
def progress_server(report: ProgressReport):
    """What worker 0 serves, at the address that the scripted pod claims to have."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = report.to_json().encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer((HEAD_IP, keys.PORT_PROGRESS), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def training(pod):
    return running(pod, ip=HEAD_IP if index_of(pod) == 0 else "127.0.0.78")


def finishing(pod):
    return ended(pod, 0, make.succeeded()) if index_of(pod) == 0 else running(pod)


def job(stage, name="sentiment", **spec):
    return make.finetunejob(name, stage.namespace, **spec)


def test_a_job_shows_its_progress_and_its_end_in_the_columns_of_kubectl(stage):
    stage.kubelet.script = training
    report = ProgressReport(
        state=TrainerState.TRAINING, global_step=310, max_steps=500, loss=0.41234, eta_seconds=185, restarts=1,
        checkpoint=CheckpointRef(step=300, uri="s3://checkpoints/sentiment/step-00000300"),
    )  # fmt: skip
    with progress_server(report):
        stage.apply(job(stage))
        stage.wait_condition("ftj", "sentiment", "Succeeded", "Unknown", "Training")
        stage.wait("workers", lambda: stage.get("ftj", "sentiment")["status"]["display"]["workers"] == "2/2")
        header, row = stage.kubectl("get", "ftj", "sentiment").splitlines()
    columns = dict(zip(header.split(), row.split(), strict=True))
    columns.pop("AGE")
    assert columns == {
        "NAME": "sentiment", "PHASE": "Training", "PROGRESS": "62%", "STEP": "310/500", "LOSS": "0.412", "ETA": "3m",
        "WORKERS": "2/2", "RESTARTS": "1",
    }  # fmt: skip
    assert stage.condition("ftj", "sentiment", "CheckpointAvailable")[:2] == ("True", "CheckpointSaved")
    stage.kubelet.script = finishing
    message = stage.wait_condition("ftj", "sentiment", "Succeeded", "True", "Completed")
    assert "loss 2.1 to 0.4" in message
    status = stage.get("ftj", "sentiment")["status"]
    assert status["model"]["digest"] == make.DIGEST
    assert stage.kubectl("get", "ftj", "sentiment", "--no-headers").split()[1:3] == ["Succeeded", "100%"]
    events = {it["reason"] for it in stage.items("events") if it["involvedObject"]["kind"] == "FineTuneJob"}
    assert events == {"Completed"}


def test_a_job_that_runs_through_costs_at_most_eight_writes(stage, record_property):
    since = datetime.now(UTC)
    stage.kubelet.script = training
    report = ProgressReport(state=TrainerState.TRAINING, global_step=310, max_steps=500)

    def both_ready():
        return stage.kubectl("get", "pods", "-o", "jsonpath={..conditions[?(@.type=='Ready')].status}") == "True True"

    stage.apply(job(stage))
    stage.wait("both workers", both_ready)
    with progress_server(report):
        stage.wait_condition("ftj", "sentiment", "Succeeded", "Unknown", "Training")
    stage.kubelet.script = finishing
    stage.wait_condition("ftj", "sentiment", "Succeeded", "True", "Completed")
    time.sleep(1)
    writes = stage.operator.writes(since, stage.namespace)
    record_property("writes", len(writes))
    print(f"{len(writes)} writes: {writes}")
    assert len(writes) <= 8, writes


def test_a_new_object_says_something_before_the_operator_does(stage):
    stage.operator.kill()
    try:
        stage.apply(job(stage), make.modeldeployment(namespace=stage.namespace))
        waiting = ("Unknown", "Pending", "Waiting for the operator.")
        assert stage.condition("ftj", "sentiment", "Succeeded") == waiting
        assert stage.condition("mdep", "sentiment", "Ready") == waiting
        assert stage.kubectl("get", "ftj", "sentiment", "--no-headers").split()[1] == "Pending"
        assert "Pending" in stage.kubectl("get", "mdep", "sentiment", "--no-headers").split()
    finally:
        stage.operator.start()
    stage.wait("the Job", lambda: stage.get("job", "sentiment-1"))
    stage.wait("the start", lambda: stage.get("ftj", "sentiment")["status"].get("startTime"))
    conditions = stage.get("ftj", "sentiment")["status"]["conditions"]
    assert not [it for it in conditions if it["lastTransitionTime"].startswith("1970")]


def test_who_waits_for_a_condition_is_answered_after_a_refusal_a_correction_the_end_and_a_later_edit(stage):
    def waited(condition):
        return stage.kubectl("wait", f"--for=condition={condition}", "ftj/sentiment", "--timeout=30s")

    stage.kubelet.script = finishing
    stage.apply(job(stage, output={"uri": "s3://checkpoints/sentiment/out"}))
    waited("Succeeded=false")
    assert stage.condition("ftj", "sentiment", "Succeeded")[1] == "InvalidSpec"
    stage.apply(job(stage))
    waited("Succeeded")
    ended = stage.get("ftj", "sentiment")["status"]
    edit = json.dumps({"spec": {"ttlSecondsAfterFinished": 86400, "suspend": True}})
    stage.kubectl("patch", "ftj", "sentiment", "--type=merge", "-p", edit)
    waited("Succeeded")
    status = stage.get("ftj", "sentiment")["status"]
    assert status["observedGeneration"] == ended["observedGeneration"] + 1
    assert {it["observedGeneration"] for it in status["conditions"]} == {status["observedGeneration"]}
    assert (status["phase"], status["completionTime"]) == ("Succeeded", ended["completionTime"])


def test_the_children_are_what_the_plan_says(stage):
    stage.kubelet.script = lambda pod: waiting(pod, "ContainerCreating", "")
    stage.apply(job(stage, workers={"gpusPerWorker": 1, "priorityClassName": None}, activeDeadlineSeconds=900))
    child = stage.wait("the Job", lambda: stage.get("job", "sentiment-1"))
    spec = child["spec"]
    assert spec["completionMode"] == "Indexed"
    assert (spec["completions"], spec["parallelism"], spec["backoffLimit"]) == (2, 2, 3)
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert spec["activeDeadlineSeconds"] == 900
    box = spec["template"]["spec"]["containers"][0]
    assert box["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert box["resources"]["limits"] == box["resources"]["requests"]
    assert not spec["template"]["spec"]["automountServiceAccountToken"]
    assert child["metadata"]["ownerReferences"][0]["controller"]
    assert child["metadata"].get("finalizers") is None
    plan = json.loads(stage.get("configmap", "sentiment-1")["data"]["plan.json"])
    service = stage.get("service", "sentiment-workers")["spec"]
    assert plan["headHost"] == "sentiment-1-0.sentiment-workers"
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    token = stage.get("secret", f"sentiment-1-ray-{stage.get('ftj', 'sentiment')['metadata']['uid'][:5]}")["data"][
        "token"
    ]
    assert len(token) >= 64
    stage.wait("two pods", lambda: len(stage.items("pods")) == 2)
    pods = stage.items("pods")
    assert {pod["spec"]["subdomain"] for pod in pods} == {"sentiment-workers"}
    assert {pod["spec"]["hostname"] for pod in pods} == {"sentiment-1-0", "sentiment-1-1"}


def test_ten_finished_jobs_cost_no_write_in_a_minute(stage):
    stage.kubelet.script = finishing
    names = [f"job-{number}" for number in range(10)]
    stage.apply(*(job(stage, name, output={"uri": f"s3://models/{name}"}) for name in names))
    for name in names:
        stage.wait_condition("ftj", name, "Succeeded", "True", "Completed", 60)
    others = f"op-.*(?<!{stage.namespace})$"
    spaces = lambda: [it["metadata"]["name"] for it in stage.cluster.get_all("namespaces")]  # noqa: E731
    stage.wait("earlier tests' namespaces to go", lambda: not [it for it in spaces() if re.match(others, it)], 60)

    def settled():
        """Numbers may be written up to ten seconds late."""
        since = datetime.now(UTC)
        time.sleep(11)
        return not stage.operator.writes(since)

    stage.wait("the last writes", settled, 60)
    since = datetime.now(UTC)
    time.sleep(60)
    assert stage.operator.writes(since) == []
    assert stage.operator.process.poll() is None


def test_a_missing_secret_is_named_within_30_seconds_and_the_job_stops_after_its_bound(stage):
    stage.kubelet.script = lambda pod: waiting(pod, "CreateContainerConfigError", 'secret "s3" not found')
    begun = time.monotonic()
    stage.apply(job(stage, failurePolicy={"startupTimeoutSeconds": 8}))
    message = stage.wait_condition("ftj", "sentiment", "Succeeded", "Unknown", "SecretNotFound", 30)
    assert time.monotonic() - begun < 30
    assert "Secret s3" in message
    assert "AWS_SECRET_ACCESS_KEY" in message
    stage.wait_condition("ftj", "sentiment", "Succeeded", "False", "SecretNotFound", 30)
    stage.wait("the Job to be deleted", lambda: not stage.get("job", "sentiment-1"))
    stage.wait("its pods to be deleted", lambda: not stage.items("pods"))


def test_pods_that_the_namespace_refuses_are_told_within_30_seconds(stage):
    limits = {"limits": [{"type": "Container", "max": {"memory": "64Mi"}}]}
    stage.apply({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits})
    stage.apply(job(stage))
    message = stage.wait_condition("ftj", "sentiment", "Succeeded", "Unknown", "PodRejected", 30)
    assert "maximum memory usage per Container is 64Mi" in message


def test_a_users_error_ends_the_job_at_once_in_the_trainers_words(stage):
    stage.kubelet.script = lambda pod: ended(pod, 40, make.failed()) if index_of(pod) == 1 else running(pod)
    stage.apply(job(stage))
    message = stage.wait_condition("ftj", "sentiment", "Succeeded", "False", "DatasetInvalid", 30)
    assert "line 3" in message
    assert "kubectl logs" in message
    assert stage.get("ftj", "sentiment")["status"]["attempts"][0]["reason"] == "DatasetInvalid"


def test_a_deleted_job_takes_its_children_along(stage):
    stage.apply(job(stage))
    stage.wait("the Job", lambda: stage.get("job", "sentiment-1"))
    stage.kubectl("delete", "ftj", "sentiment", "--timeout=20s")

    def left():
        return stage.items("svc,cm,secret,netpol,jobs,pods", "app.kubernetes.io/managed-by=tunesmith")

    stage.wait("no children", lambda: not left(), 40)


def test_a_namespace_goes_away_in_mid_training_with_or_without_the_operator(stage):
    for alive in (True, False):
        name = f"{stage.namespace}-{'a' if alive else 'b'}"
        stage.cluster.kubectl("create", "namespace", name)
        stage.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(make.finetunejob(namespace=name)))
        stage.wait("the Job", lambda name=name: stage.cluster.kubectl("-n", name, "get", "jobs", "-o", "name"))
        if not alive:
            stage.operator.kill()
        try:
            stage.cluster.kubectl("delete", "namespace", name, "--timeout=60s")
        finally:
            if not alive:
                stage.operator.start()
        assert name not in stage.cluster.kubectl("get", "namespaces", "-o", "name")
    assert '"watches"' in stage.operator.health()


def test_a_killed_operator_goes_on_where_it_was(stage):
    for delay in (0.0, 0.05, 0.1, 0.2, 0.4):
        name = f"job-{int(delay * 100)}"
        stage.apply(job(stage, name, output={"uri": f"s3://models/{name}"}))
        time.sleep(delay)
        stage.operator.kill()
        stage.operator.start()
        stage.wait("the Job", lambda name=name: stage.get("job", f"{name}-1"))
        stage.kubelet.script = finishing
        stage.wait_condition("ftj", name, "Succeeded", "True", "Completed")
        assert len(stage.get("ftj", name)["status"]["attempts"]) == 1
        assert stage.get("ftj", name)["status"]["restarts"] == 0
        stage.kubelet.script = running


def test_a_deleted_child_job_is_made_again(stage):
    stage.apply(job(stage))
    first = stage.wait("the Job", lambda: stage.get("job", "sentiment-1"))["metadata"]["uid"]
    stage.wait("workers", lambda: stage.get("ftj", "sentiment")["status"].get("display", {}).get("workers") == "2/2")
    stage.kubectl("delete", "job", "sentiment-1")
    again = stage.wait("another Job", lambda: stage.get("job", "sentiment-1"))
    assert again["metadata"]["uid"] != first
    stage.wait("restarts", lambda: stage.get("ftj", "sentiment")["status"]["restarts"] == 1)


def test_suspending_frees_the_pods_and_resuming_brings_them_back(stage):
    stage.apply(job(stage))
    stage.wait("two pods", lambda: len(stage.items("pods")) == 2)
    stage.kubectl("patch", "ftj", "sentiment", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    stage.wait("no pods", lambda: not stage.items("pods"))
    stage.wait_condition("ftj", "sentiment", "Succeeded", "Unknown", "Suspended")
    stage.kubectl("patch", "ftj", "sentiment", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    stage.wait("two pods", lambda: len(stage.items("pods")) == 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"training": {"globalBatchSize": 1}}, "every process needs an example"),
        ({"training": {"learningRate": 2}}, "learningRate must lie between 0 and 1"),
        ({"output": {"uri": "s3://checkpoints/sentiment"}}, "must be different folders"),
        ({"output": {"uri": "s3://models/base"}}, "the model to start from would be overwritten"),
        ({"model": {"uri": "https://models/base"}}, "spec.model.uri"),
        ({"workers": {"replicas": 0}}, "spec.workers.replicas"),
        ({"trainnig": {}}, 'unknown field "spec.trainnig"'),
        ({"storage": {"endpointURL": "http://me:secret@s3:8333"}}, "must hold no user name and no password"),
    ],
)
def test_a_bad_spec_is_refused_at_admission_by_field(stage, spec, message):
    with pytest.raises(CommandFailed, match=message):
        stage.apply(job(stage, **spec))


def test_a_started_job_refuses_to_change_what_it_is_training(stage):
    stage.apply(job(stage))
    stage.wait("the start", lambda: stage.get("ftj", "sentiment").get("status", {}).get("startTime"))
    with pytest.raises(CommandFailed, match="create a new FineTuneJob"):
        stage.kubectl("patch", "ftj", "sentiment", "--type=merge", "-p", '{"spec":{"training":{"maxSteps":9}}}')


def test_a_term_signal_ends_the_operator_cleanly_and_soon(stage):
    begun = time.monotonic()
    code = stage.operator.stop()
    took = time.monotonic() - begun
    stage.operator.start()
    assert code == 0
    assert took < 10
