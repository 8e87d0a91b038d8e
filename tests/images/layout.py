"""Cuts an archive with one image out of a shared OCI layout folder. Called by `images.build`.

The layout holds every layer once. https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

REF_NAME = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"


def write_archive(layout: Path, name: str, archive: Path, without: str | None = None) -> None:
    """Write the OCI archive of an image, leaving out the layers of another one."""
    entry = _index_entry(layout, name)
    manifest = _document(layout, entry["digest"])
    known = (
        {layer["digest"] for layer in _document(layout, _index_entry(layout, without)["digest"])["layers"]}
        if without
        else set()
    )
    digests = [entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
    index = {
        "schemaVersion": 2,
        "manifests": [{**entry, "annotations": {REF_NAME: name, CONTAINERD_NAME: name}}],
    }
    with tarfile.open(archive, "w") as tar:
        _add(tar, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", json.dumps(index).encode())
        for digest in dict.fromkeys(digests):
            if digest not in known:
                tar.add(_blob(layout, digest), arcname="blobs/" + digest.replace(":", "/"))


def _index_entry(layout: Path, name: str) -> dict[str, Any]:
    manifests = json.loads((layout / "index.json").read_text())["manifests"]
    return next(entry for entry in reversed(manifests) if entry.get("annotations", {}).get(REF_NAME) == name)


def _document(layout: Path, digest: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(_blob(layout, digest).read_text())
    return document


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
