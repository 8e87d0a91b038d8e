"""What a model's folder says twice, so that readers of before transformers 5 take it as it is meant.

transformers 5 keeps the base of rotary positions in `rope_parameters` alone. 4.57, and what is built on it, doesn't
look there: it computes with 10,000 and answers nonsense without a word. It calls plain tokenizers by a name, too, that
older versions don't know. transformers 5 reads both forms. Called by `export` and `finish`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["save_model", "save_processor"]

BY_LAYER = {"full_attention", "sliding_attention"}
"""Kinds of layers whose positions older readers can be told apart."""
NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
"""Model types with names of their own for base and rotated share."""
PLAIN = "TokenizersBackend"

Document = Mapping[str, Any]


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Write weights and configuration."""
    model.save_pretrained(folder, **options)
    _rewrite(folder / "config.json", _older_config)


def save_processor(processor: Any, folder: Path) -> None:
    """Write a tokenizer, or a processor with or without one."""
    processor.save_pretrained(folder)
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = list(getattr(tokenizer, "model_input_names", ()))
    _rewrite(folder / "tokenizer_config.json", lambda config: _older_tokenizer(config, inputs))


def _rewrite(path: Path, change: Callable[[Document], Document]) -> None:
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(change(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


# ---- config.json


def _older_config(config: Document) -> Document:
    """Return a configuration, and those of its parts, with what older readers look for beside what is there."""
    older = {
        name: _older_config(value) if name.endswith("_config") and isinstance(value, Mapping) else value
        for name, value in config.items()
    }
    if isinstance(config.get("dtype"), str):
        older.setdefault("torch_dtype", config["dtype"])
    positions = config.get("rope_parameters")
    if isinstance(positions, Mapping):
        for name, value in _older_positions(str(config.get("model_type")), positions).items():
            older.setdefault(name, value)
    return older


def _older_positions(model_type: str, positions: Document) -> Document:
    by_layer = {name: value for name, value in positions.items() if isinstance(value, Mapping)}
    if not by_layer:
        return _rotary(positions, *NAMES.get(model_type, ("rope_theta", "partial_rotary_factor")))
    if set(by_layer) != BY_LAYER:
        return {}  # older versions know no such model
    full, sliding = by_layer["full_attention"], by_layer["sliding_attention"]
    if model_type.startswith("modernbert"):
        return {"global_rope_theta": full.get("rope_theta"), "local_rope_theta": sliding.get("rope_theta")}
    local = {"rope_local_base_freq": sliding["rope_theta"]} if sliding.get("rope_theta") else {}
    return {**_rotary(full, "rope_theta", "partial_rotary_factor"), **local}


def _rotary(positions: Document, base: str, share: str) -> Document:
    """Return the base, the rotated share, and how positions are scaled where they are."""
    named = {base: positions.get("rope_theta"), share: positions.get("partial_rotary_factor")}
    scaling = {name: value for name, value in positions.items() if name not in {"rope_theta", "partial_rotary_factor"}}
    if scaling not in ({}, {"rope_type": "default"}):
        named["rope_scaling"] = scaling
    return {name: value for name, value in named.items() if value is not None}


# ---- tokenizer_config.json


def _older_tokenizer(config: Document, inputs: list[str]) -> Document:
    """Return a tokenizer's configuration under the names of before."""
    older = dict(config)
    if config.get("tokenizer_class") == PLAIN:
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
        if inputs:  # older plain tokenizers add `token_type_ids`, which most models refuse
            older.setdefault("model_input_names", inputs)
    if isinstance(config.get("extra_special_tokens"), list):  # older versions take names and tokens there
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    return older
