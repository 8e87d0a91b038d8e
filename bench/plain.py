"""The plain loop that our memory is measured against: `python -m bench.plain STEPS` under torchrun's variables.

What a tutorial has: the whole model in float32, DistributedDataParallel, AdamW, batches padded to their longest.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from bench.peers import PER_DEVICE, encoded
from bench.workload import BATCH, LEARNING_RATE, prepare
from tunesmith_store.memory import peak_resident_bytes

__all__: list[str] = []


def main() -> None:
    """Run one rank."""
    steps, rank, world = int(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    dist.init_process_group("gloo")
    work = prepare()
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = DataCollatorForSeq2Seq(tokenizer)
    examples = encoded(work, tokenizer, work.ordered(steps))
    bare = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).train()
    model = DistributedDataParallel(bare)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    seconds = []
    for step in range(steps):
        began = time.monotonic()
        share = examples[step * BATCH : (step + 1) * BATCH][rank::world]
        for start in range(0, len(share), PER_DEVICE):
            model(**collate(share[start : start + PER_DEVICE])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
    peak = peak_resident_bytes()
    print(json.dumps({"secondsPerStep": seconds, "peakBytes": peak}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
