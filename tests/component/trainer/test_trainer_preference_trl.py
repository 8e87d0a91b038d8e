"""DPO against TRL's own trainer on the same model and pairs: the same loss, the same gradients."""

import pytest
import torch

from assets import tiny
from support.plans import training_plan
from tunesmith_api.v1alpha1.task import Preference, PreferenceLoss, Task
from tunesmith_trainer.tasks import task_for

ROWS = [
    {"prompt": "Is it good?", "chosen": " Yes, very.", "rejected": " No"},
    {"prompt": "The colour of grass", "chosen": " green", "rejected": " is blue, or so they say"},
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11"},
]


def perturbed(model):
    """The same model a few steps later."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("kind", PreferenceLoss)
def test_loss_and_gradient_agree_with_trl(kind, tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    # without a chat template: TRL learns white space behind a turn, which we leave out
    folder = tiny.llama(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    theirs, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.3, loss_type=[kind.value.lower()], max_length=256, report_to=[], use_cpu=True,
        gradient_checkpointing=False, bf16=False, per_device_train_batch_size=len(ROWS),
    )  # fmt: skip
    trainer = DPOTrainer(theirs, reference, config, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    inputs = trainer.data_collator([trainer.train_dataset[number] for number in range(len(ROWS))])
    expected = trainer.compute_loss(perturbed(trainer.model), inputs)
    expected.backward()

    preference = Preference(beta=0.3, loss_type=kind)
    task = task_for(training_plan("s3://bucket", task=Task.DPO, training={"max_length": 256}, preference=preference))
    task.load_processor(folder)
    model = task.load_model(folder, dtype=torch.float32)
    task.freeze_reference(model)
    examples = [example for row in ROWS for example in task.encode(row)]
    loss = task.loss(perturbed(model).train(), task.collate(examples, torch.device("cpu"), packed=False)) / len(ROWS)
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, one), (_, other) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5), name
