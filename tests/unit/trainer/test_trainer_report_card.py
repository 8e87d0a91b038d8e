"""The model card: metadata that the Hub's own parser takes, a table of results, and code that runs as it stands."""

import contextlib
import re
from io import StringIO

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from assets import tiny
from support.learning import word_pieces
from support.plans import training_plan
from support.records import evaluated, run_record
from tunesmith_trainer.methods.adapters import add_adapters, save_adapter
from tunesmith_trainer.models.tokenizers import CHATML
from tunesmith_trainer.report.card import model_card
from tunesmith_trainer.report.record import ClassCount, Data
from tunesmith_trainer.tasks import task_for

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NAMES = {"id2label": {0: "down", 1: "up"}, "label2id": {"down": 0, "up": 1}}


def table_of(card):
    return [line for line in card.splitlines() if line.startswith("|")]


def test_the_metadata_is_what_the_hub_reads():
    card = ModelCard(model_card(run_record({"model_uri": "hf://owner/base"})))
    assert card.data.base_model == "owner/base"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.library_name == "transformers"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.metrics == ["accuracy", "f1"]
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": 0.84, "accuracy": 0.637, "f1": 0.617}


def test_a_base_that_is_not_on_the_hub_is_named_in_the_text_only():
    text = model_card(run_record())
    metadata = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata
    assert "`s3://bucket/model`, fine-tuned on `s3://bucket/train.jsonl` (SequenceClassification, Full)" in text


def test_an_adapter_says_that_it_is_one():
    plan = {"model_uri": "hf://owner/base", "method": "LoRA", "save": "Adapter"}
    metadata = yaml.safe_load(model_card(run_record(plan)).split("---")[1])
    assert metadata["library_name"] == "peft"
    assert metadata["base_model_relation"] == "adapter"


def test_the_format_of_the_weights_is_told_with_what_it_costs():
    record = run_record()
    told = "the files hold float32: rounding to bfloat16 would take 94.0% of what training changed (spec.output.dtype)"
    model = record.model.model_copy(update={"dtype": "float32", "rounding": told, "metrics": {"accuracy": 0.5}})
    text = model_card(record.model_copy(update={"model": model})).replace("\u202f", " ")
    assert "| weights saved as | float32 |" in text
    assert "| accuracy | 34.8 % | 50.0 % | +15.2 points |" in table_of(text)
    assert "Measured on the model as it is saved here, read back from its files." in text
    assert f"* Number format: {told}." in text.split("## Limits")[1]
    assert "Number format" not in model_card(record)


def test_a_qlora_adapter_says_over_what_it_was_measured():
    plan = {"model_uri": "hf://owner/base", "method": "QLoRA", "save": "Adapter"}
    assert "measured over the base in 4 bits" in model_card(run_record(plan)).split("## Limits")[1]
    plan = {"model_uri": "hf://owner/base", "method": "LoRA", "save": "Adapter"}
    assert "4 bits" not in model_card(run_record(plan))


def test_results_settings_data_and_limits_are_told():
    text = model_card(run_record()).replace("\u202f", " ")
    assert "| accuracy | 34.8 % | 63.7 % | +28.9 points |" in table_of(text)
    assert "| `training.learningRate` | 2e-05 |" in table_of(text)
    assert "| torch | 2.13.0 |" in table_of(text)
    assert "| negative | 2 200 | 200 |" in table_of(text)
    assert "* 184 duplicates left out" in text
    limits = text.split("## Limits")[1]
    assert "Overfitting after step 40" in limits
    assert "128 tokens" in limits


def test_the_setting_that_decided_how_long_is_the_one_that_is_told():
    rows = table_of(model_card(run_record({"training": {"max_steps": 60}})))
    assert "| `training.maxSteps` | 60 |" in rows
    assert not [row for row in rows if "numTrainEpochs" in row]
    rows = table_of(model_card(run_record()))
    assert "| `training.numTrainEpochs` | 1 |" in rows
    assert not [row for row in rows if "maxSteps" in row]


def test_without_held_out_data_nothing_is_claimed():
    text = model_card(run_record(evaluations=()))
    assert "nothing was measured" in text
    assert "model-index" not in text


def test_labels_of_users_do_not_break_tables_or_metadata():
    classes = (ClassCount(label="a | b\n# c", train=3, held_out=1),)
    text = model_card(run_record(data=Data(train_examples=3, eval_examples=1, classes=classes)))
    assert "| a \\| b # c | 3 | 1 |" in table_of(text)
    assert ModelCard(text).data.library_name == "transformers"


