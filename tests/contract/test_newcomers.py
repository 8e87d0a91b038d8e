"""docs/architecture.md tells a newcomer what to touch, and something complains when a step is left out."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from tunesmith_api.model import Uri
from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.task import Task
from tunesmith_store.errors import UserError
from tunesmith_store.router import open_store

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/architecture.md"
ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
THIS = f"tests/contract/{Path(__file__).name}"


def additions():
    """What the page says of each thing to add: (file, what to do there, what complains)."""
    chapter = PAGE.read_text().split("\n## Adding to it\n")[1].split("\n## ")[0]
    parts = (part.partition("\n") for part in chapter.split("\n### ")[1:])
    return {title: ROW.findall(text) for title, _, text in parts}


ADDITIONS = additions()
GGUF = ENGINE_METHODS[EngineType.LLAMA_CPP]
# where each value of a vocabulary has to stand, as the page says
NAMED = {
    "A task": (
        Task,
        {
            "trainer_image/tunesmith_trainer/tasks/__init__.py": "    TaskName.{0.name}: (",
            "crds/tunesmith_api/v1alpha1/task.py": "    Task.{0.name}: ",
            "tests/component/trainer/test_trainer_every_task.py": '"{0.value}"',
            "docs/finetunejob.md": "| `{0.value}`",
            "README.md": "`{0.value}`",
        },
    ),
    "A method": (
        MethodType,
        {
            "tests/component/trainer/test_trainer_every_task.py": '"type": "{0.value}"',
            "docs/finetunejob.md": "| `{0.value}`",
            "README.md": "`{0.value}`",
        },
    ),
    "A quantization method": (
        GGUF,
        {
            "trainer_image/tunesmith_server/quantizers/__init__.py": "QuantizationMethod.{0.name}: ",
            "tests/component/server/test_quantize_methods.py": '"{0.value}"',
            "docs/modeldeployment.md": "| `{0.value}`",
        },
    ),
}


def test_the_page_tells_of_five_additions_and_each_has_a_check():
    assert set(ADDITIONS) == {*NAMED, "A condition reason", "A store"}
    for title, steps in ADDITIONS.items():
        assert len(steps) > 3, title
        assert any(not complains.startswith("no") for _, _, complains in steps), title


@pytest.mark.parametrize("title", ADDITIONS)
def test_every_file_of_an_addition_exists(title):
    for path, what, complains in ADDITIONS[title]:
        assert (ROOT / path).exists(), path
        for named in re.findall(r"`((?:tests|docs|crds|operator|trainer_image)/[^`]+)`", what + complains):
            assert (ROOT / named).exists(), named


@pytest.mark.parametrize("title", NAMED)
def test_a_value_stands_wherever_the_page_says(title):
    vocabulary, places = NAMED[title]
    assert {path for path, _, complains in ADDITIONS[title] if THIS in complains} == set(places)
    for path, form in places.items():
        text = (ROOT / path).read_text()
        assert [value for value in vocabulary if form.format(value) not in text] == [], path


def test_the_schemes_of_the_api_are_those_that_a_store_is_opened_for():
    assert {path for path, _, complains in ADDITIONS["A store"] if THIS in complains} == {
        "crds/tunesmith_api/model.py", "trainer_image/tunesmith_store/router.py", "docs/finetunejob.md",
    }  # fmt: skip
    accepted = set(re.findall(r"\w+(?=://)", TypeAdapter(Uri).json_schema()["x-kubernetes-validations"][0]["message"]))
    with pytest.raises(UserError) as caught:
        open_store(StoragePlan()).at("nowhere://x")
    assert accepted == set(re.findall(r"\w+(?=://)", caught.value.message)) - {"nowhere"}
    page = (ROOT / "docs/finetunejob.md").read_text()
    assert {scheme for scheme in accepted if f"| `{scheme}://" in page} == accepted


def test_what_the_page_says_of_a_training_process_is_there():
    picture = PAGE.read_text().split("## Inside a training process\n")[1].split("```")[1]
    loop = ROOT / "trainer_image/tunesmith_trainer/loop"
    named = re.findall(r"[├└]─▶ (\w+(?:, \w+)*)", picture)
    assert len(named) >= 8
    for name in ", ".join(named).split(", "):
        assert (loop / f"{name}.py").is_file(), name


REASON = '    MADE_UP = "MadeUp"\n'
ENTRY = "\n## MadeUp\n\n**Means.** Somebody made it up.\n\n**See.** In no condition.\n\n**Do.** Wake up again.\n"
# what a newcomer writes into each file that the page names
WRITTEN = {
    "crds/tunesmith_api/keys.py": REASON,
    "docs/runbook/starting.md": ENTRY,
    "docs/runbook/README.md": "\n[MadeUp](starting.md#madeup)\n",
}


def test_walking_the_steps_of_a_condition_reason_ends_with_a_clean_check(tmp_path):
    """Each step as the page lists it, in a copy: the check that it names complains until the last is done."""
    steps = ADDITIONS["A condition reason"]
    (check,) = {found for _, _, complains in steps for found in re.findall(r"`(tests/[^`]+)`", complains)}
    for folder in ("crds", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / check).parent.mkdir(parents=True)
    shutil.copy(ROOT / check, tmp_path / check)

    def is_clean():
        command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", check, "-k", "reason or entry")
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "crds")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done.returncode == 0

    files = [path for path, _, _ in steps if (ROOT / path).is_file()]
    clean = [is_clean()]
    for path in files:
        with (tmp_path / path).open("a") as file:
            file.write(WRITTEN[path])
        clean.append(is_clean())
    assert clean == [True, *[False] * (len(files) - 1), True]
