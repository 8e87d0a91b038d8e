#!/usr/bin/env bash
# torch 2.13.0, CPU: reducing a tensor in another precision takes a copy of all of it in that precision.
#
# One would guess: sum(dtype=torch.float64) adds up in float64 as it goes along, as sum() of a bfloat16 tensor does in float32.
# What happens: the whole tensor is converted first: a bfloat16 tensor of 128 MiB takes 512 MiB more for a float64 sum, 256 MiB
#   for a float32 one, and as much for mean(), where nobody has named a precision. sum() and the norm take nothing.
# Seen: sum() 0, sum(float32) 256, mean() 256, sum(float64) 512 MiB beyond the tensor's 128.
# What follows: checksums, averages and exact norms of weights are taken piece by piece, or the peak is five times the tensor.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -w /proc/self/clear_refs ] || { echo "not applicable: the peak of a process can't be reset here"; exit 77; }
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ${TUNESMITH_WHEELS:+--find-links "$TUNESMITH_WHEELS"} torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
from pathlib import Path

import torch


def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1024


def extra(reduce):
    tensor = torch.ones(64 * 2**20, dtype=torch.bfloat16)
    reduce(tensor[:1])
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    reduce(tensor)
    return peak() - before


found = {
    "sum()": extra(lambda tensor: tensor.sum()),
    "vector_norm": extra(torch.linalg.vector_norm),
    "sum(float32)": extra(lambda tensor: tensor.sum(dtype=torch.float32)),
    "mean()": extra(lambda tensor: tensor.mean()),
    "sum(float64)": extra(lambda tensor: tensor.sum(dtype=torch.float64)),
}
print(", ".join(f"{name} {size} MiB" for name, size in found.items()), "beyond the tensor's 128 MiB")
for name, expected in {"sum()": 0, "vector_norm": 0, "sum(float32)": 256, "mean()": 256, "sum(float64)": 512}.items():
    assert abs(found[name] - expected) < 32, f"{name} takes {found[name]} MiB by now, not {expected}"
PYTHON
