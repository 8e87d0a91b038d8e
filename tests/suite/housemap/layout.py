"""Where each room stands and which way each arrow takes: floors as rows, as few crossings and as short ways as possible.

The usual four steps for layered drawings (Sugiyama et al., 1981): the floors are given; an arrow that passes floors
gets a bend on each; rows are ordered; places are found within their order. The same house gives the same picture.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from suite.housemap.graph import House

ROOM_WIDTH = 190
BEND_WIDTH = 14
GAP = 18
SWEEPS = 24

Rows = list[list[str]]
"""Names of rooms and bends, from left to right, from the ground up."""


@dataclass(frozen=True)
class Place:
    """A room's or a bend's middle, and its width."""

    x: float
    width: float


@dataclass(frozen=True)
class Layout:
    """Rows of places by name, and each arrow's way down as names: importer, bends, imported."""

    rows: Rows
    places: Mapping[str, Place]
    ways: Sequence[tuple[str, ...]]
    width: float


def arrange(house: House) -> Layout:
    """Find a place for everything. The room on the ground takes its whole width."""
    ways = [_way(house, room, below) for room in sorted(house.arrows) for below in sorted(house.arrows[room])]
    floor = {name: room.floor for name, room in house.rooms.items()}
    side = {name: room.folder for name, room in house.rooms.items()}
    for way in ways:
        floor |= {bend: floor[way[0]] - steps for steps, bend in enumerate(way[1:-1], 1)}
        side |= dict.fromkeys(way[1:-1], side[way[0]])
    neighbours: dict[str, list[str]] = defaultdict(list)
    for above, below in itertools.chain.from_iterable(map(itertools.pairwise, ways)):
        if floor[below] > 0:
            neighbours[above].append(below)
            neighbours[below].append(above)
    rows: Rows = [[] for _ in range(max(floor.values()) + 1)]
    for name in sorted(floor, key=lambda name: (side[name], name)):
        rows[floor[name]].append(name)
    widths = {name: float(ROOM_WIDTH if name in house.rooms else BEND_WIDTH) for name in floor}
    upper = _shortened(_untangled(rows[1:], neighbours, side), neighbours, widths, side)
    middles = _packed(upper, _middles(upper, neighbours, widths), neighbours, widths)
    left = min((middles[name] - widths[name] / 2 for name in middles), default=0.0)
    right = max((middles[name] + widths[name] / 2 for name in middles), default=float(ROOM_WIDTH))
    places = {name: Place(round(x - left, 1), widths[name]) for name, x in middles.items()}
    for name in rows[0]:
        places[name] = Place(round((right - left) / 2, 1), round(right - left, 1))
    return Layout([rows[0], *upper], places, ways, round(right - left, 1))


def _way(house: House, room: str, below: str) -> tuple[str, ...]:
    between = range(house.rooms[room].floor - 1, house.rooms[below].floor, -1)
    return (room, *(f"{room} → {below} @{floor}" for floor in between), below)


def _crossings(rows: Rows, neighbours: Mapping[str, Sequence[str]]) -> int:
    count = 0
    for lower, upper in itertools.pairwise(rows):
        at = {name: number for number, name in enumerate(lower)}
        ends = [(number, at[other]) for number, name in enumerate(upper) for other in neighbours[name] if other in at]
        count += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(ends, 2))
    return count


def _untangled(rows: Rows, neighbours: Mapping[str, Sequence[str]], side: Mapping[str, str]) -> Rows:
    """Order each row by where the neighbours in the next one stand, up and down again; keep the best of all tries."""
    best = rows
    for sweep in range(SWEEPS):
        rows = [list(row) for row in rows]
        steps = list(itertools.pairwise(range(len(rows))))
        for fixed, moved in steps if sweep % 2 == 0 else [(b, a) for a, b in reversed(steps)]:
            at = {name: float(number) for number, name in enumerate(rows[fixed])}
            here = {name: number * len(at) / len(rows[moved]) for number, name in enumerate(rows[moved])}
            key = {name: _mean([at[other] for other in neighbours[name] if other in at], here[name]) for name in here}
            rows[moved].sort(key=lambda name, key=key: (side[name], key[name]))
        if _crossings(rows, neighbours) < _crossings(best, neighbours):
            best = rows
    return best


