"""The Modelfile beside a GGUF file: `ollama create NAME -f Modelfile` runs the same model. Called by `gguf_files`.

Weights, tokenizer and chat template are in the GGUF file itself, where Ollama finds them; here stands what is not.
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

from tunesmith_server.quantizers.converter import json_of
from tunesmith_store.pretrained import position_limit

__all__ = ["MODELFILE", "modelfile_of"]

MODELFILE = "Modelfile"
USUAL_CONTEXT = 8192
"""Tokens: what a laptop has room for. The model's own bound may be a hundred times that."""
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
LONGEST_LICENSE = 64 << 10


def modelfile_of(source: Path, weights: str) -> str:
    """Return the Modelfile of a model's folder; `weights` is the name of the GGUF file beside it."""
    config = json_of(source / "config.json")
    inner = config.get("text_config")
    positions = position_limit(inner if isinstance(inner, dict) else config)
    lines = [f"FROM ./{weights}"]
    if positions is not None:
        lines.append(f"PARAMETER num_ctx {min(positions, USUAL_CONTEXT)}")
    lines += [f'PARAMETER stop "{text}"' for text in _ends(source)]
    if found := _license(source):
        lines.append(f'LICENSE """{found}"""')
    return "\n".join(lines) + "\n"


def _ends(source: Path) -> list[str]:
    """Texts of the tokens that end an answer."""
    added = json_of(source / "tokenizer.json").get("added_tokens") or ()
    texts = {token.get("id"): token.get("content") for token in added}
    found: list[str] = []
    for name in ("generation_config.json", "config.json"):
        listed = json_of(source / name).get("eos_token_id")
        for token in listed if isinstance(listed, list) else [listed]:
            text = texts.get(token) if isinstance(token, int) else None
            if isinstance(text, str) and text not in found and not set(text) & set('"\\\n'):
                found.append(text)
    return found


def _license(source: Path) -> str:
    """The license's text, or its name in the model card; "" where neither is there."""
    for name in LICENSES:
        path = source / name
        if path.is_file() and path.stat().st_size <= LONGEST_LICENSE:
            text = path.read_text(errors="replace").strip()
            if '"""' not in text:
                return text
    card = source / "README.md"
    head = card.read_text(errors="replace").splitlines() if card.is_file() else []
    if not head or head[0] != "---":
        return ""
    for line in takewhile(lambda it: it != "---", head[1:]):
        name, _, value = line.partition(":")
        if name == "license":
            return value.strip().strip("'\"")
    return ""
