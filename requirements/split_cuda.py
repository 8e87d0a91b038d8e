"""Moves NVIDIA's packages out of dev.txt, trainer.txt and vllm.txt into cuda.txt, and admits torch's CPU build by hash.

Called by lock.sh with the folder that may hold that build. Without it the hashes stay that the lock has by now.
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


def cpu_hashes(wheels: Path, requirement: str) -> list[str]:
    """Return the sha256 of the CPU build of `torch==VERSION`, where the folder holds it."""
    found = sorted(wheels.glob(f"{requirement.replace('==', '-')}+cpu-cp311-*x86_64.whl"))
    return [f"--hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}" for wheel in found]


def admitted(entry: str, wheels: Path) -> str:
    """Return torch's entry with the hash of its CPU build; each hash stands there once."""
    requirement = entry.split()[0]
    hashes = dict.fromkeys([*re.findall(r"--hash=\S+", entry), *cpu_hashes(wheels, requirement)])
    return " \\\n    ".join([requirement, *hashes]) + "\n"


def main() -> None:
    """Rewrite the lock files in place."""
    wheels = Path(sys.argv[1])
    cuda: set[str] = set()
    for name in ("dev.txt", "trainer.txt", "vllm.txt"):
        path = HERE / name
        found = entries(path.read_text())
        cuda.update(entry for entry in found if CUDA.match(entry))
        kept = [entry for entry in found if not CUDA.match(entry)]
        path.write_text("".join(admitted(entry, wheels) if entry.startswith("torch==") else entry for entry in kept))
    (HERE / "cuda.txt").write_text("".join(sorted(cuda)))


if __name__ == "__main__":
    main()
