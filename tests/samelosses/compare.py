"""Sets what two commits left behind side by side, exactly. Pure; called by `__main__`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PARTS", "Row", "Verdict", "compare", "rows_of", "table"]

PARTS = ("history", "evaluations", "metrics", "weights")
"""What can decide; `inputs` always does, since nothing can be said of runs that were given different things."""
UNCOMPARED = frozenset({"step", "seconds", "memoryBytes", "trainSeconds", "tokensPerSecond"})
"""A record's place is part of its values' names; the rest depends on the machine's mood."""
DIGITS = 12
"""What is shown of a digest."""
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """How one part of one test's numbers compares."""

    values: int
    differing: int = 0
    first: str = ""
    """The first difference in words."""

    def __str__(self) -> str:
        if self.differing:
            return f"{self.differing} of {self.values} differ"
        return f"{self.values} identical" if self.values else "none"


@dataclass(frozen=True)
class Row:
    """One test in both commits."""

    case: str
    method: str
    parts: Mapping[str, Verdict]
    trouble: str = ""
    """Why there is nothing to compare, or not to be trusted."""

    def is_same(self, deciding: Sequence[str]) -> bool:
        """Whether the inputs and all that decides are equal, and there is something that decides."""
        chosen = [self.parts[name] for name in deciding if name in self.parts]
        return (
            not self.trouble
            and not any(part.differing for part in [self.parts["inputs"], *chosen])
            and any(part.values for part in chosen)
        )


def compare(base: Mapping[str, Any], head: Mapping[str, Any]) -> Verdict:
    """Compare named values; a name that only one side has is a difference."""
    names = list(dict.fromkeys([*base, *head]))
    differing = [name for name in names if _exact(base, name) != _exact(head, name)]
    first = f"{differing[0]}: {_shown(base, differing[0])} → {_shown(head, differing[0])}" if differing else ""
    return Verdict(len(names), len(differing), first)


def _exact(values: Mapping[str, Any], name: str) -> str:
    """Every bit of a number, the sign of zero too; anything else as Python writes it."""
    if name not in values:
        return "absent"
    value = values[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value).hex() if is_number else repr(value)


def _shown(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "absent")
    return f"{value!r} ({value.hex()})" if isinstance(value, float) else str(value)[:DIGITS]


def values_of(record: Record, part: str) -> dict[str, Any]:
    """Name every value of one part of a record that has to be the same each time."""
    if part in ("inputs", "weights"):
        return dict(record[part])
    found: dict[str, Any] = {}
    for folder, numbers in record["runs"].items():
        where = f"{folder} " if len(record["runs"]) > 1 else ""
        if part == "metrics":
            points = {"": numbers["metrics"]}
        else:
            points = {f"step {point['step']} ": point for point in numbers[part]}
            found[f"{where}records"] = len(numbers[part])
        for at, point in points.items():
            found |= {f"{where}{at}{name}": value for name, value in point.items() if name not in UNCOMPARED}
    return found


def rows_of(base: Sequence[Record], head: Sequence[Record]) -> list[Row]:
    """Pair the records of two commits by the names of their tests."""
    sides = [{record["test"]: record for record in records} for records in (base, head)]
    return [_row(test, *(side.get(test) for side in sides)) for test in dict.fromkeys([*sides[0], *sides[1]])]


def _row(test: str, base: Record | None, head: Record | None) -> Row:
    case, _, method = test.partition("[")[2].rstrip("]").rpartition("-")
    trouble = [
        f"{name} {'did not run it' if record is None else 'failed the test'}"
        for name, record in (("BASE", base), ("HEAD", head))
        if record is None or record["outcome"] != "passed"
    ]
    nothing: Record = {"inputs": {}, "weights": {}, "runs": {}}
    parts = {
        part: compare(*(values_of(nothing if side is None else side, part) for side in (base, head)))
        for part in ("inputs", *PARTS)
    }
    return Row(case or test.partition("[")[0], method, parts, ", ".join(trouble))


def table(rows: Sequence[Row], deciding: Sequence[str]) -> list[str]:
    """Lay the rows out for people, each with its first differences below it."""
    columns = ("inputs", *PARTS)
    lines = [["case", "method", *(name if name in ("inputs", *deciding) else f"({name})" for name in columns)]]
    lines += [[row.case, row.method, *(str(row.parts[name]) for name in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    found = [head]
    for line, row in zip(body, rows, strict=True):
        found.append(line)
        found += [f"    {row.trouble}"] if row.trouble else []
        found += [f"    {name}: {part.first}" for name, part in row.parts.items() if part.differing]
    return found
