"""`python -m images.vllm`: build the image of engine VLLM, for CPU, and say where it is.

Not in `build`: it takes minutes and 3 GB, and no test of `make test` runs it.
"""

from __future__ import annotations

import fcntl
import time

from images import parts
from images.build import Image, Recipe, _build
from images.parts import Log, cache_folder

__all__ = ["build_vllm"]

VLLM = Recipe(
    name="tunesmith-vllm",
    dockerfile="trainer_image/vllm.Dockerfile",
    locks=("vllm.txt",),
    sources=("crds/tunesmith_api", "trainer_image/tunesmith_store", "trainer_image/tunesmith_server"),
)


def build_vllm(log: Log) -> Image:
    """Build it, or take it from the cache."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    # for vLLM's kernels, and lscpu, which it runs; said in `parts` itself, they would have all images built anew
    parts.BASE_PACKAGES = (*parts.BASE_PACKAGES, "libnuma1", "util-linux")
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(VLLM, cache, log)


def main() -> None:
    started = time.monotonic()
    image = build_vllm(lambda line: print(f"[{time.monotonic() - started:5.1f}s] {line}", flush=True))
    for archive in image.archives:
        print(f"{image.reference}  {archive.stat().st_size / 1e6:.0f} MB  {archive}")


if __name__ == "__main__":
    main()
