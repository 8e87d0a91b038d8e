"""Steps that every kind takes with its children: write what has changed, wait for orphans, look again in time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from tunesmith_operator.core.kubernetes.drift import correction, fields_of, fingerprint
from tunesmith_operator.core.kubernetes.manifest import Manifest
from tunesmith_operator.core.kubernetes.objects import ChildView
from tunesmith_operator.core.reconcile.decision import Action, Create, Patch

__all__ = ["ORPHANS_SECONDS", "Keeper", "orphans_message", "seconds_until", "soonest"]

ORPHANS_SECONDS: Final = 5.0
"""From one look at orphans that are waited for to the next."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """Keeps children as their manifests say.

    `answers` are fingerprints of what the API server made of the operator's own writes where that isn't what was
    written: an admission webhook's part in a child is not undone again and again. `settled` says that the owner's spec
    has been carried out before: whatever differs now was changed by somebody else.
    """

    answers: Mapping[str, str] = field(default_factory=dict)
    settled: bool = False

    def keep(self, manifest: Manifest, child: ChildView | None) -> Iterator[Action]:
        """Create the child where it is missing, correct it where it isn't as written."""
        if child is None:
            yield Create(manifest)
            return
        body = correction(manifest, child)
        if not body or self.answers.get(str(manifest)) == fingerprint(manifest, child):
            return
        drifted = self.settled and "metadata" not in body
        undone = (
            f"{manifest} was changed by somebody else ({fields_of(body)}), which is undone: it belongs to this object, "
            "whose spec says what it is"
        )
        yield Patch(
            manifest.resource, child.namespace, child.name, child.uid, body, manifest, undone if drifted else ""
        )


def orphans_message(previous_owner: str, orphans: Iterable[ChildView]) -> str:
    """Why nothing is started yet: names are taken by what a previous owner of the same name owns."""
    names = ", ".join(sorted({child.name for child in orphans})[:3])
    return f"Waiting until what an earlier {previous_owner} left behind is gone: {names}."


def seconds_until(moment: datetime | None, now: datetime) -> float | None:
    """Seconds until then, at least one; None for a moment that has passed or isn't known."""
    left = (moment - now).total_seconds() if moment is not None else 0.0
    return max(1.0, left) if left > 0 else None


def soonest(*waits: float | None) -> float | None:
    """The shortest of several waits; None where there is none."""
    return min((wait for wait in waits if wait is not None), default=None)
