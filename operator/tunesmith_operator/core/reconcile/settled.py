"""What needs no second look: cases in which the children were as they should be.

To work out what children should be, and to compare them with that, takes most of the time of a reconcile, and nearly
always nothing is to be written. The kinds' `decide` asks here first. A case is known by a hash of all that the answer
depends on, so that the same observation gives the same decision; it holds no object.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Final

from tunesmith_api import keys
from tunesmith_operator.core.kubernetes.objects import ChildView
from tunesmith_operator.core.reconcile.decision import Action

__all__ = ["state_of", "unless_settled"]

_MOST: Final = 20_000
_settled: OrderedDict[int, None] = OrderedDict()


def state_of(child: ChildView | None) -> Hashable:
    """All of a child that its manifest is compared with."""
    if child is None:
        return None
    revision = child.annotations.get(keys.ANNOTATION_REVISION_HASH, "")
    return (child.name, child.uid, child.deleting, child.spec_hash, revision, child.content)


def unless_settled(case: Hashable, actions: Callable[[], Iterable[Action]]) -> list[Action]:
    """The actions; they aren't worked out again where there were none for the same case."""
    known = hash(case)
    if known in _settled:
        _settled.move_to_end(known)
        return []
    found = list(actions())
    if not found:
        _settled[known] = None
        if len(_settled) > _MOST:
            _settled.popitem(last=False)
    return found
