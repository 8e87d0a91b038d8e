"""Children, grandchildren and orphans: none is lost, none survives."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

# In a process of its own: reaping takes every child of the process that does it.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from tunesmith_trainer.pod.processes import Children, SignalPause

children = Children()
{body}
"""


def run(body):
    program = PROGRAM.format(body=textwrap.dedent(body))
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_exit_codes_are_kept():
    assert run(
        """
        one = children.spawn(["sh", "-c", "exit 7"], os.environ)
        two = children.spawn(["sh", "-c", "kill -9 $$"], os.environ)
        while children.exit_code(one) is None or children.exit_code(two) is None:
            time.sleep(0.01)
        print(children.exit_code(one), children.exit_code(two))
        """
    ) == ["7", "-9"]


def test_an_orphan_is_seen_reaped_and_killed():
    assert run(
        """
        # a daemon, as `ray start` leaves them: its parent ends at once
        starter = children.spawn(["sh", "-c", "sleep 300 & echo $! > /dev/stderr; exit 0"], os.environ)
        while children.exit_code(starter) is None:
            time.sleep(0.01)
        pid = children.named("sleep")
        print(children.is_alive(pid), len(children.descendants()))
        children.kill_all()
        print(children.is_alive(pid), len(children.descendants()), children.exit_code(pid))
        """
    ) == ["True", "1", "False", "0", "-9"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
def test_killing_takes_children_born_meanwhile():
    out = run(
        """
        children.spawn(["sh", "-c", "while true; do sleep 0.02 & done"], os.environ)
        time.sleep(0.3)
        children.kill_all()
        print(len(children.descendants()))
        """
    )
    assert out == ["0"]
    assert time.time() > 0


def test_a_pause_ends_with_a_child_or_a_signal_even_an_earlier_one():
    before, child, handled, quiet = run(
        """
        pause = SignalPause()
        signal.signal(signal.SIGTERM, lambda *_: None)

        def seconds(limit):
            began = time.monotonic()
            pause.wait(limit)
            return time.monotonic() - began

        os.kill(os.getpid(), signal.SIGTERM)
        before = seconds(30)
        one = children.spawn(["sleep", "0.3"], os.environ)
        child = seconds(30)
        children.reap()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        handled = seconds(30)
        print(before, child, handled, seconds(0.2))
        """
    )
    assert float(before) < 5
    assert 0.1 < float(child) < 5
    assert float(handled) < 5
    assert float(quiet) >= 0.2
