#!/usr/bin/env bash
# PEFT 0.21.2: `import peft` loads torchao and bitsandbytes where they are installed, whatever is used.
#
# One would guess: support for quantized layers is loaded once a quantized model is met, as transformers loads its models.
# What happens: PEFT decides at import which layer types there are, and for that imports the packages themselves. A process that
#   wraps a plain model in LoRA pays for all of them, each rank and each restart anew.
# Seen: 5.1 s of CPU as they are, 0.6 s with the two hidden.
# What follows: keep them out of images that don't need them, or hide them: an entry of None in sys.modules before the
#   first import.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ${TUNESMITH_WHEELS:+--find-links "$TUNESMITH_WHEELS"} \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2 torchao==0.18.0 bitsandbytes==0.50.2
cat >"$work/plain.py" <<'PYTHON'
import sys
import time

from transformers import LlamaConfig, LlamaForCausalLM

base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4))
for name in sys.argv[1:]:
    sys.modules[name] = None
before = time.process_time()
from peft import LoraConfig, get_peft_model

get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
loaded = [name for name in ("torchao", "bitsandbytes") if sys.modules.get(name)]
print(f"{time.process_time() - before:.1f} s of CPU, loaded: {' '.join(loaded) or 'none of them'}")
PYTHON
"$work/venv/bin/python" "$work/plain.py" >"$work/warm" 2>/dev/null # writes compiled modules
with=$("$work/venv/bin/python" "$work/plain.py" 2>/dev/null)
without=$("$work/venv/bin/python" "$work/plain.py" torchao bitsandbytes 2>/dev/null)
echo "as they are: $with"
echo "hidden: $without"
[[ $with == *"torchao bitsandbytes" && $without == *"none of them" ]] || { echo "this has changed"; exit 1; }
