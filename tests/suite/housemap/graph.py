"""Rooms, floors and arrows, read from the code. Nothing here knows a room by name: the picture follows the packages."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grimp

from suite.structure import SOURCES, is_entry

Arrows = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Room:
    """A package, or a module that stands beside packages."""

    name: str
    folder: str
    """Of the repository: where its package lies."""
    says: str
    """The first sentence of its docstring."""
    modules: int
    floor: int
    """How many rooms lie below it, on the longest way down to the ground."""


@dataclass(frozen=True)
class House:
    """All rooms, and for each the ones it imports that it doesn't import by way of another."""

    rooms: Mapping[str, Room]
    arrows: Arrows


class Circle(Exception):
    """Rooms import each other, so that none of them lies above the other."""


def read_house(root: Path) -> House:
    """Read the house from the packages in the source folders below `root`, which have to be on the import path."""
    folders = {
        path.parent.name: folder for folder in SOURCES for path in root.glob(f"{folder}/tunesmith_*/__init__.py")
    }
    graph = grimp.build_graph(*sorted(folders), cache_dir=None)
    files = {name: root / folders[name.split(".")[0]] / Path(*name.split(".")) for name in graph.modules}
    packages = {name for name, path in files.items() if path.is_dir()}
    names = [room for top in sorted(folders) for room in rooms_of(top, packages, graph.modules)]
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    arrows = arrows_between(names, imports)
    floors = floors_of(arrows)
    rooms = {
        name: Room(
            name=name,
            folder=folders[name.split(".")[0]],
            says=first_sentence((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()),
            modules=sum(1 for other in set(files) - packages if _is_in(other, name) and not is_entry(other)),
            floor=floors[name],
        )
        for name in names
        for path in [files[name]]
    }
    return House(rooms, reduced(arrows))


def rooms_of(package: str, packages: set[str], modules: set[str]) -> list[str]:
    """Return the package, or what is in it where that is more packages than modules."""
    inside = sorted(name for name in modules if name.rpartition(".")[0] == package and not is_entry(name))
    inner = [name for name in inside if name in packages]
    if 2 * len(inner) <= len(inside):
        return [package]
    return [room for name in inside for room in (rooms_of(name, packages, modules) if name in packages else [name])]


def _is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def arrows_between(rooms: list[str], imports: Mapping[str, set[str]]) -> Arrows:
    """Sum up what modules import as what rooms import. Modules in no room, as main programs, are left out."""
    room_of = {module: room for module in imports for room in rooms if _is_in(module, room)}
    return {
        room: frozenset(
            room_of[imported]
            for module, theirs in imports.items()
            if room_of.get(module) == room
            for imported in theirs
            if room_of.get(imported, room) != room
        )
        for room in rooms
    }


def floors_of(arrows: Arrows) -> dict[str, int]:
    """Return each room's floor: one above the highest that it imports. The ground is what most rooms import, alone.

    Raises:
        Circle: there is no such floor.
    """
    on_ground = {room: sum(room in theirs for theirs in arrows.values()) for room in sorted(arrows) if not arrows[room]}
    floors = {max(on_ground, key=on_ground.__getitem__): 0} if on_ground else {}

    def floor(room: str, above: tuple[str, ...]) -> int:
        if room in above:
            raise Circle(" → ".join((*above[above.index(room) :], room)))
        if room not in floors:
            floors[room] = max((floor(below, (*above, room)) + 1 for below in sorted(arrows[room])), default=1)
        return floors[room]

    for room in arrows:
        floor(room, ())
    return floors


def reduced(arrows: Arrows) -> Arrows:
    """Leave out each arrow that leads where other arrows lead, too (the transitive reduction)."""
    below: dict[str, set[str]] = {}
    for room in sorted(arrows, key=floors_of(arrows).__getitem__):
        below[room] = set(arrows[room]).union(*(below[other] for other in arrows[room]))
    return {
        room: frozenset(it for it in theirs if not any(it in below[other] for other in theirs))
        for room, theirs in arrows.items()
    }


def first_sentence(source: str) -> str:
    """Return the first sentence of a module's docstring as plain text."""
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])\s", text)[0].replace("`", "")
