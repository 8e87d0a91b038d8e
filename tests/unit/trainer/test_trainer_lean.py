"""Packages that a plan has no use for aren't imported, those it needs are."""

import subprocess
import sys

import pytest

from support.plans import training_plan
from tunesmith_trainer.group.training_process import unused


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, set()),
        ({"method": "LoRA"}, set()),
        ({"method": "QLoRA"}, {"bitsandbytes"}),
        ({"method": {"type": "Full", "qat": {"scheme": "Int4"}}}, {"torchao"}),
        ({"training": {"optim": "adamw_8bit"}}, {"bitsandbytes"}),
    ],
)
def test_what_a_plan_needs_stays(changes, needed):
    assert not needed & unused(training_plan(**changes))
    assert {"torchao", "bitsandbytes"} - needed <= unused(training_plan(**changes))


def test_hidden_packages_are_not_imported_and_the_rest_works():
    program = """
import sys
from support.plans import training_plan
from tunesmith_trainer.group.training_process import hide_unused
hide_unused(training_plan(method="LoRA"))
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)), LoraConfig(r=2, target_modules="all-linear"))
print(sorted(name for name in ("torchao", "bitsandbytes", "scipy") if sys.modules.get(name) is not None))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
