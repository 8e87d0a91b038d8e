"""What Argo CD does with our manifests: health checks in its Lua, and its comparison of git with the cluster.

Contract and integration tests use it. The Lua is the real gopher-lua, built on first use.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from devcluster import binaries, paths, progress
from devcluster.errors import ClusterFailed

__all__ = ["definitions", "drift", "healths"]

JSON = dict[str, Any]
SOURCE = Path(__file__).parent / "lua"
MODULE = "github.com/argoproj/argo-cd/v3@v3.5.7"
SUM = "h1:Xm1BF+I5OgDKUG3SDK49vn2/Y5AMyaNVko+/JT08gj0="


def healths(script: str, objects: Sequence[JSON]) -> list[tuple[str, str]]:
    """Status and message that a health check gives for each object."""
    asked = json.dumps({"script": script, "objects": list(objects)})
    done = subprocess.run([_interpreter()], input=asked, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise ValueError(done.stderr)
    return [(answer["status"], answer.get("message", "")) for answer in json.loads(done.stdout)]


def _interpreter() -> Path:
    """The built program; built first where this machine has none of these sources.

    Raises: ``UnsupportedMachine`` where there is neither a Go nor a way to get one, ``ClusterFailed`` where it doesn't
    compile.
    """
    digest = hashlib.sha256()
    for name in ("main.go", "go.mod", "go.sum"):
        digest.update((SOURCE / name).read_bytes())
    program = paths.cache() / "argocd" / f"lua-{digest.hexdigest()[:16]}"
    if program.is_file():
        return program
    go = binaries.find_go(progress.to_stderr()).go
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        made = Path(scratch) / "lua"
        argv = [go, "build", "-trimpath", "-buildvcs=false", "-mod=readonly", "-o", str(made), "."]
        environment = binaries.go_environment()
        done = subprocess.run(argv, cwd=SOURCE, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterFailed(f"`go build` in {SOURCE} failed: {done.stderr}")
        made.rename(program)
    return program


def definitions() -> tuple[Path, ...]:
    """Files with the definitions of Application and ApplicationSet, from Argo CD's own Go module."""
    go = binaries.find_go(progress.to_stderr()).go
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "go.mod").write_text("module scratch\n")
        argv = [go, "mod", "download", "-json", MODULE]
        environment = binaries.go_environment()
        done = subprocess.run(argv, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout or "{}")
    if done.returncode or found["Sum"] != SUM:
        raise ClusterFailed(f"{' '.join(argv)} failed: {found.get('Error') or found.get('Sum') or done.stderr}")
    folder = Path(found["Dir"]) / "manifests/crds"
    return (folder / "application-crd.yaml", folder / "applicationset-crd.yaml")


def drift(config: Any, live: Any, place: str = "") -> Iterator[str]:
    """Where Argo CD would find a custom resource out of sync: fields of git whose value in the cluster is another.

    As gitops-engine's ``ThreeWayDiff`` for kinds that it has no Go type of, where git is what was applied last: fields
    that git doesn't have are left out, in the entries of lists, too; a list of another length is a difference.
    """
    if isinstance(config, dict) and isinstance(live, dict):
        for name, value in config.items():
            yield from drift(value, live.get(name), f"{place}.{name}")
    elif isinstance(config, list) and isinstance(live, list) and len(config) == len(live):
        for number, (wanted, found) in enumerate(zip(config, live, strict=True)):
            yield from drift(wanted, found, f"{place}[{number}]")
    elif isinstance(config, bool) is not isinstance(live, bool) or config != live:
        yield f"{place}: {live!r} instead of {config!r}"
