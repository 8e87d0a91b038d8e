"""Ctrl-C, once and twice, and other ends, with a stand-in for the trainer that does as it is told.

`test_cli_run.py` has the real one.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tunesmith_api.keys import ExitCode

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = textwrap.dedent(
    """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from tunesmith_api.keys import Reason
    from tunesmith_api.reports import CheckpointRef, Outcome, TerminationReport

    def stop(*_):
        Path(os.environ["MARK"]).write_text("told to stop")
        saved = CheckpointRef(step=7, uri="s3://checkpoints/sentiment/7")
        report = TerminationReport(outcome=Outcome.INTERRUPTED, reason=Reason.INTERRUPTED, checkpoint=saved)
        Path(os.environ["TUNESMITH_TERMINATION_LOG"]).write_text(report.to_json())
        sys.exit(75)

    kind = os.environ["STAND_IN"]
    if kind == "crashes":
        print("a word in the log", file=sys.stderr)
        sys.exit(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if kind == "stubborn" else stop)
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    print("child", child.pid, flush=True)
    time.sleep(300)
    """
)


@pytest.fixture
def start(tmp_path):
    """Start the command line with the stand-in; return it and the pid of what the stand-in has started."""
    package = tmp_path / "path" / "tunesmith_trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    started = []

    def begin(kind):
        environment = {
            **os.environ, "STAND_IN": kind, "MARK": str(tmp_path / "mark"),
            "PYTHONPATH": f"{tmp_path / 'path'}:{ROOT / 'crds'}:{ROOT / 'operator'}:{ROOT / 'trainer_image'}",
        }  # fmt: skip
        job = ROOT / "manifests/samples/finetunejob.yaml"
        process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith_cli", "run", "-f", str(job), "--work-dir", str(tmp_path / "work")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        if kind == "crashes":
            return process, 0
        line = process.stdout.readline()
        assert line.startswith("child "), line + process.stdout.read()
        return process, int(line.split()[1])

    yield begin
    for process in started:
        process.kill()
        process.wait()


def is_alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop_it_has_a_checkpoint_saved_and_says_how_to_go_on(start, number, tmp_path):
    process, _ = start("saves")
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "stopping: a checkpoint is saved first" in output
    assert "step 7 is saved in s3://checkpoints/sentiment/7" in output
    assert f"tunesmith run -f {ROOT}/manifests/samples/finetunejob.yaml --work-dir {tmp_path}/work" in output
    assert list((tmp_path / "work").iterdir()) == []


def test_a_second_ctrl_c_kills_the_trainer_and_all_that_it_has_started(start):
    process, child = start("stubborn")
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    assert is_alive(child)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "goes on from the last checkpoint" in output
    wait_until(lambda: not is_alive(child))


def test_when_the_command_line_itself_is_killed_the_trainer_saves(start, tmp_path):
    process, child = start("saves")
    process.kill()
    wait_until((tmp_path / "mark").exists)
    os.kill(child, signal.SIGKILL)


def test_a_crash_without_a_word_leaves_the_log(start, tmp_path):
    process, _ = start("crashes")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the trainer ended without a word (exit code 1)" in output
    (log,) = (tmp_path / "work").glob("*/trainer.log")
    assert f"log: {log}\n" in output
    assert "a word in the log\n" in output
