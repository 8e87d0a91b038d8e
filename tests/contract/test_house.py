"""The house's own rules: no addresses in locks, nothing shadows the standard library, images drop their rights, sizes hold."""

import operator
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest

from suite.__main__ import FLOORS, read_counts
from suite.structure import violations

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
DOCKERFILES = (ROOT / "operator" / "Dockerfile", ROOT / "trainer_image" / "Dockerfile")


def test_structure_limits_hold():
    assert list(violations(ROOT)) == []


def test_a_long_function_and_a_shadowing_package_are_found(tmp_path):
    (tmp_path / "crds").mkdir()
    (tmp_path / "crds" / "long.py").write_text("def f():\n" + "    x = 1\n" * 70)
    (tmp_path / "tests" / "operator").mkdir(parents=True)
    (tmp_path / "tests" / "operator" / "__init__.py").touch()
    found = "\n".join(violations(tmp_path))
    assert "f has 71 lines" in found
    assert "shadows the standard library" in found


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


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
def test_an_image_takes_its_base_by_argument_and_runs_as_nobody(dockerfile):
    text = dockerfile.read_text()
    assert re.search(r"(?m)^ARG BASE_IMAGE=\S+", text)
    assert re.findall(r"(?m)^USER (.*)$", text)[-1] == "65532:65532"
    assert "--require-hashes" in text


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.parent.name)
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
    assert FLOORS == ("unit", "component", "contract", "integration", "e2e")
