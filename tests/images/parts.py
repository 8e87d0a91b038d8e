"""What the images are made of, each part kept by content: the Debian base, the Python packages.

Called by `images.build`.
"""

import compileall
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Log = Callable[[str], None]

BASE_PACKAGES = (
    "base-files", "base-passwd", "bash", "ca-certificates", "coreutils", "dash", "libc-bin", "libgomp1", "libstdc++6", "libtinfo6",
    "python3", "tzdata", "wordnet-base",
)  # fmt: skip
# the maintainer scripts of an extracted package don't run: what they would have made
BASE_HOOKS = (
    'cat "$1"/usr/share/ca-certificates/mozilla/*.crt >"$1"/etc/ssl/certs/ca-certificates.crt',
    'cp "$1"/usr/share/base-passwd/passwd.master "$1"/etc/passwd; cp "$1"/usr/share/base-passwd/group.master "$1"/etc/group',
    'echo tunesmith:x:65532:65532::/scratch:/bin/bash >>"$1"/etc/passwd; echo tunesmith:x:65532: >>"$1"/etc/group',
    'rm -rf "$1"/usr/share/doc "$1"/usr/share/man "$1"/usr/share/locale "$1"/usr/share/info; mkdir -p "$1"/scratch',
)
# files of packages that no pod of ours opens; each is megabytes in every node's image store
UNUSED = (
    "*/tests", "*/test", "ray/dashboard/client", "ray/rllib", "ray/serve/tests", "ray/jars", "torch/include", "torch/share",
    "torch/lib/*.a", "pyarrow/include", "pyarrow/src", "pyarrow/tests", "bin", "caffe2", "functorch/examples",
)  # fmt: skip


def cache_folder() -> Path:
    """The cache that the Makefile and the local cluster use too."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    return Path(os.environ.get("TUNESMITH_CACHE") or default) / "images"


def digest(parts: Iterable[str | bytes]) -> str:
    """Short hex digest of texts and bytes."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def base_archive(cache: Path, log: Log) -> Path:
    """Tar of a small Debian root file system with Python."""
    archive = cache / f"base-{digest((*BASE_PACKAGES, *BASE_HOOKS))}.tar"
    if not archive.exists():
        log("making the base file system from Debian packages")
        scratch = archive.with_suffix(f".{os.getpid()}.tar")
        hooks = [f"--extract-hook={hook}" for hook in BASE_HOOKS]
        run(
            [
                "mmdebstrap",
                "--quiet",
                "--variant=extract",
                f"--include={','.join(BASE_PACKAGES)}",
                *hooks,
                "bookworm",
                str(scratch),
            ]
        )
        scratch.rename(archive)
    return archive


def wheels_folder() -> Path | None:
    """Folder with torch's CPU build, where there is one."""
    folder = Path(os.environ.get("TUNESMITH_WHEELS") or ROOT.parent / "shared" / "wheels")
    return folder if any(folder.glob("torch-*+cpu-*.whl")) else None


def packages(cache: Path, locks: Iterable[str], log: Log) -> Path:
    """Folder that stands for the Dockerfile's stage `packages`: /packages with byte code, unused files left out."""
    wheels = wheels_folder()
    texts = [(ROOT / "requirements" / lock).read_text() for lock in locks]
    if wheels:
        texts = [re.sub(r"(?m)^(torch==[0-9.]*)", r"\1+cpu", text) for text in texts if not text.startswith("cuda")]
    stage = cache / f"packages-{digest([*texts, *UNUSED])}"
    if (stage / ".complete").exists():
        return stage
    log(f"installing the packages of {', '.join(locks)}")
    shutil.rmtree(stage, ignore_errors=True)
    folder = stage / "packages"
    folder.mkdir(parents=True)
    for index, text in enumerate(texts):
        lock = stage / f"{index}.txt"
        lock.write_text(text)
        find = ["--find-links", str(wheels)] if wheels else []
        uv = Path(sys.executable).with_name("uv")
        run([str(uv), "pip", "install", "--quiet", "--python-version", "3.11", "--no-deps", "--require-hashes", "--link-mode=hardlink",
             *find, "--target", str(folder), "--requirement", str(lock)])  # fmt: skip
        lock.unlink()
    for pattern in UNUSED:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    log("compiling byte code")
    compileall.compile_dir(folder, quiet=2, workers=2, invalidation_mode=compileall_mode())
    (stage / ".complete").touch()
    return stage


def compileall_mode():
    """Byte code that is never compared with its source: times change on the way into an image."""
    from py_compile import PycInvalidationMode

    return PycInvalidationMode.UNCHECKED_HASH


def run(command: list[str], **options: object) -> str:
    """Run a tool and return its output; a failure shows the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:6])} … failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout
