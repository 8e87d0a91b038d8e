"""`python -m images build`: build both images and say where they are."""

import time

from images import build_images


def main() -> None:
    started = time.monotonic()
    images = build_images(lambda line: print(f"[{time.monotonic() - started:5.1f}s] {line}", flush=True))
    for image in (images.operator, images.trainer):
        for archive in image.archives:
            print(f"{image.reference}  {archive.stat().st_size / 1e6:.0f} MB  {archive}")
    print(
        "next: `make demo` uses them; `ctr images import ARCHIVE`, in this order, brings one into a containerd of yours"
    )


if __name__ == "__main__":
    main()
