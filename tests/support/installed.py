"""Runs `pip install …` lines of the documentation in environments of their own, without a network.

What the line asks for has to be in this process's environment: those distributions, and no others, are linked into the
new one before pip looks for them there. So an extra that lacks something is found out. Used by the tests of the
command line.
"""

import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "operator/tunesmith_cli").glob("*.py")),
)


def pip_lines() -> set[str]:
    """The `pip install` lines that people are told: in README, docs and the command line's messages."""
    found = (re.findall(r"pip install [^`\"\n)]+", page.read_text()) for page in PAGES)
    return {line.strip() for lines in found for line in lines}


def install(line: str, folder: Path) -> Path:
    """Run a line at the checkout's root, in a new environment in `folder`; return the folder of its programs."""
    venv.create(folder, symlinks=True)
    programs = folder / "bin"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [word for word in shlex.split(line)[2:] if not word.startswith("-")]
    wanted = [re.sub(r"^\.(?=\[|$)", project["project"]["name"], word) for word in asked]
    for name in distributions([*wanted, *project["build-system"]["requires"]], project["project"]):
        link(metadata.distribution(name), site)
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", str(programs / "python")]
    command = [*pip, *shlex.split(line)[1:], "--no-index", "--no-build-isolation"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "does not provide the extra" not in said, said
    return programs


def distributions(wanted: Iterable[str], project: dict) -> set[str]:
    """The distributions that requirements lead to; the project's own ones are followed by its pyproject.toml."""
    own, found, seen = project["name"], set(), set()
    open_ones = [Requirement(text) for text in wanted]
    while open_ones:
        requirement = open_ones.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name == own:
            further = project["optional-dependencies"]
            texts = [*project["dependencies"], *(text for extra in extras for text in further.get(extra, ()))]
        else:
            found.add(name)
            texts = metadata.distribution(name).requires or []
        for needed in map(Requirement, texts):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                open_ones.append(needed)
    return found


def link(distribution: metadata.Distribution, site: Path) -> None:
    """Make a distribution visible in another environment."""
    for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
