"""Chains of rules: small named functions that are asked in order, until one has an answer.

Policies are such chains, and so are the summary conditions: what a status says first, and why, is the order of a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from tunesmith_api.keys import Reason

__all__ = ["Violation", "first_answer"]

S = TypeVar("S")
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Violation:
    """A policy that a spec breaks: the message names the field and the remedy."""

    message: str
    reason: Reason = Reason.INVALID_SPEC


def first_answer(rules: Iterable[Callable[[S], A | None]], subject: S) -> A | None:
    """What the first rule says that has something to say about the subject; None where none has."""
    return next((answer for rule in rules if (answer := rule(subject)) is not None), None)
