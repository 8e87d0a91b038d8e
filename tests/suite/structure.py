"""`python -m suite.structure`: limits that keep the house readable. Called by `make verify`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("crds", "operator", "trainer_image")
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 500


def violations(root: Path = ROOT) -> Iterator[str]:
    """Yield one line for each function or module that is too long, and for each package that shadows `operator`."""
    for folder in (*SOURCES, "tests", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            text = path.read_text()
            where = path.relative_to(root)
            if path.name == "__init__.py" and path.parent.name == "operator":
                yield f"{where}: a package named operator shadows the standard library"
            if len(text.splitlines()) > MAX_MODULE_LINES:
                yield f"{where}: {len(text.splitlines())} lines, at most {MAX_MODULE_LINES}: split it by duty"
            if folder in SOURCES:
                yield from _long_functions(text, where)


def _long_functions(text: str, where: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{where}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def main() -> int:
    """Print every violation and return 1 where there is one."""
    found = list(violations())
    print(*found, sep="\n", file=sys.stderr)
    print(f"structure: {len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
