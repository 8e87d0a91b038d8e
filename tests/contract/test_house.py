"""The house's own rules: no addresses in locks, nothing shadows the standard library, images drop their rights, sizes hold."""

import itertools
import operator
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from suite.__main__ import FLOORS, read_counts
from suite.faults import survival
from suite.housemap.drawing import draw
from suite.housemap.graph import Circle, floors_of, read_house, reduced, rooms_of
from suite.housemap.layout import arrange
from suite.structure import SOURCES, violations

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
DOCKERFILES = tuple(
    ROOT / name for name in ("operator/Dockerfile", "trainer_image/Dockerfile", "trainer_image/vllm.Dockerfile")
)


def test_structure_limits_hold():
    assert list(violations(ROOT)) == []


MADE_UP = "trainer_image/tunesmith_made/"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"crds/long.py": "def f():\n" + "    x = 1\n" * 70}, "crds/long.py:1: f has 71 lines, at most 60"),
        ({"tests/unit/much.py": "x = 1\n" * 501}, "tests/unit/much.py: 501 lines, at most 500"),
        ({"tests/operator/__init__.py": ""}, "tests/operator/__init__.py: a package named operator shadows"),
        ({f"{MADE_UP}m{n}.py": "" for n in range(13)}, "tunesmith_made: 13 modules, at most 12: give it rooms"),
        (
            {f"{MADE_UP}a.py": "", "tests/unit/test_a.py": "def test_a():\n    from tunesmith_made import a as b\n"},
            "tests/unit/test_a.py:2: tunesmith_made.a is called b",
        ),
        (
            {f"{MADE_UP}a.py": "", f"{MADE_UP}b.py": "import tunesmith_made.a as other\n"},
            "b.py:1: tunesmith_made.a is called other",
        ),
        (
            {
                f"{MADE_UP}a.py": "",
                f"{MADE_UP}b.py": "from tunesmith_made import a\n",
                f"{MADE_UP}c.py": "from tunesmith_made.b import a\n",
            },
            "c.py:1: tunesmith_made.a is called tunesmith_made.b.a",
        ),
        (
            {f"{MADE_UP}a.py": "", "tests/unit/test_a.py": 'PROGRAM = """\nfrom tunesmith_made.old import x\n"""\n'},
            "tests/unit/test_a.py:2: there is no module tunesmith_made.old",
        ),
    ],
)
def test_what_breaks_a_limit_is_found(files, complaint, tmp_path):
    for name, text in {f"{MADE_UP}__init__.py": "", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (found,) = violations(tmp_path)
    assert complaint in found


def test_rooms_main_programs_and_other_imports_break_no_limit(tmp_path):
    files = {f"{name}.py": "" for name in ("__init__", "__main__", "room/__init__", *(f"m{n}" for n in range(12)))}
    files |= {f"room/m{n}.py": "" for n in range(20)}
    files["room/user.py"] = (
        "import tunesmith_made.m1\nimport numpy as np\nfrom tunesmith_made import m2\nfrom tunesmith_made.m2 import f as g\n"
    )
    for name, text in files.items():
        (tmp_path / MADE_UP / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / MADE_UP / name).write_text(text)
    assert list(violations(tmp_path)) == []


@pytest.fixture
def copy(tmp_path):
    """A copy of the product and its picture, and a way to run a check of `make verify` on it."""
    for folder in (*SOURCES, "tests/suite", "docs/images"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def run(*command):
        path = os.pathsep.join(str(tmp_path / folder) for folder in (*SOURCES, "tests"))
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    return tmp_path, run


def test_an_arrow_back_up_fails_the_linter_of_imports(copy):
    folder, run = copy
    command = (Path(sys.executable).with_name("lint-imports"), "--config", "pyproject.toml", "--no-cache")
    status, said = run(*command)
    assert status == 0, said
    upward = {
        "trainer_image/tunesmith_trainer/pod": "tunesmith_trainer.group",
        "operator/tunesmith_operator/core": "tunesmith_operator.engine",
    }
    for room, above in upward.items():
        with (folder / room / "__init__.py").open("a") as file:
            file.write(f"\nimport {above}\n")
    (folder / "trainer_image/tunesmith_trainer/attic").mkdir()
    (folder / "trainer_image/tunesmith_trainer/attic/__init__.py").touch()
    status, said = run(*command)
    assert status == 1
    assert "tunesmith_trainer.pod is not allowed to import tunesmith_trainer.group" in said
    assert "tunesmith_operator.core is not allowed to import tunesmith_operator.engine" in said
    assert "tunesmith_trainer.attic" in said, "a room without a floor is refused"


def test_the_picture_of_the_house_follows_the_imports(copy):
    folder, run = copy
    check = (sys.executable, "-m", "suite.housemap", "--check")
    assert run(*check) == (0, "docs/images/house.svg shows the code\n")
    models = folder / "trainer_image/tunesmith_trainer/models/__init__.py"
    models.write_text(models.read_text() + "\nimport tunesmith_trainer.pod\n")
    status, said = run(*check)
    assert status == 1
    assert "run `make generate`" in said
    assert run(sys.executable, "-m", "suite.housemap", "--write")[0] == 0
    assert run(*check)[0] == 0
    pod = folder / "trainer_image/tunesmith_trainer/pod/__init__.py"
    pod.write_text(pod.read_text() + "\nimport tunesmith_trainer.models\n")
    status, said = run(*check)
    assert status == 1
    assert "tunesmith_trainer.models → tunesmith_trainer.pod → tunesmith_trainer.models" in said


def test_floors_count_the_longest_way_and_arrows_say_nothing_twice():
    arrows = {room: frozenset(below) for room, below in {"a": "bcd", "b": "cd", "c": "d", "d": "", "e": ""}.items()}
    assert floors_of(arrows) == {"a": 3, "b": 2, "c": 1, "d": 0, "e": 1}
    assert reduced(arrows) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": set()}
    with pytest.raises(Circle, match="a → b → a"):
        floors_of({"a": frozenset("b"), "b": frozenset("a")})


def test_a_package_of_packages_is_opened():
    packages = {"p", "p.a", "p.b", "p.b.c"}
    assert rooms_of("p", packages, packages | {"p.m", "p.__main__", "p.b.x", "p.a.x"}) == ["p.a", "p.b", "p.m"]
    assert rooms_of("p", packages, packages | {"p.m", "p.n"}) == ["p"]
    assert rooms_of("p", packages, packages | {"p.a.x"}) == ["p.a", "p.b.c"]


def test_in_the_picture_nothing_lies_upon_another():
    house = read_house(ROOT)
    layout = arrange(house)
    assert sorted(name for row in layout.rows for name in row if name in house.rooms) == sorted(house.rooms)
    for row in layout.rows:
        for left, right in itertools.pairwise(layout.places[name] for name in row):
            assert left.x + left.width / 2 < right.x - right.width / 2
    for way in layout.ways:
        assert house.rooms[way[0]].floor - house.rooms[way[-1]].floor == len(way) - 1
    rooms = [element.text for element in ET.fromstring(draw(house)).iter() if element.get("class") == "name"]
    assert sorted(rooms) == sorted(name.rpartition(".")[2] for name in house.rooms)


def test_the_standard_librarys_operator_is_the_one_imported():
    assert Path(operator.__file__).is_relative_to(sysconfig.get_path("stdlib"))


@pytest.mark.parametrize("lock", [path for path in LOCKS if path.name != "apt.txt"], ids=lambda path: path.name)
def test_a_lock_pins_and_hashes_every_package_and_holds_no_address(lock):
    text = lock.read_text()
    assert "://" not in text
    assert "--index" not in text
    names = re.findall(r"(?m)^[A-Za-z0-9][A-Za-z0-9._-]*", text)
    assert len(names) > 1
    for entry in re.split(r"(?m)^(?=[A-Za-z0-9])", text)[1:]:
        assert re.match(r"[A-Za-z0-9._-]+==[^ ]+", entry), entry[:60]
        hashes = re.findall(r"--hash=sha256:\w+", entry)
        assert len(hashes) == len(set(hashes)) > 0, entry[:60]


def test_the_operator_image_gets_no_torch_and_the_trainer_image_no_kopf():
    assert not re.search(r"(?m)^(torch|ray|transformers)==", (ROOT / "requirements" / "operator.txt").read_text())
    assert not re.search(r"(?m)^(kopf|kubernetes)==", (ROOT / "requirements" / "trainer.txt").read_text())


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_image_takes_its_base_by_argument_and_runs_as_nobody(dockerfile):
    text = dockerfile.read_text()
    assert re.search(r"(?m)^ARG BASE_IMAGE=\S+", text)
    assert re.findall(r"(?m)^USER (.*)$", text)[-1] == "65532:65532"
    assert "--require-hashes" in text


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_image_whose_packages_cant_be_installed_isnt_built(dockerfile, tmp_path):
    (step,) = re.findall(r"(?ms)^RUN (python3 -m pip install .*?[^\\])$", dockerfile.read_text())
    python = tmp_path / "python3"
    for fails, status in (("pip", 1), ("compileall", 0)):  # some packages bring files that are no Python 3
        python.write_text(f'#!/bin/sh\ntest "$2" != {fails}\n')
        python.chmod(0o755)
        assert subprocess.run(["/bin/sh", "-c", step], env={"PATH": str(tmp_path)}, check=False).returncode == status


def test_every_make_command_of_the_documents_is_there():
    targets = set(re.findall(r"(?m)^([a-z0-9 -]+):", (ROOT / "Makefile").read_text()))
    targets = {name for names in targets for name in names.split()}
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "requirements").glob("*.md"),
    ]
    found = [re.findall(r"(?m)(?:^|`)make ((?:[a-z0-9-]+ ?)+)(?:`|  |$)", page.read_text()) for page in pages]
    named = {name for lines in found for line in lines for name in line.split()}
    assert len(named) > 10
    assert named <= targets


