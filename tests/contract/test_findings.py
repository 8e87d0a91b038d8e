"""What holds for every script in findings/ without running it: they are read years later, by people with a bug."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FINDINGS = sorted((ROOT / "findings").glob("*.sh"))
PARTS = ("One would guess:", "What happens:", "Seen:", "What follows:")
OPTIONS = {"--quiet", "--no-deps", "--find-links"}


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_runs_by_itself_and_says_what_it_shows(finding):
    text = finding.read_text()
    assert finding.stat().st_mode & 0o111 == 0o111
    assert subprocess.run(["bash", "-n", finding], check=False).returncode == 0
    shebang, versions = text.splitlines()[:2]
    assert shebang == "#!/usr/bin/env bash"
    assert re.match(r"# .*\d+\.\d+.*: ", versions), "the first line names package and version"
    heading = text.split("\nset -euo pipefail\n")[0]
    assert all(f"\n# {part} " in heading for part in PARTS)
    assert heading.count("\n#") == len(heading.splitlines()) - 1
    assert len(text.splitlines()) <= 80
    assert "tunesmith_" not in text


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda path: path.stem)
def test_a_finding_pins_what_it_installs_and_names_no_address(finding):
    text = finding.read_text()
    assert "://" not in text
    commands = re.findall(r"/pip\" install (.+)", text.replace("\\\n", " "))
    assert commands
    for command in commands:
        words = re.sub(r"\$\{TUNESMITH_WHEELS:\+[^}]*\}", "", command).split()
        packages = [word for word in words if word not in OPTIONS]
        assert packages
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package) for package in packages), command


def test_the_list_names_every_finding():
    listed = re.findall(r"\]\(([a-z0-9-]+\.sh)\)", (ROOT / "findings" / "README.md").read_text())
    assert listed == [path.name for path in FINDINGS]
    assert len(FINDINGS) >= 6
