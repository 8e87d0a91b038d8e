"""`python -m suite.structure`: limits that keep the house readable. Called by `make verify`."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("crds", "operator", "trainer_image")
PYTHON = (*SOURCES, "tests", "bench")
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 500
MAX_MODULES = 12
"""Directly in a top-level package: more need rooms."""
IMPORT = re.compile(r"\bfrom (tunesmith_\w+(?:\.\w+)*) import ([a-z]\w*)")


@dataclass(frozen=True)
class Source:
    """A Python file of ours."""

    where: Path
    """From the repository's root."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax."""
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> list[ast.Import | ast.ImportFrom]:
        """Its imports, those within functions too."""
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)]

    @property
    def module(self) -> str:
        """The dotted name of a module of the product; empty for tests and tools."""
        folder, *parts = self.where.with_suffix("").parts
        if folder not in SOURCES or len(parts) < 2 or not parts[0].startswith("tunesmith_"):
            return ""
        return ".".join(parts).removesuffix(".__init__")


def is_entry(module: str) -> bool:
    """Whether a module is only the way into its package: `python -m package` runs it."""
    return module.endswith(".__main__")


def shadowing_package(source: Source) -> Iterator[str]:
    """A package named as a module of the standard library that we need."""
    if source.where.name == "__init__.py" and source.where.parent.name == "operator":
        yield f"{source.where}: a package named operator shadows the standard library"


def long_module(source: Source) -> Iterator[str]:
    """A module that does more than one thing."""
    lines = len(source.text.splitlines())
    if lines > MAX_MODULE_LINES:
        yield f"{source.where}: {lines} lines, at most {MAX_MODULE_LINES}: split it by duty"


def long_functions(source: Source) -> Iterator[str]:
    """Functions of the product that don't fit on a screen."""
    if source.where.parts[0] not in SOURCES:
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield f"{source.where}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def crowded_packages(sources: Sequence[Source]) -> Iterator[str]:
    """Top-level packages with so many modules that nobody sees which belong together."""
    modules = (source.module for source in sources if source.where.name != "__init__.py")
    count = Counter(name.split(".")[0] for name in modules if name.count(".") == 1 and not is_entry(name))
    for package, number in sorted(count.items()):
        if number > MAX_MODULES:
            yield f"{package}: {number} modules, at most {MAX_MODULES}: give it rooms (sub-packages)"


def second_names(sources: Sequence[Source]) -> Iterator[str]:
    """Imports of a module of the product by another name than its own, or from where it was only imported."""
    modules = {source.module: source for source in sources if source.module}
    for source in sources:
        for node in source.imports:
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for it in node.names:
                name = prefix + it.name
                if name in modules and it.asname not in (None, name.rpartition(".")[2]):
                    yield f"{source.where}:{node.lineno}: {name} is called {it.asname}: import it by its own name"
                elif name not in modules and (real := _imported(modules.get(prefix[:-1]), it.name)) in modules:
                    yield f"{source.where}:{node.lineno}: {real} is called {name}: import it from where it is"


def _imported(source: Source | None, name: str) -> str:
    """Return what a module means by a name that it imported itself."""
    nodes = [node for node in source.imports if isinstance(node, ast.ImportFrom)] if source is not None else []
    return next(
        (f"{node.module}.{it.name}" for node in nodes for it in node.names if name == (it.asname or it.name)), ""
    )


def stale_names(sources: Sequence[Source]) -> Iterator[str]:
    """Modules that have moved and are imported by their old name, by a program in a string: no tool sees into it."""
    modules = {source.module for source in sources if source.module}
    for source in sources:
        for number, line in enumerate(source.text.splitlines(), 1):
            for package, name in IMPORT.findall(line):
                module = package if "." in package else f"{package}.{name}"
                if module not in modules and module.split(".")[0] in modules:
                    yield f"{source.where}:{number}: there is no module {module}"


OF_A_FILE: tuple[Callable[[Source], Iterator[str]], ...] = (shadowing_package, long_module, long_functions)
OF_ALL_FILES: tuple[Callable[[Sequence[Source]], Iterator[str]], ...] = (crowded_packages, second_names, stale_names)


def violations(root: Path = ROOT) -> Iterator[str]:
    """Yield one line for whatever breaks a limit."""
    paths = [path for folder in PYTHON for path in sorted((root / folder).rglob("*.py"))]
    sources = [Source(path.relative_to(root), path.read_text()) for path in paths]
    for source in sources:
        for check in OF_A_FILE:
            yield from check(source)
    for check_all in OF_ALL_FILES:
        yield from check_all(sources)


def main() -> int:
    """Print every violation and return 1 where there is one."""
    found = list(violations())
    print(*found, sep="\n", file=sys.stderr)
    print(f"structure: {len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
