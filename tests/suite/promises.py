"""`python -m suite.promises`: each sentence of README's "What it promises" has a row in docs/promises.md that names its tests.

Called by `make verify`.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.compile(r"^## What it promises\n(.*?)^## ", re.MULTILINE | re.DOTALL)
SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z`])")
LINK = re.compile(r"\[([^]]+)\]\([^)]+\)")
TEST = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def plain(text: str) -> str:
    """Without marks for bold text and links, on one line."""
    return " ".join(LINK.sub(r"\1", text).replace("**", "").split())


def sentences(readme: str) -> list[str]:
    """What README promises, a sentence each; a bullet's first is its headline."""
    section = SECTION.search(readme)
    bullets = re.split(r"^\* ", section[1], flags=re.MULTILINE)[1:] if section else []
    return [it.strip() for bullet in bullets for it in SENTENCE.split(plain(bullet)) if it.strip()]


def rows(table: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Of each row of the table the sentence, and its tests: file and name."""
    _, _, body = table.partition("|---|---|")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("| ")
    ]
    return [(plain(sentence), TEST.findall(tests)) for sentence, tests in lines]


def complaints(root: Path) -> Iterator[str]:
    """What is promised by nobody's test, or by a test that isn't there."""
    promised = sentences((root / "README.md").read_text())
    if not promised:
        yield 'README.md: no section "What it promises" with bullets'
    found = rows((root / "docs" / "promises.md").read_text())
    for sentence, count in (Counter(promised) - Counter(it for it, _ in found)).items():
        yield f"docs/promises.md: no row for what README promises{f' {count} times' if count > 1 else ''}: {sentence}"
    for sentence, tests in found:
        if sentence not in promised:
            yield f"docs/promises.md: README doesn't promise (any more): {sentence}"
        if not tests:
            yield f"docs/promises.md: no test for: {sentence}"
        for file, name in tests:
            if not (root / file).is_file() or name not in functions(root / file):
                yield f"docs/promises.md: there is no {file}::{name}"


def functions(file: Path) -> set[str]:
    """The names of a module's functions."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)}


def main() -> int:
    """Return 1 where anything is wrong."""
    found = list(complaints(ROOT))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
