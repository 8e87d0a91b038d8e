""".ci/run and PyPI's own build of torch: its environment is used where it is there, and never made for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = """
lint type verify:
\t@echo $@ was run
test:
\t@echo '5 passed, 0 failed, 0 skipped' && echo '{"failed": 0}' && $(TEST)
unit component:
\t@echo $@ was run with wheels from $$TUNESMITH_WHEELS && $(SECOND)
"""
COUNTS = ["5 passed, 0 failed, 0 skipped", '{"failed": 0}']


def environment_path(**environ):
    command = [ROOT / "requirements/venv.sh", "--made"]
    return subprocess.run(command, env=os.environ | environ, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def ci(tmp_path):
    """Runs .ci/run over floors that only say that they were run; returns its status and lines."""
    for name, text in (
        (".ci/run", (ROOT / ".ci/run").read_text()),
        ("Makefile", MAKEFILE),
        ("requirements/venv.sh", '#!/bin/sh\ntest "$1" != --made && echo default || echo "$SERVED"\n'),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(served="", test="true", second="true"):
        environ = os.environ | {"SERVED": str(served), "TEST": test, "SECOND": second}
        done = subprocess.run([tmp_path / ".ci/run"], env=environ, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    return run


@pytest.mark.parametrize("served", ["", "default"])
def test_all_is_run_once_where_there_is_one_environment(ci, served):
    status, lines = ci(served)
    assert status == 0
    assert [line for line in lines if "was run" in line] == [f"{name} was run" for name in ("lint", "type", "verify")]
    assert lines[-2:] == COUNTS


def with_second_environment(lines):
    return [line for line in lines if "was run with wheels" in line]


def test_two_floors_are_run_with_pypis_build_too_after_the_rest_and_once(ci, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    status, lines = ci(served)
    assert status == 0
    expected = [f"{floor} was run with wheels from none" for floor in ("unit", "component")]
    assert with_second_environment(lines) == expected
    assert lines.index(expected[0]) > lines.index(COUNTS[1])
    assert lines[-2:] == COUNTS
    status, lines = ci(served)
    assert (status, with_second_environment(lines)) == (0, [])


def test_a_failure_of_either_is_one_of_the_whole(ci, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    for failing in ({"second": "false"}, {"test": "false"}):
        status, lines = ci(served, **failing)
        assert status == 1
        assert with_second_environment(lines)
        assert lines[-2:] == COUNTS


def test_an_environment_that_is_not_there_is_not_made(tmp_path):
    assert environment_path(TUNESMITH_CACHE=str(tmp_path / "cache")) == ""
    assert not (tmp_path / "cache").exists()
    assert Path(environment_path()) == Path(sys.prefix)
