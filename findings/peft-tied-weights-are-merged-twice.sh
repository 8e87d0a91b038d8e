#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.23.0: ensure_weight_tying=True on a tied model merges the adapter into the weights twice.
#
# One would guess: PEFT warns that an adapter on lm_head of a model whose head and embeddings are one matrix goes wrong when it
#   is merged, and says to set ensure_weight_tying. With it, merge_and_unload gives the model that was trained.
# What happens: head and embeddings get an adapter with the same two matrices, and both are merged into the one weight that
#   the two layers share. Its change is twice what was trained; no warning is given. Without the option the head's change
#   reaches the embeddings too.
# Seen: change of the weight / trained change 2.00; the adapter's effect on a logit 1.168, the merged model's error 0.905.
# What follows: leave lm_head and embed_tokens out of target_modules of a tied model, or untie it first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ${TUNESMITH_WHEELS:+--find-links "$TUNESMITH_WHEELS"} \
  torch==2.13.0 numpy==2.4.6 transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" - 2>&1 <<'PYTHON' | tail -n 4
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, initializer_range=0.2,
    )
).eval()
before = base.lm_head.weight.detach().clone()
tokens = torch.arange(20)[None]
with torch.no_grad():
    untrained = base(tokens).logits
model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True)).eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.normal_(std=0.05)
    trained = model.base_model.model.lm_head.get_delta_weight("default")
    adapted = model(tokens).logits
    merged = model.merge_and_unload()
    ratio = (merged.lm_head.weight - before).norm() / trained.norm()
    effect, error = (adapted - untrained).abs().max(), (merged(tokens).logits - adapted).abs().max()
print(f"change of the weight / trained change {ratio:.2f}; the adapter's effect {effect:.3f}, error of the merged model {error:.3f}")
assert merged.lm_head.weight is merged.model.embed_tokens.weight, "merging unties the weights by now"
assert abs(ratio - 2) < 0.01, "the adapter is merged once by now"
assert error > effect / 2
PYTHON