def _swapped(rows: Rows, side: Mapping[str, str]) -> Iterator[Rows]:
    """Yield all orders that differ by two neighbours of one row, which keep to their folder's side."""
    for row, names in enumerate(rows):
        for left, right in itertools.pairwise(range(len(names))):
            if side[names[left]] == side[names[right]]:
                other = [list(row) for row in rows]
                other[row][left], other[row][right] = names[right], names[left]
                yield other


def _shortened(
    rows: Rows, neighbours: Mapping[str, Sequence[str]], widths: Mapping[str, float], side: Mapping[str, str]
) -> Rows:
    """Swap neighbours as long as that makes for fewer crossings, or shorter ways."""

    def cost(rows: Rows) -> tuple[int, float]:
        x = _middles(rows, neighbours, widths)
        return _crossings(rows, neighbours), round(sum(abs(x[a] - x[b]) for a in x for b in neighbours[a]), 3)

    best, lowest = rows, cost(rows)
    while True:
        tried, found = min(((cost(it), it) for it in _swapped(best, side)), default=(lowest, best))
        if tried >= lowest:
            return best
        best, lowest = found, tried


def _middles(rows: Rows, neighbours: Mapping[str, Sequence[str]], widths: Mapping[str, float]) -> dict[str, float]:
    """Draw everything towards its neighbours, without changing the order in a row or letting rooms overlap."""
    x: dict[str, float] = {}
    for row in rows:
        start = 0.0
        for name in row:
            x[name] = start + widths[name] / 2
            start += widths[name] + GAP
    for sweep in range(SWEEPS):
        for row in rows if sweep % 2 else reversed(rows):
            wanted = [_mean([x[other] for other in neighbours[name]], x[name]) for name in row]
            x |= zip(row, _apart(wanted, [widths[name] + GAP for name in row]), strict=True)
    return x


def _packed(
    rows: Rows, x: Mapping[str, float], neighbours: Mapping[str, Sequence[str]], widths: Mapping[str, float]
) -> dict[str, float]:
    """Push what hangs together as far to the left as what stands there lets it."""
    free = [0.0] * len(rows)
    placed: dict[str, float] = {}
    for first in itertools.chain.from_iterable(rows):
        group, found = {first}, [first]
        while found:
            found = [other for name in found for other in neighbours[name] if other not in group]
            group |= set(found)
        if first in placed:
            continue
        row_of = {name: number for number, row in enumerate(rows) for name in row if name in group}
        shift = max(free[row] - x[name] + widths[name] / 2 for name, row in row_of.items())
        for name, row in row_of.items():
            placed[name] = x[name] + shift
            free[row] = max(free[row], placed[name] + widths[name] / 2 + GAP)
    return placed


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Return the places nearest to the wanted ones, least squares, that keep their order and each its width.

    What would overlap moves as one block to the mean of what its members want (pool adjacent violators).
    """
    offsets = list(itertools.accumulate((a + b) / 2 for a, b in itertools.pairwise(widths)))
    shifts = [want - offset for want, offset in zip(wanted, [0.0, *offsets], strict=True)]
    blocks: list[list[float]] = []
    for shift in shifts:
        blocks.append([shift])
        while len(blocks) > 1 and _mean(blocks[-2], 0.0) > _mean(blocks[-1], 0.0):
            last = blocks.pop()
            blocks[-1] += last
    placed = [_mean(block, 0.0) for block in blocks for _ in block]
    return [shift + offset for shift, offset in zip(placed, [0.0, *offsets], strict=True)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
