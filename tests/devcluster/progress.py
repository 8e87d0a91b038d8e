"""Progress that people can see: one line per step, with the seconds since the start."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[str], None]


def to_stderr() -> Progress:
    """Lines such as ``[  3.2s] kube-apiserver is ready`` on standard error."""
    start = time.monotonic()

    def line(text: str) -> None:
        print(f"[{time.monotonic() - start:5.1f}s] {text}", file=sys.stderr, flush=True)

    return line


def silent(_: str) -> None:
    """Progress for nobody."""
