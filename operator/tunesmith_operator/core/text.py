"""Times, numbers and quantities as text, and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal

__all__ = ["amount", "cores", "count_of", "duration", "loss", "number", "parse_time", "rfc3339", "shortened"]

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:([eE]-?[0-9]{1,3})|([numkMGTPE]|[KMGTPE]i)?)")

_SUFFIXES = {
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
}


def rfc3339(moment: datetime) -> str:
    """UTC with whole seconds, as Kubernetes writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str | None) -> datetime | None:
    """A time as Kubernetes writes it (with or without a fraction); None for none."""
    return datetime.fromisoformat(text) if text else None


def count_of(text: str | None, unreadable: int = 0) -> int:
    """A number in a label or an annotation, where people can write anything; 0 for none."""
    if not text:
        return 0
    return int(text) if text.isdecimal() and len(text) < 10 else unreadable


def duration(seconds: float) -> str:
    """At most two units, as kubectl prints ages: 45s, 3m, 1h5m, 2d3h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes}m" if minutes else f"{hours}h"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours}h" if hours else f"{days}d"


def number(value: float, digits: int = 6) -> str:
    """A number in at most `digits` significant digits."""
    return f"{value:.{digits}g}"


def loss(value: float) -> str:
    """A loss for a table column: 0.412, 2.1e-05."""
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"


def shortened(text: str, longest: int) -> str:
    """The text, or as much of its beginning as fits."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def cores(quantity: str) -> float:
    """A Kubernetes quantity as a plain number ("500m" is 0.5)."""
    digits = quantity.rstrip("kKMGTPim")
    return float(digits) * _SUFFIXES[quantity[len(digits) :]]


def amount(quantity: object) -> Decimal | None:
    """A Kubernetes quantity by its value, in whatever form: "1000m", "1" and 1 are the same; None for what is none."""
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None:
        return None
    digits, exponent, suffix = found.groups()
    if exponent:
        return Decimal(digits + exponent)
    if suffix is None:
        return Decimal(digits)
    if suffix.endswith("i"):
        return Decimal(digits) * 1024 ** ("KMGTPE".index(suffix[0]) + 1)
    return Decimal(digits) * Decimal(10) ** {"n": -9, "u": -6, "m": -3}.get(suffix, 3 * "kMGTPE".find(suffix) + 3)