def test_tracked_files_hold_no_path_of_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    here = str(ROOT)
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path.suffix not in {".sum"}:
            assert here not in path.read_text(errors="ignore"), name


def test_the_summary_counts_what_pytest_reports(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text('<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1"/></testsuites>')
    counts = read_counts(report, 1)
    assert (counts.passed, counts.skipped, counts.failed) == (2, 1, 2)
    assert read_counts(tmp_path / "missing.xml", 0).failed == 1
    report.write_text('<testsuites><testsuite tests="2" failures="0" errors="0" skipped="0"/></testsuites>')
    assert read_counts(report, 3).failed == 1
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="1"><testcase classname="a.test_b" name="test_c[1]">'
        '<failure message="no">first\nlast</failure></testcase><testcase classname="a" name="d"><error message="broke off"/>'
        '</testcase><testcase classname="a" name="e"/></testsuite></testsuites>'
    )
    assert read_counts(report, 1).failures == ("a.test_b::test_c[1]\n    first\n    last", "a::d\n    broke off")
    assert FLOORS == ("unit", "component", "contract", "faults", "integration", "e2e")


def test_the_survival_is_what_the_fault_tests_have_recorded(tmp_path):
    report = tmp_path / "junit.xml"
    assert survival(report) == {"crash_points": {"tried": 0, "survived": 0}, "kinds": {}, "generated": 0, "crashes": 0}
    recorded = [
        ("crash_points", "3/4"), ("crash_points", "2/2"), ("kind:gone_410", "5/5"), ("generated", "90"), ("crashes", "1"),
    ]  # fmt: skip
    properties = "".join(f'<property name="{name}" value="{value}"/>' for name, value in recorded)
    report.write_text(
        f"<testsuites><testsuite><testcase><properties>{properties}</properties></testcase></testsuite></testsuites>"
    )
    assert survival(report) == {
        "crash_points": {"tried": 6, "survived": 5},
        "kinds": {"gone_410": {"tried": 5, "survived": 5}},
        "generated": 90,
        "crashes": 1,
    }
