"""The memory estimate against what processes really used: SmolLM2-135M, two steps of each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from assets.model import smollm2

ROOT = Path(__file__).resolve().parents[3]

STEP = """
import sys, torch
from pathlib import Path
from support.plans import training_plan
from tunesmith_trainer import methods
from tunesmith_trainer.loop.optimizer import make_optimizer
from tunesmith_trainer.models import memory
from tunesmith_trainer.models.loading import load_options, load_pretrained, stored_dtype
from tunesmith_trainer.models.numerics import Numerics
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folder, method = Path(sys.argv[1]), sys.argv[2]
plan = training_plan(method=method, training={"micro_batch_size": 4, "max_length": 128})
estimate = memory.estimate(memory.ModelFacts.of(folder), plan, 4)
numerics = Numerics.choose(plan.training.precision, 0)
task = type("Task", (), {"head_modules": lambda self, model: ()})()
model = load_pretrained(AutoModelForCausalLM, folder, **load_options(plan, numerics, stored_dtype(folder)))
model = methods.apply(model, plan, numerics, task, list).model.train()
optimizer = make_optimizer(model, plan.training, numerics.device)
ids = torch.randint(49152, (4, 128))
for _ in range(2):  # the optimizer's state is there from the second on
    logits = model(input_ids=ids, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    del logits
    optimizer.step()
    optimizer.zero_grad()
print(estimate.total, numerics.used_bytes())
"""


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_the_estimate_is_near_what_steps_take(method, record_property):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "crds", ROOT / "trainer_image", ROOT / "tests"))),
    }
    command = [sys.executable, "-c", STEP, str(smollm2()), method]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    estimated, used = map(int, output.split()[-2:])
    record_property("estimated_mib", estimated >> 20)
    record_property("used_mib", used >> 20)
    assert 0.65 <= estimated / used <= 1.35, f"estimated {estimated >> 20} MiB, used {used >> 20} MiB"
