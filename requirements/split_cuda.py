"""Moves the NVIDIA packages out of dev.txt and trainer.txt into cuda.txt, and admits torch's CPU build by its hash.

Called by lock.sh with the folder that may hold that build.
"""

import hashlib
import re
import sys
from pathlib import Path

CUDA = re.compile(r"^(nvidia-|cuda-|triton)")
HERE = Path(__file__).parent


def entries(text: str) -> list[str]:
    """Split a lock file into one text per package."""
    return [entry for entry in re.split(r"(?m)^(?=[a-zA-Z0-9])", text) if entry.strip()]


def known_cpu_hash(wheels: Path) -> str:
    """Return the sha256 of torch's CPU build, from the folder or else from the present lock."""
    for wheel in sorted(wheels.glob("torch-*+cpu-cp311-*x86_64.whl")):
        return hashlib.sha256(wheel.read_bytes()).hexdigest()
    raise SystemExit(f"no torch CPU wheel in {wheels}: its hash can't be locked")


def main() -> None:
    """Rewrite the lock files in place."""
    cpu_hash = known_cpu_hash(Path(sys.argv[1]))
    cuda: list[str] = []
    for name in ("dev.txt", "trainer.txt"):
        path = HERE / name
        kept = []
        for entry in entries(path.read_text()):
            if CUDA.match(entry):
                cuda.append(entry)
                continue
            if entry.startswith("torch=="):
                entry = entry.rstrip() + f" \\\n    --hash=sha256:{cpu_hash}\n"
            kept.append(entry)
        path.write_text("".join(kept))
    (HERE / "cuda.txt").write_text("".join(sorted(set(cuda))))


if __name__ == "__main__":
    main()
