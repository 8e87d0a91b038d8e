"""Trackers: TensorBoard's files read back, MLflow over HTTP and in its file store, and servers that fail in every way."""

import math
import socket
import threading
import time

import pytest

from support import trackingserver
from support.plans import training_plan
from tunesmith_trainer.loop import tracking
from tunesmith_trainer.loop.tracking import Tracker

DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test waits for minutes, and none leaves MLflow's settings behind."""
    monkeypatch.setattr(tracking, "INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "FIRST_PAUSE_SECONDS", 0.05)
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def lines():
    return []


@pytest.fixture
def server(tmp_path):
    with trackingserver.running(tmp_path / "store") as state:
        yield state


def plan(tensor_board=False, uri=None, **changes):
    spec = {"tensorBoard": tensor_board}
    if uri:
        spec["mlflow"] = {"trackingURI": uri, "experimentName": "tweets"}
    return training_plan(tracking=spec, **changes)


def opened(folder, lines, **options):
    return Tracker.open(plan(**options), folder, DIGEST, lines.append)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def runs_of(store):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("tweets")
    return client, client.search_runs([experiment.experiment_id], order_by=["attribute.start_time"])


# ---- TensorBoard


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    scalars = {
        tag: [(event.step, pytest.approx(event.value)) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }
    return scalars, found.Tags()["tensors"]


def test_tensorboard_holds_what_was_recorded(tmp_path, lines):
    tracker = opened(tmp_path / "tensorboard", lines, tensor_board=True)
    for step in (1, 2, 3):
        tracker.record(step, {"loss": 1.0 / step, "learningRate": 1e-4})
    tracker.evaluation(3, {"accuracy": 0.75})
    tracker.finish({"trainLoss": 0.4})
    scalars, tensors = events(tmp_path / "tensorboard")
    assert scalars["train/loss"] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert scalars["train/learningRate"] == [(step, 1e-4) for step in (1, 2, 3)]
    assert scalars["eval/accuracy"] == [(3, 0.75)]
    assert scalars["final/trainLoss"] == [(3, 0.4)]
    assert "settings/text_summary" in tensors
    assert lines == []


def test_after_a_rollback_or_a_restart_the_curve_is_that_of_the_steps_that_count(tmp_path, lines):
    folder = tmp_path / "tensorboard"
    first = opened(folder, lines, tensor_board=True)
    for step in range(1, 6):
        first.record(step, {"loss": float(step)})
    first.rewind([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}], [{"step": 0, "accuracy": 0.5}])
    first.record(3, {"loss": 30.0})
    first.pause()
    assert events(folder)[0]["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    second = opened(folder, lines, tensor_board=True)
    second.rewind([{"step": 1, "loss": 1.0}], [{"step": 0, "accuracy": 0.5}])
    second.record(2, {"loss": 20.0})
    second.finish({})
    scalars, _ = events(folder)
    assert scalars["train/loss"] == [(1, 1.0), (2, 20.0)]
    assert scalars["eval/accuracy"] == [(0, 0.5)]


def test_a_folder_that_cannot_be_written_is_told_once_and_training_goes_on(tmp_path, lines):
    (tmp_path / "file").touch()
    tracker = opened(tmp_path / "file" / "below", lines, tensor_board=True)
    tracker.record(1, {"loss": 1.0})
    tracker.rewind([], [])
    tracker.finish({"trainLoss": 1.0})
    assert len(lines) == 1
    assert "TensorBoard" in lines[0]


def test_without_tracking_nothing_is_written_and_no_thread_runs(tmp_path, lines):
    threads = threading.active_count()
    tracker = opened(tmp_path / "tensorboard", lines)
    for one in (tracker, Tracker.silent()):
        one.record(1, {"loss": 1.0})
        one.evaluation(1, {"loss": 1.0})
        one.rewind([], [])
        one.pause()
        one.finish({"trainLoss": 1.0}, tmp_path / "report.html", failed=True)
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []


# ---- MLflow


def steps_of(client, run, name):
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]


def test_mlflow_gets_parameters_metrics_with_steps_and_the_report(server, tmp_path, lines):
    report = tmp_path / "report.html"
    report.write_text("<p>fine</p>")
    tracker = opened(tmp_path, lines, uri=server.uri)
    for step in (1, 2, 3):
        tracker.record(step, {"loss": 1.0 / step, "gradNorm": math.inf})
    tracker.evaluation(3, {"accuracy": 0.75})
    tracker.finish({"evalAccuracy": 0.75}, report)
    client, [run] = runs_of((tmp_path / "store").as_uri())
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "job"
    assert steps_of(client, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert steps_of(client, run, "eval/accuracy") == [(3, 0.75)]
    assert steps_of(client, run, "evalAccuracy") == [(3, 0.75)]
    assert run.data.params["training.learningRate"] == "0.01"
    assert run.data.params["dataset.train.uri"] == "s3://bucket/train.jsonl"
    assert run.data.tags["tunesmith.job"] == "ml/job"
    assert run.data.tags["tunesmith.digest"] == DIGEST
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["report.html"]
    assert lines == []


def test_a_restarted_trainer_goes_on_with_its_run_and_a_new_attempt_has_its_own(tmp_path, lines):
    store = (tmp_path / "store").as_uri()
    first = opened(tmp_path, lines, uri=store)
    first.record(1, {"loss": 1.0})
    first.pause()
    client, [run] = runs_of(store)
    assert run.info.status == "RUNNING"
    second = opened(tmp_path, lines, uri=store)
    second.record(2, {"loss": 2.0})
    second.finish({}, failed=True)
    third = opened(tmp_path, lines, uri=store, attempt=2)
    third.record(1, {"loss": 7.0})
    third.finish({})
    other = opened(tmp_path, lines, uri=store, uid="u-2")
    other.finish({})
    client, runs = runs_of(store)
    assert {run.info.run_name: run.info.status for run in runs[:2]} == {"job": "FAILED", "job-2": "FINISHED"}
    assert [steps_of(client, run, "train/loss") for run in runs[:2]] == [[(1, 1.0), (2, 2.0)], [(1, 7.0)]]
    assert len(runs) == 3
    assert lines == []


def test_a_refused_connection_is_told_once_and_costs_training_nothing(tmp_path, lines, monkeypatch):
    uri = f"http://127.0.0.1:{free_port()}"
    tracker = opened(tmp_path, lines, uri=uri)
    began, computed = time.monotonic(), time.thread_time()
    for step in range(2000):
        tracker.record(step, {"loss": 1.0, "gradNorm": 2.0})
    assert time.thread_time() - computed < 0.5
    assert time.monotonic() - began < 5, "whatever else the machine does: it waits for nothing"
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # several more tries
    assert len(lines) == 1
    assert uri in lines[0]
    assert "can't be written to" in lines[0]
    tracker.finish({"trainLoss": 1.0}, tmp_path / "report.html")
    assert len(lines) == 2
    assert "lacks 2001 records and the report" in lines[1]


def test_a_server_that_never_answers_holds_the_end_up_for_a_bounded_time(server, tmp_path, lines, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.5)
    server.silent = True
    tracker = opened(tmp_path, lines, uri=server.uri)
    deadline = time.monotonic() + 60
    while not server.calls and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.calls
    tracker.record(1, {"loss": 1.0})
    began = time.monotonic()
    tracker.finish({"trainLoss": 1.0})
    assert time.monotonic() - began < 5
    assert lines == [f"warning: MLflow at {server.uri} lacks 2 records"]


def test_what_was_recorded_while_the_server_was_down_is_sent_once_it_is_back(server, tmp_path, lines):
    server.broken = True
    tracker = opened(tmp_path, lines, uri=server.uri)
    for step in range(1, 1201):  # more than one request
        tracker.record(step, {"loss": float(step)})
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "can't be written to" in lines[0]
    server.broken = False
    tracker.finish({"trainLoss": 1.0})
    client, [run] = runs_of((tmp_path / "store").as_uri())
    assert steps_of(client, run, "train/loss") == [(step, float(step)) for step in range(1, 1201)]
    assert run.info.status == "FINISHED"
    assert len(lines) == 1


def test_a_queue_that_is_full_drops_the_oldest_and_says_how_many(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(tracking, "QUEUE_SIZE", 10)
    tracker = opened(tmp_path, lines, uri=f"http://127.0.0.1:{free_port()}")
    for step in range(25):
        tracker.record(step, {"loss": 1.0})
    [sink] = tracker._sinks
    with sink._lock:
        assert [point.step for point in sink._waiting] == list(range(15, 25))
    tracker.finish({})
    assert lines[-1].endswith("lacks 26 records")


def test_a_report_that_is_refused_leaves_the_run_finished(server, tmp_path, lines):
    tracker = opened(tmp_path, lines, uri=server.uri)
    tracker.record(1, {"loss": 1.0})
    tracker.finish({}, tmp_path / "is not there.html")
    _, [run] = runs_of((tmp_path / "store").as_uri())
    assert run.info.status == "FINISHED"
    assert len(lines) == 1
    assert "takes no report" in lines[0]


def test_what_the_server_will_never_take_does_not_block_what_comes_behind_it(server, tmp_path, lines):
    tracker = opened(tmp_path, lines, uri=server.uri)
    tracker.record(1, {"no*such?name": 1.0})
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
        time.sleep(0.02)
    tracker.record(2, {"loss": 2.0})
    tracker.finish({})
    client, [run] = runs_of((tmp_path / "store").as_uri())
    assert steps_of(client, run, "train/loss") == [(2, 2.0)]
    assert "INVALID_PARAMETER_VALUE" in lines[0]
    assert lines[1].endswith("lacks 1 record")
