"""Class names and what the model's config.json says of them: which number is which class. No torch.

Called by `objectives` and the tasks with classes. A class may be written as a text or a number; where the spec lists
the classes, a number may also be the place in that list.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_store import pretrained
from tunesmith_store.errors import UserError
from tunesmith_trainer.tasks.base import BadRow

__all__ = [
    "balanced_weights",
    "choose_names",
    "config_options",
    "merged",
    "model_names",
    "name_of",
    "number_of",
    "position_limit",
    "remarks_on",
    "spelled_as",
]

MOST_CLASSES = 1000
FEW_NUMBERS = 20
"""More classes that are all numbers are numbers to predict, most likely."""
SHOWN_CLASSES = 20


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_CLASSES} more" if len(names) > SHOWN_CLASSES else ""
    return ", ".join(names[:SHOWN_CLASSES]) + more


def name_of(value: Any, column: str, listed: Sequence[str]) -> str:
    """Return the name of a class as a row writes it. `listed` are the spec's classes, empty where it has none.

    Raises:
        BadRow: it is no class, or none of those listed.
    """
    if isinstance(value, bool):
        name = "true" if value else "false"
    elif isinstance(value, int | float) and math.isfinite(value):
        if value != int(value):
            raise BadRow(
                f"field {column!r} has the number {value:g}, which is no class; for numbers to predict set "
                "spec.classification.problemType: Regression"
            )
        name = str(int(value))
    elif isinstance(value, str) and value.strip():
        name = value.strip()
    else:
        shown = repr(value) if isinstance(value, str | float) or value is None else type(value).__name__
        several = "; for several classes a row set spec.classification.problemType: MultiLabel"
        more = several if isinstance(value, list) else ""
        raise BadRow(f"field {column!r} is not a class (a text or a whole number) but {shown}{more}")
    if not listed or name in listed:
        return name
    same = [other for other in listed if key_of(other) == key_of(name)]
    if len(same) == 1:
        return same[0]
    if key_of(name).isdecimal() and int(key_of(name)) < len(listed):
        return listed[int(key_of(name))]
    raise BadRow(
        f"field {column!r} has the class {name!r}, which is none of spec.classification.labels: {_shown(listed)}"
    )


def key_of(name: str) -> str:
    """Return what spellings of one class have in common: CSV files write 1.0 and True where JSON has 1 and true."""
    if name.lower() in ("true", "false"):
        return name.lower()
    match = re.fullmatch(r"(0|-?[1-9][0-9]*)\.0+", name)
    return match[1] if match else name


def spelled_as(found: Mapping[str, int], like: Mapping[str, int]) -> dict[str, int]:
    """Count classes under the spelling that other data has for them."""
    spelling = {key_of(name): name for name in like}
    counts: dict[str, int] = {}
    for name, count in found.items():
        known = name if name in like else spelling.get(key_of(name), name)
        counts[known] = counts.get(known, 0) + count
    return counts


def merged(found: Mapping[str, int]) -> dict[str, int]:
    """Count the spellings of one class together, where there are several, under the one that JSON has."""
    spellings: dict[str, list[str]] = {}
    for name in found:
        spellings.setdefault(key_of(name), []).append(name)
    return {
        names[0] if len(names) == 1 else key: sum(found[name] for name in names) for key, names in spellings.items()
    }


def remarks_on(found: Mapping[str, int], *, are_listed: bool) -> list[str]:
    """Return what looks wrong with the classes of a data set, for people; `are_listed`: the spec names them."""
    alike: dict[str, list[str]] = {}
    for name in found:
        alike.setdefault(" ".join(name.split()).casefold(), []).append(name)
    remarks = [
        f"the classes {' and '.join(f'{name!r} ({found[name]:,} rows)' for name in names)} differ in upper and lower "
        "case or spaces only, and are learned as different ones; if they are one, write them alike"
        for names in alike.values()
        if len(names) > 1
    ]
    if not are_listed and len(found) > FEW_NUMBERS and all(_is_number(name) for name in found):
        remarks.append(
            f"all {len(found)} classes are numbers; for numbers to predict set spec.classification.problemType: "
            "Regression"
        )
    return remarks


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def number_of(name: str, column: str, numbers: Mapping[str, int]) -> int:
    """Return a class's number.

    Raises:
        BadRow: the training data don't have this class.
    """
    if name not in numbers:
        same = [number for other, number in numbers.items() if key_of(other) == key_of(name)]
        if len(same) == 1:
            return same[0]
        raise BadRow(
            f"field {column!r} has the class {name!r}, which is none of those in the training data: "
            f"{_shown(list(numbers))}; correct it, or list all classes in spec.classification.labels"
        )
    return numbers[name]


def choose_names(
    listed: Sequence[str],
    found: Mapping[str, int],
    of_model: Sequence[str],
    column: str,
    setting: str = "label",
    *,
    least: int = 2,
) -> list[str]:
    """Decide on the classes and their order.

    Args:
        listed: the spec's, in the order of the model's outputs; empty where it has none.
        found: how often each occurs in the training data.
        of_model: those that the model has already, in order; the same names keep their order and the model its head.
        column: the field that holds them, and
        setting: its setting in spec.dataset.columns, for messages.
        least: how many there have to be.

    Raises:
        UserError: there are too few or too many, or they stand in another order than the model has them.
    """
    names = list(listed) or _sorted(found)
    fractions = [name for name in found if _is_number(name) and not float(name).is_integer()]
    if not listed and fractions and len(found) > FEW_NUMBERS and all(map(_is_number, found)):
        message = (
            f"spec.dataset.train: field {column!r} has {len(found)} different numbers ({_shown(fractions[:3])}, …), "
            "which would be as many classes; for numbers to predict set spec.classification.problemType: Regression, "
            "or list the classes in spec.classification.labels"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    if len(names) > MOST_CLASSES:
        message = (
            f"spec.dataset.columns.{setting}: field {column!r} has {len(names)} different classes, at most "
            f"{MOST_CLASSES} can be learned; name the field that holds the class, or for numbers to predict set "
            "spec.classification.problemType: Regression"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    if len(names) < least:
        message = (
            f"spec.dataset.train: field {column!r} has the classes {_shown(names) or '(none)'}; there must be at least "
            f"{least} to tell apart"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    if set(names) != set(of_model):
        return names
    if listed and names != list(of_model):
        message = (
            f"spec.classification.labels lists the model's own classes in another order; it has them as "
            f"{_shown(of_model)}: use that order, or leave labels out"
        )
        raise UserError(Reason.INVALID_SPEC, message)
    return list(of_model)


def _sorted(names: Mapping[str, int]) -> list[str]:
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def balanced_weights(names: Sequence[str], found: Mapping[str, int]) -> list[float]:
    """Return each class's weight: n / (k * count), scikit-learn's `compute_class_weight("balanced")`.

    n counts all occurrences, k the classes that occur. A class that doesn't occur has weight 1.
    """
    counts = [found.get(name, 0) for name in names]
    total, present = sum(counts), sum(count > 0 for count in counts)
    return [total / (present * count) if count else 1.0 for count in counts]


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"spec.model.uri: the model's config.json can't be read: {error}"
        raise UserError(Reason.MODEL_INVALID, message) from error
    if not isinstance(config, dict):
        raise UserError(Reason.MODEL_INVALID, "spec.model.uri: the model's config.json is not a JSON object")
    return config


def model_names(folder: Path) -> list[str]:
    """Return the classes that a model has already, in order of its outputs; empty where it has none with a name.

    Raises:
        UserError: config.json can't be read.
    """
    listed = _config(folder).get("id2label") or {}
    names = [str(listed[number]) for number in sorted(listed, key=int)]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def position_limit(folder: Path, max_length: int) -> int:
    """Return how many tokens of a text are used: spec.training.maxLength, or what the model has positions for.

    Raises:
        UserError: config.json can't be read.
    """
    positions = pretrained.position_limit(_config(folder))
    return max_length if positions is None else min(max_length, positions)


def config_options(names: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a model's config that name its outputs."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
    }
