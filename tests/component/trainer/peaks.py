"""`python peaks.py FOLDER`: cases from standard input, each a real run in a process of its own; prints what it used at most.

Each child is forked once everything is imported, and counts what it has from its parent as its own. The trainer's
processes import no more than their plan needs; so do these.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from support.plans import dataset, training_plan
from tunesmith_api import keys
from tunesmith_api.memory.estimate import activation_bytes, estimate
from tunesmith_store.memory import peak_resident_bytes
from tunesmith_trainer.group.training_process import hide_unused
from tunesmith_trainer.models.files import facts_of

STEPS, WORDS = 2, 400
"""The optimizer's state is there from the second step on. Of each text several examples are as long as they may be."""
SOMETIMES = ("torchao", "bitsandbytes", "scipy", "sklearn")
"""Packages that `hide_unused` hides from plans that don't need them."""


def rows(task, count):
    for number in range(count):
        row = {"text": " ".join(f"w{(number * 31 + place * 7) % 97}" for place in range(WORDS))}
        yield {**row, "label": ("bad", "good")[number % 2]} if task == "SequenceClassification" else row


def plan_of(case):
    task, micro, name = case["task"], case["micro"], f"{case['model']}-{case['method']}"
    # gradients of one micro-batch stay while the next is computed; those of adapters are too small to be seen
    batch = 2 * micro if case["method"] == "Full" else micro
    training = {"max_steps": STEPS, "micro_batch_size": micro, "global_batch_size": batch, "max_length": case["length"]}
    with Path(os.environ[keys.ENV_VOLUMES], "data", f"{task}.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(task, STEPS * batch))
    return training_plan(
        "pvc://data", task=task, method=case["method"], model_uri=f"pvc://{case['model']}",
        dataset=dataset(f"pvc://data/{task}.jsonl"), training=training | case.get("training", {}), checkpoint_every_steps=1000,
        output_uri=f"pvc://data/{name}/model", checkpoint_uri=f"pvc://data/{name}/checkpoints",
    )  # fmt: skip


def peak_of(case, folder):
    """Run a case in this process and return what it used at most, and what was estimated."""
    import torch
    from ranks import pod_at

    from tunesmith_store.router import store_of
    from tunesmith_trainer.distributed.collectives import Group
    from tunesmith_trainer.loop.run import TrainingRun

    torch.set_num_threads(1)
    plan, scratch = plan_of(case), folder / f"{case['model']}-{case['method']}"
    hide_unused(plan)
    after = []
    run = TrainingRun(
        plan,
        pod_at(scratch),
        Group(),
        store_of(plan),
        "digest",
        after_step=lambda step: after.append(peak_resident_bytes()),
    )
    run.run()
    used = peak_resident_bytes()
    for path in (scratch, Path(os.environ[keys.ENV_VOLUMES], "data", scratch.name)):
        shutil.rmtree(path)  # gigabytes, in the folder that pytest keeps
    facts = facts_of(Path(os.environ[keys.ENV_VOLUMES], case["model"]))
    made = estimate(facts, plan, activation_bytes(plan), cuda_build=torch.version.cuda is not None)
    return {
        **case,
        "used": used,
        "in_steps": after[-1],
        "estimated": made.total,
        "parts": str(made),
        "saving": made.saving,
    }


def main(folder):
    for name in SOMETIMES:  # they would be imported along with transformers
        sys.modules[name] = None
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama

    import tunesmith_trainer.loop.run

    _ = tunesmith_trainer.loop.run, transformers
    for name in SOMETIMES:
        del sys.modules[name]
    for case in json.load(sys.stdin):
        if pid := os.fork():
            if os.waitpid(pid, 0)[1]:
                raise SystemExit(f"{case} failed")
            continue
        print("peak:", json.dumps(peak_of(case, folder)), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
