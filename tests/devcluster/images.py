"""Container images without a registry: reads archives, and makes the two that every cluster holds.

``PAUSE`` is the sandbox of every pod; ``PROBE`` holds the same static program, for tests that need a container that
serves, looks a name up, sleeps or fails, and not a whole distribution.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAUSE = "localhost/devcluster-pause:1"
PROBE = "localhost/devcluster-probe:1"


@dataclass(frozen=True)
class ImageId:
    """What an archive holds."""

    names: tuple[str, ...]
    config: str
    """Hexadecimal sha256 of the image's configuration: equal exactly where the images are."""


class UnreadableArchive(ValueError):
    """A file that is no docker or OCI archive."""


def identify(archive: Path) -> ImageId:
    """Names and id of the one image in a docker or OCI archive; ``UnreadableArchive`` for anything else."""
    try:
        with tarfile.open(archive) as tar:
            members = {member.name.removeprefix("./"): member for member in tar}
            if "manifest.json" in members:
                entry = _load(tar, members, "manifest.json")[0]
                return ImageId(tuple(entry["RepoTags"] or ()), Path(entry["Config"]).name.removesuffix(".json"))
            index = _load(tar, members, "index.json")["manifests"][0]
            manifest = _load(tar, members, "blobs/" + index["digest"].replace(":", "/"))
            annotations = index.get("annotations", {})
            name = annotations.get("io.containerd.image.name") or annotations["org.opencontainers.image.ref.name"]
            return ImageId((name,), manifest["config"]["digest"].partition(":")[2])
    except (tarfile.TarError, KeyError, IndexError, TypeError, ValueError) as error:
        message = f"{archive} is neither a docker nor an OCI archive with a named image: {error!r}"
        raise UnreadableArchive(message) from error


def left_over_snapshot(error: str) -> Path | None:
    """The folder that an import of containerd's couldn't make since it is there: made before, and in no database.

    That is what a store has whose containerd was killed before its database reached the disk.
    """
    found = re.search(r"failed to rename: rename \S+ (/\S+/snapshots/\d+): (?:file exists|directory not empty)", error)
    return Path(found[1]) if found else None


def _load(tar: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], name: str) -> Any:
    handle = tar.extractfile(members[name])
    assert handle is not None
    return json.load(handle)


def built_in(devtool: Path, folder: Path) -> list[Path]:
    """Archives of the images of every cluster, made once per build of ``devtool``."""
    archives = []
    for name, arguments in ((PAUSE, ["pause"]), (PROBE, [])):
        archive = folder / (name.rpartition("/")[2].replace(":", "-") + ".tar")
        if not archive.exists():
            scratch = archive.with_suffix(f".{os.getpid()}")
            write(scratch, name, {"/devtool": devtool.read_bytes()}, ["/devtool", *arguments])
            scratch.rename(archive)
        archives.append(archive)
    return archives


def write(archive: Path, name: str, programs: Mapping[str, bytes], entrypoint: Sequence[str]) -> None:
    """A docker archive of a single-layer image that runs as an unprivileged user; equal input gives equal bytes."""
    layer = _tar({path.lstrip("/"): content for path, content in programs.items()}, mode=0o755)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "User": "65532:65532", "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
    }
    config_bytes = json.dumps(config).encode()
    config_name = hashlib.sha256(config_bytes).hexdigest() + ".json"
    manifest = [{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]
    files = {config_name: config_bytes, "layer.tar": layer, "manifest.json": json.dumps(manifest).encode()}
    archive.write_bytes(_tar(files, mode=0o644))


def _tar(files: Mapping[str, bytes], mode: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            member.size, member.mode = len(content), mode
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
