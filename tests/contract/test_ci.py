""".ci/run and what it calls: floors side by side; PyPI's own build of torch, whose environment is used where it is there and never made."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from suite import __main__ as suite

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = """
lint type verify:
\t@echo $@ was run
test:
\t@echo '== unit: 3 passed in $(TOOK) s' && echo '== component: 2 passed in $(TOOK) s'
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

    def run(served="", test="true", second="true", took=1, seconds=5100, **more):
        environ = os.environ | {"SERVED": str(served), "TEST": test, "SECOND": second}
        environ |= {"TOOK": str(took), "CI_SECONDS": str(seconds), **more}
        done = subprocess.run([tmp_path / ".ci/run"], env=environ, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    return run


@pytest.mark.parametrize("served", ["", "default"])
def test_all_is_run_once_where_there_is_one_environment(ci, served):
    status, lines = ci(served)
    assert status == 0
    ran = [line for line in lines if "was run" in line]
    assert sorted(ran) == [f"{name} was run" for name in ("lint", "type", "verify")]
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


def test_the_second_environment_gets_what_time_is_left(ci, tmp_path):
    served = tmp_path / "served"
    served.mkdir()
    again = "run TUNESMITH_WHEELS=none make unit component"
    status, lines = ci(served, seconds=600, took=400)
    assert (status, with_second_environment(lines), lines[-2:]) == (0, [], COUNTS)
    (said,) = [line for line in lines if line.startswith("== not run with PyPI's build of torch: ")]
    assert said.endswith(f"and they took 800 s; {again}")

    impatient = tmp_path / "bin/timeout"
    impatient.parent.mkdir()
    impatient.write_text('#!/bin/sh\necho "so many seconds: $1"\nexit 124\n')
    impatient.chmod(0o755)
    status, lines = ci(served, seconds=600, took=200, PATH=f"{impatient.parent}:{os.environ['PATH']}")
    assert (status, lines[-2:]) == (0, COUNTS), "what there was no time for has not failed"
    (left,) = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("so many seconds: ")]
    assert 400 < left <= 600
    assert f"== not ended with PyPI's build of torch within {left} s: {again}" in lines
    assert not (served / ".tested").exists()


def test_an_environment_that_is_not_there_is_not_made(tmp_path):
    assert environment_path(TUNESMITH_CACHE=str(tmp_path / "cache")) == ""
    assert not (tmp_path / "cache").exists()
    assert Path(environment_path()) == Path(sys.prefix)


# --- floors side by side ---

MEETS = """
import time
from pathlib import Path

def test_meets_the_other():
    Path({mine!r}).touch()
    deadline = time.monotonic() + 120
    while not Path({other!r}).exists():
        assert time.monotonic() < deadline, "alone"
        time.sleep(0.05)
"""
COUNTED = """
import os
import pytest

def test_passes():
    print("rank", os.nice(0))
    assert {holds}

@pytest.mark.skip(reason="not here")
def test_is_left_out():
    pass
"""


@pytest.fixture
def floors(tmp_path, monkeypatch, capfd):
    """Runs the suite over floors of these tests; returns its status and lines."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # nothing of ours is needed, and pytest starts sooner

    def run(*names, **texts):
        for floor, text in texts.items():
            folder = tmp_path / "tests" / floor
            folder.mkdir(parents=True)
            (folder / f"test_of_{floor}.py").write_text(text)
        monkeypatch.setattr(sys, "argv", ["suite", *names, "--", "-s", "-p", "no:cacheprovider"])
        status = suite.main()
        return status, capfd.readouterr().out.splitlines()

    return run


def test_floors_of_two_lanes_run_side_by_side_and_are_counted_in_one(floors, tmp_path):
    here, there = str(tmp_path / "e2e-began"), str(tmp_path / "unit-began")
    status, lines = floors(
        *("unit", "faults", "e2e"),
        e2e=MEETS.format(mine=here, other=there),
        unit=MEETS.format(mine=there, other=here) + COUNTED.format(holds=True),
        faults=COUNTED.format(holds=False),
    )
    assert status == 1
    counts = {
        "unit": 2,
        "component": 0,
        "contract": 0,
        "faults": 0,
        "integration": 0,
        "e2e": 1,
        "skipped": 2,
        "failed": 1,
    }
    assert json.loads(lines[-1]) == counts
    assert lines[-2] == "3 passed, 1 failed, 2 skipped"
    assert [line for line in lines if re.fullmatch(r"== unit: 2 passed in \d+ s", line)]
    marks = {line.partition(" | ")[0] for line in lines if " | " in line}
    assert marks == {"unit", "faults", "e2e"}, "whose each line is"
    assert [line for line in lines if line.endswith(f"rank {min(19, os.nice(0) + suite.NICENESS)}")]


def test_every_floor_is_in_one_lane_and_a_floor_alone_is_run_as_it_is(floors):
    assert sorted(floor for lane in suite.LANES for floor in lane) == sorted(suite.FLOORS)
    assert suite.lanes_of(["unit", "faults"]) == [["unit", "faults"]]
    assert suite.lanes_of(["unit", "e2e"]) == [["e2e"], ["unit"]]
    status, lines = floors("faults", faults=COUNTED.format(holds=True))
    assert (status, lines[-2]) == (0, "1 passed, 0 failed, 1 skipped")
    assert not [line for line in lines if line.startswith("faults | ")]
    assert [line for line in lines if line.endswith(f"rank {os.nice(0)}")], "with the rank of who asked"
