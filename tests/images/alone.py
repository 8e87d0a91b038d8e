"""The operator's image without the trainer's, which takes minutes. Called by `rollouts`.

Not in `build`: what the packages stand on is known by that module's content, and would be built anew.
"""

from __future__ import annotations

import fcntl

from images.build import OPERATOR, Image, _build
from images.parts import Log, cache_folder

__all__ = ["build_operator"]


def build_operator(log: Log) -> Image:
    """Build it, or take it from the cache."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(OPERATOR, cache, log)
