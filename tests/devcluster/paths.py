"""Where the package keeps things: all of it in one cache folder outside the checkout.

``bin/<key>`` built programs · ``go/<version>`` a Go toolchain, where the machine has none · ``clusters/<id>`` what a
running cluster needs, removed with it · ``nodes/<slot>/<n>`` the image store of a node, kept between boots.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).parent / "hyper"


def cache() -> Path:
    """``$TUNESMITH_CACHE``, else the user's cache folder for this project."""
    chosen = os.environ.get("TUNESMITH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(chosen) if chosen else Path(base) / "tunesmith").absolute()


def clusters() -> Path:
    """Folder of the running clusters' own folders."""
    return cache() / "clusters"


def slots() -> Path:
    """Folder of the nodes' image stores."""
    return cache() / "nodes"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it, as long as the block runs. The lock dies with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
