"""What README promises has tests, and one of them: no model runs code of its own."""

import ast
import shutil
from pathlib import Path

from suite.promises import complaints, rows, sentences
from suite.structure import SOURCES

ROOT = Path(__file__).resolve().parents[2]


def test_each_promise_has_a_test_that_is_there():
    assert list(complaints(ROOT)) == []


def test_a_promise_without_a_test_is_named(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "promises.md", tmp_path / "docs")
    readme = (ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme.replace("SIGTERM saves first.", "SIGTERM saves first. It never rains."))
    found = list(complaints(tmp_path))
    assert "docs/promises.md: no row for what README promises: It never rains." in found
    gone = "docs/promises.md: there is no tests/contract/test_runbook.py::test_every_reason_has_one_entry_and_no_entry_is_of_no_reason"
    assert gone in found, "the folder has no tests"


def test_sentences_and_rows_are_told_apart():
    readme = (
        "## What it promises\n\n* **It holds.** A `x.y` waits\n  for [you](a.md). `kubectl` ends.\n\n## What else\n"
    )
    assert sentences(readme) == ["It holds.", "A `x.y` waits for you.", "`kubectl` ends."]
    table = "| README says | Tests |\n|---|---|\n| It holds. | `tests/a.py::test_b`, `tests/c/d.py::test_e` |\n| Or not. | |\n"
    assert rows(table) == [("It holds.", [("tests/a.py", "test_b"), ("tests/c/d.py", "test_e")]), ("Or not.", [])]


def test_no_call_lets_a_model_run_code_of_its_own():
    """transformers asks whether to run it where it isn't told; peft's and diffusers' classes have no such question."""
    silent = []
    for path in sorted(file for source in SOURCES for file in (ROOT / source).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr != "from_pretrained" or not ast.unparse(node.func.value).lower().startswith("auto"):
                continue
            said = [it.value for it in node.keywords if it.arg == "trust_remote_code"]
            if not (said and isinstance(said[0], ast.Constant) and said[0].value is False):
                silent.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert silent == []
