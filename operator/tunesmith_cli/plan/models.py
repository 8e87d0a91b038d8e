"""A model's sizes from a folder of this machine: config.json and the headers of its files. `command` asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunesmith_api.memory.facts import ModelFacts
from tunesmith_api.memory.headers import INDEX, StoredTensor, loaded_files, read_header
from tunesmith_cli.errors import Refused

__all__ = ["facts_at"]

CONFIG = "config.json"


def facts_at(path: Path, option: str) -> ModelFacts:
    """Read a model's sizes from its folder, or from a config.json alone. `option` is what named it, for messages.

    Raises:
        Refused: there is no model.
    """
    config = path / CONFIG if path.is_dir() else path
    try:
        read: Any = json.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{option}: {config}: {error.strerror}; give a model's folder, or its config.json") from error
    except ValueError as error:
        raise Refused(f"{option}: {config} is not valid JSON: {error}") from error
    if not isinstance(read, dict) or not read.get("model_type"):
        raise Refused(f"{option}: {config} names no model_type: it is no model's config.json")
    return ModelFacts.of(read, _tensors(config.parent, option) if path.is_dir() else [])


def _tensors(folder: Path, option: str) -> list[StoredTensor]:
    names = {entry.name for entry in folder.iterdir()}
    found: list[StoredTensor] = []
    path = folder
    try:
        for name in sorted(loaded_files(names, lambda: (folder / INDEX).read_bytes())):
            path = folder / name
            with path.open("rb") as file:
                found += read_header(file)
    except OSError as error:
        raise Refused(f"{option}: {path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"{option}: {path}: {error}") from error
    return found
