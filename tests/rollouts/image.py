"""Images of the stand-in server: the operator's image, which a node has, and one layer with other code.

No build: an image is its configuration and its layers, and a layer is an archive.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from images import Image

SOURCES = Path(__file__).with_name("server")
FOLDER = "opt/tunesmith/app/tunesmith_server"


def write_image(operator: Image, name: str, environment: Mapping[str, str], archive: Path) -> None:
    """Write the archive of an image of that name, whose containers have these variables too."""
    with tarfile.open(operator.archives[1]) as tar:
        index = _load(tar, "index.json")
        manifest = _load(tar, _blob(index["manifests"][0]["digest"]))
        config = _load(tar, _blob(manifest["config"]["digest"]))
    layer = _layer()
    config["config"]["Env"] = [*config["config"]["Env"], *(f"{key}={value}" for key, value in environment.items())]
    config["rootfs"]["diff_ids"].append(_digest(layer))
    config.pop("history", None)
    media = manifest["layers"][0]["mediaType"]
    content = gzip.compress(layer, mtime=0) if media.endswith("gzip") else layer
    manifest["layers"].append({"mediaType": media, "digest": _digest(content), "size": len(content)})
    config_bytes = json.dumps(config).encode()
    manifest["config"] |= {"digest": _digest(config_bytes), "size": len(config_bytes)}
    manifest_bytes = json.dumps(manifest).encode()
    names = {"org.opencontainers.image.ref.name": name, "io.containerd.image.name": name}
    entry = {
        **index["manifests"][0], "digest": _digest(manifest_bytes), "size": len(manifest_bytes), "annotations": names,
    }  # fmt: skip
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode(),
        **{_blob(_digest(it)): it for it in (manifest_bytes, config_bytes, content)},
    }
    archive.write_bytes(_archive(files))


def _layer() -> bytes:
    return _archive({f"{FOLDER}/{it.name}": it.read_bytes() for it in sorted(SOURCES.glob("*.py"))})


def _archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _load(tar: tarfile.TarFile, name: str) -> Any:
    handle = tar.extractfile(name)
    assert handle is not None
    return json.load(handle)


def _blob(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