def test_a_metric_that_is_not_finite_is_left_out_of_the_metadata():
    record = run_record(evaluations=evaluated((60, {"loss": float("nan"), "accuracy": 0.5})))
    found = ModelCard(model_card(record)).data.eval_results
    assert [result.metric_type for result in found] == ["accuracy"]


# ---- the code runs


def bert(head, **options):
    config = transformers.BertConfig(vocab_size=800, max_position_embeddings=64, pad_token_id=0, **SMALL, **options)
    return getattr(transformers, head)(config)


def llama(head, **options):
    config = transformers.LlamaConfig(
        vocab_size=800, pad_token_id=0, eos_token_id=3, bos_token_id=None, **SMALL, **options
    )
    return getattr(transformers, head)(config)


def t5():
    config = transformers.T5Config(
        vocab_size=800, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def vit():
    config = transformers.ViTConfig(image_size=32, patch_size=16, **SMALL, **NAMES)
    return transformers.ViTForImageClassification(config)


MODELS = {
    "ChatSFT": lambda: llama("LlamaForCausalLM"),
    "CausalLM": lambda: llama("LlamaForCausalLM"),
    "DPO": lambda: llama("LlamaForCausalLM"),
    "MaskedLM": lambda: bert("BertForMaskedLM"),
    "SequenceClassification": lambda: bert("BertForSequenceClassification", **NAMES),
    "TokenClassification": lambda: bert("BertForTokenClassification", **NAMES),
    "Seq2Seq": t5,
    "Reward": lambda: llama("LlamaForSequenceClassification", num_labels=1),
    "ImageClassification": vit,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a picture; the model goes into `sentiment` below it."""
    Image.new("L", (40, 30), 128).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save_processor(task, folder):
    if task == "ImageClassification":
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return
    tokenizer = word_pieces(folder)
    tokenizer.eos_token = "[SEP]"
    if task not in {"MaskedLM", "SequenceClassification", "TokenClassification"}:  # only BERT has types
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.chat_template = CHATML.replace("END_OF_TURN", "[SEP]")
    tokenizer.save_pretrained(folder)


def run_usage(card):
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    printed = StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card.py", "exec"), {})  # what a user would do
    return code, printed.getvalue()


@pytest.mark.parametrize("task", MODELS)
def test_the_code_of_the_card_loads_the_model_and_runs_it(task, place):
    torch.manual_seed(0)
    MODELS[task]().save_pretrained(place / "sentiment")
    save_processor(task, place / "sentiment")
    code, printed = run_usage(model_card(run_record({"task": task})))
    assert printed.strip()
    if task == "SequenceClassification":
        assert "down" in printed
        assert "up" in printed
    assert "pipeline" not in code


@pytest.mark.parametrize(("kind", "labels"), [("MultiLabel", 2), ("Regression", 1)])
def test_the_code_knows_what_a_classifiers_outputs_mean(kind, labels, place):
    torch.manual_seed(0)
    bert("BertForSequenceClassification", num_labels=labels).save_pretrained(place / "sentiment")
    save_processor("SequenceClassification", place / "sentiment")
    code, printed = run_usage(model_card(run_record({"classification": {"problemType": kind}})))
    assert ("sigmoid" in code) == (kind == "MultiLabel")
    assert printed.strip()


@pytest.mark.parametrize("uri", ["hf://owner/base", "s3://bucket/base"])
@pytest.mark.parametrize("task", MODELS)
def test_the_code_puts_an_adapter_onto_its_base(task, uri, place):
    torch.manual_seed(0)
    base = MODELS[task]()
    base.save_pretrained(place / (uri.removeprefix("hf://") if uri.startswith("hf") else "base"))
    made = training_plan(task=task, method="LoRA", save="Adapter", model_uri=uri)
    adapted = add_adapters(base, made, task_for(made))
    save_adapter(adapted, place / "sentiment", made)
    save_processor(task, place / "sentiment")
    classes = () if task == "Reward" else (ClassCount(label="down"), ClassCount(label="up"))
    plan = {"task": task, "method": "LoRA", "save": "Adapter", "model_uri": uri}
    code, printed = run_usage(model_card(run_record(plan, data=Data(train_examples=2, classes=classes))))
    assert "PeftModel.from_pretrained" in code
    assert ("# ./base is a copy of s3://bucket/base" in code) == uri.startswith("s3")
    assert printed.strip()
    assert task != "SequenceClassification" or "'down'" in printed


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_model_that_sees_is_given_a_picture(family, place):
    folder = getattr(tiny, family)(place / "sentiment")
    text = model_card(run_record({"task": "ChatSFT"}, pipeline_tag="image-text-to-text"))
    assert folder == place / "sentiment"
    code, printed = run_usage(text)
    assert "AutoModelForImageTextToText" in code
    assert printed
