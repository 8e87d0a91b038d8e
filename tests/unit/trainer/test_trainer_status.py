"""Progress from rank 0 to the supervisor's HTTP face, and the pod's last word."""

import json
import socket
import time
import urllib.error
import urllib.request

import pytest

from tunesmith_api.keys import Reason
from tunesmith_api.reports import (
    MAX_TERMINATION_BYTES,
    CheckpointRef,
    DatasetFacts,
    Outcome,
    ProgressReport,
    TerminationReport,
    TrainerState,
)
from tunesmith_trainer.pod import progress
from tunesmith_trainer.pod.progress import ProgressPusher, ProgressUpdate
from tunesmith_trainer.pod.status_server import ProgressBoard, StatusServer
from tunesmith_trainer.pod.supervisor import completed_from, write_termination


@pytest.fixture
def printed():
    return []


@pytest.fixture
def board(printed):
    return ProgressBoard(attempt=2, echo=printed.append)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def health():
    return {"up": False}


@pytest.fixture
def server(board, port, health):
    running = StatusServer(board, "secret", lambda: (health["up"], {"incarnation": "i"}), port)
    running.start()
    yield f"http://127.0.0.1:{port}"
    running.close()


def get(url, data=None, token="secret"):
    request = urllib.request.Request(url, data=data, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_health_is_ready_only_with_ray(server, health):
    assert get(f"{server}/healthz")[0] == 503
    health["up"] = True
    assert get(f"{server}/healthz") == (200, '{"incarnation": "i"}')


def test_a_pod_of_any_address_family_is_reached(board, port):
    running = StatusServer(board, "secret", lambda: (True, {}), port)
    running.start()
    try:
        for host in ("127.0.0.1", *(["[::1]"] if socket.has_dualstack_ipv6() else [])):
            assert get(f"http://{host}:{port}/healthz")[0] == 200
    finally:
        running.close()


def test_on_a_machine_that_others_share_only_loopback_is_served(board, port):
    running = StatusServer(board, "secret", lambda: (True, {}), port, "127.0.0.1")
    running.start()
    try:
        assert get(f"http://127.0.0.1:{port}/healthz")[0] == 200
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=2)
    finally:
        running.close()


def test_posts_need_the_token_and_the_right_form(server):
    update = ProgressUpdate(global_step=3).to_json().encode()
    assert get(f"{server}/progress", update, token="wrong")[0] == 401
    assert get(f"{server}/progress", b'{"nonsense": 1}')[0] == 400
    assert get(f"{server}/elsewhere", update)[0] == 404
    assert ProgressReport.from_json(get(f"{server}/progress")[1]).global_step == 0
    assert get(f"{server}/progress", update)[0] == 200
    assert ProgressReport.from_json(get(f"{server}/progress")[1]).global_step == 3


def test_a_pusher_delivers_numbers_lines_and_phases(server, board, printed, port):
    pusher = ProgressPusher("127.0.0.1", "secret", port)
    pusher.phase("firstStep")
    for step in range(1, 4):
        pusher.update(state=TrainerState.TRAINING, global_step=step, loss=1.0 / step)
        pusher.log(f"step {step}")
    pusher.update(checkpoint=CheckpointRef(step=2, uri="s3://c/2"), rollbacks=1)
    pusher.update(dataset=DatasetFacts(train_examples=9, bad_rows=1))
    pusher.close()
    report = board.report
    assert (report.attempt, report.global_step, report.state) == (2, 3, TrainerState.TRAINING)
    assert report.checkpoint == CheckpointRef(step=2, uri="s3://c/2")
    assert (report.rollbacks, report.dataset) == (1, DatasetFacts(train_examples=9, bad_rows=1))
    assert list(report.phase_seconds) == ["firstStep"]
    assert printed == ["step 1", "step 2", "step 3"]
    assert time.time() - report.heartbeat_unix < 5


def test_a_pusher_without_a_listener_holds_nothing_up(port, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.01)
    began, computed = time.monotonic(), time.thread_time()
    pusher = ProgressPusher("127.0.0.1", "secret", port)
    for step in range(1000):
        pusher.update(global_step=step)
    assert time.thread_time() - computed < 1
    assert time.monotonic() - began < 5, "whatever else the machine does: it waits for nothing"
    pusher.close()


def test_updates_merge_and_lines_add_up():
    first = ProgressUpdate(global_step=1, loss=2.0, lines=("a",), phases=("x",))
    both = first.merged(ProgressUpdate(global_step=2, lines=("b",)))
    assert (both.global_step, both.loss, both.lines, both.phases) == (2, 2.0, ("a", "b"), ("x",))


def test_restarts_never_go_back_and_phases_keep_their_first_time(board):
    board.apply(ProgressUpdate(restarts=3, phases=("firstStep",)))
    first = board.report.phase_seconds["firstStep"]
    board.apply(ProgressUpdate(restarts=1, phases=("firstStep",)))
    assert board.report.restarts == 3
    assert board.report.phase_seconds["firstStep"] == first


def test_metrics_are_prometheus_text(board):
    board.apply(ProgressUpdate(global_step=7, loss=0.5, phases=("rayStarted",)))
    text = board.metrics()
    assert "# TYPE tunesmith_global_step gauge\ntunesmith_global_step 7\n" in text
    assert "tunesmith_loss 0.5\n" in text
    assert 'tunesmith_phase_seconds{phase="rayStarted"}' in text
    assert "eval_loss" not in text


def test_the_last_word_fits_and_is_filled_from_progress(tmp_path):
    log = tmp_path / "termination-log"
    report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.DIVERGED, message="ä" * 9000)
    last = ProgressReport(global_step=5, max_steps=9, checkpoint=CheckpointRef(step=4, uri="s3://c/4"), restarts=1)
    write_termination(log, completed_from(report, last, restarts=2))
    assert len(log.read_bytes()) <= MAX_TERMINATION_BYTES
    written = json.loads(log.read_text())
    assert (written["globalStep"], written["restarts"], written["checkpoint"]["step"]) == (5, 2, 4)


def test_what_holds_a_trainer_up_stands_until_a_try_has_got_beyond_it(board):
    lacking = {"state": TrainerState.STARTING, "message": "can't list s3://data", "reason": Reason.STORAGE_UNREACHABLE}
    board.apply(ProgressUpdate(**lacking, restarts=1))
    board.apply(ProgressUpdate(state=TrainerState.PREPARING, message="checking data, model and buckets"))
    board.apply(ProgressUpdate(lines=("a line",), phases=("rayStarted",)))
    assert board.report.reason == "StorageUnreachable"
    assert ProgressReport.from_json(board.report.to_json()).reason == "StorageUnreachable"
    board.apply(ProgressUpdate(phases=("inputChecked",)))
    assert board.report.reason == ""
    board.apply(ProgressUpdate(**lacking, restarts=2))
    board.apply(ProgressUpdate(state=TrainerState.STARTING, message="Ray ended in this pod"))
    assert board.report.reason == ""
