"""Chains of rules: small named functions that are asked in order, until one has an answer.

Policies are such chains, and so are the summary conditions: what a status says first, and why, is the order of a tuple.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tunesmith_api.keys import Reason

__all__ = ["Violation", "first_answer", "password_in_url"]

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


def password_in_url(urls: Mapping[str, str | None]) -> Violation | None:
    """A user name or password in one of the URLs, by field of the spec: plans are ConfigMaps, which many may read.

    Admission refuses it, too; this is for objects that are older than that rule.
    """
    for field, url in urls.items():
        if url is not None and "@" in re.split("[/?#]", url.partition("://")[2])[0]:
            return Violation(
                f"spec.{field} holds a user name or password, which would stand in a ConfigMap: put it into a Secret, "
                "name that in the secretRef beside it, and remove it from the URL"
            )
    return None
