"""`quantization.ignore` → the modules of a model that are left as they are. Called by the families."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_store.weights import stored_tensors

__all__ = ["matching"]

MOST_NAMED = 12
WEIGHT = ".weight"


def matching(source: Path, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the modules of a model's folder that have a matrix of weights and match a pattern.

    Raises:
        UserError: a pattern matches none.
    """
    if not patterns:
        return ()
    tensors = stored_tensors(source)
    modules = sorted({it.name.removesuffix(WEIGHT) for it in tensors if len(it.shape) > 1 and it.name.endswith(WEIGHT)})
    found: set[str] = set()
    for pattern in patterns:
        matched = {module for module in modules if fnmatchcase(module, pattern)}
        if not matched:
            named = ", ".join(modules[:MOST_NAMED]) + (", …" if len(modules) > MOST_NAMED else "")
            message = f"quantization.ignore: {pattern} matches no module of the model; its modules are {named}"
            raise UserError(Reason.INVALID_SPEC, message)
        found |= matched
    return tuple(sorted(found))
