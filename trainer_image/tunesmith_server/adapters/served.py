"""The adapters that this server is to have, as the operator's ConfigMap says, and their files. Used by `serving`.

The kubelet rewrites the mounted file when the ConfigMap changes, so adapters come and go without a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from tunesmith_api import keys
from tunesmith_api.adapters import AdapterSet, ServedAdapter
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.artifact import fetch_files
from tunesmith_server.engines.base import LocalAdapter
from tunesmith_store.errors import Failure, UserError
from tunesmith_store.files import find_manifest
from tunesmith_store.store import ObjectStore

__all__ = ["ADAPTER_FILE", "fetched", "wanted_adapters"]

log = logging.getLogger("tunesmith.server")

ADAPTER_FILE: Final = "adapter.gguf"


def wanted_adapters(environment: Mapping[str, str]) -> tuple[ServedAdapter, ...] | None:
    """Return the adapters that the mounted file lists; None where there is no file, or one of another version."""
    folder = Path(environment.get(keys.ENV_ADAPTERS, keys.ADAPTERS_DIRECTORY))
    try:
        return AdapterSet.from_json((folder / keys.ADAPTERS_FILE).read_bytes()).adapters
    except OSError:
        return None
    except ValidationError as error:
        log.warning(
            "the list of adapters can't be read (%d errors): use an image of the operator's version",
            error.error_count(),
        )
        return None


def fetched(
    store: ObjectStore, wanted: Sequence[ServedAdapter], folder: Path, engine: EngineType
) -> list[LocalAdapter]:
    """Return those of the adapters whose files are here or can be brought; why others can't stands in the log."""
    found = []
    for adapter in wanted:
        try:
            found.append(LocalAdapter(adapter.name, _local(store, adapter, folder, engine), adapter.digest))
        except Failure as failure:
            log.error("adapter %s can't be loaded: %s: %s", adapter.name, failure.reason, failure.message)
    return found


def _local(store: ObjectStore, adapter: ServedAdapter, folder: Path, engine: EngineType) -> Path:
    place = folder / adapter.digest
    manifest = find_manifest(store, adapter.uri)
    if manifest is None or manifest.digest != adapter.digest:
        message = f"{adapter.uri} doesn't hold the adapter with digest {adapter.digest[:12]} any longer: restore it"
        raise UserError(Reason.MODEL_NOT_FOUND, message)
    fetch_files(store, adapter.uri, manifest.files, place)
    return place / ADAPTER_FILE if engine is EngineType.LLAMA_CPP else place
