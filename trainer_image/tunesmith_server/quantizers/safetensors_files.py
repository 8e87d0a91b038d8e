"""The family of unchanged files, for the engine Transformers: the model's folder as it is, in the artefact's place.

A copy, as the source may change while a revision is served.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

from tunesmith_api.memory.headers import is_weights
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.predict.kinds import kind_of
from tunesmith_server.quantizers.base import PLAIN, Made, Options, types_in, weights_in

__all__ = ["SafetensorsQuantizer", "copy_others"]


class SafetensorsQuantizer:
    """One source as it is."""

    def __init__(self, source: Path, scratch: Path, threads: int) -> None:
        """Nothing is read yet."""
        self._source = source

    def make(self, method: QuantizationMethod, folder: Path, options: Options = PLAIN) -> Made:
        """Copy the model's files.

        Raises:
            UserError: nobody could serve it.
        """
        kind_of(self._source)
        copy_others(self._source, folder)
        for path in self._source.iterdir():
            if is_weights(path.name):
                shutil.copyfile(path, folder / path.name)
        return Made(
            weights=weights_in(folder),
            tensor_types=types_in(folder),
            fallbacks={},
            tools={"transformers": version("transformers")},
        )


def copy_others(source: Path, folder: Path) -> None:
    """Copy what a model's folder holds besides weights: its configuration, tokenizer, and how it pools."""
    for path in source.rglob("*"):
        name = path.relative_to(source)
        if path.is_file() and path.name[0] != "." and path.suffix in (".json", ".txt", ".model", ".jinja"):
            if path.name.endswith(".index.json"):
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
