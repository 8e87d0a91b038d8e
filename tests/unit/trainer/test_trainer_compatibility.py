"""What is published is read alike by transformers 5 and by 4.57, which knows other names of the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from assets import tiny
from tunesmith_trainer.loop.compatibility import save_model, save_processor

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "vocab_size": 260, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
FAR = {"rope_type": "default", "rope_theta": 1e6}
NEAR = {"rope_type": "default", "rope_theta": 5e3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
SCALING = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
LAYERS = {"full_attention": FAR, "sliding_attention": NEAR}
MODELS = [
    ("LlamaForCausalLM", FAR, {"rope_theta": 1e6}),
    ("LlamaForCausalLM", LLAMA3, {"rope_theta": 5e5, "rope_scaling": SCALING}),
    ("PhiForCausalLM", FAR | {"partial_rotary_factor": 0.5}, {"rope_theta": 1e6, "partial_rotary_factor": 0.5}),
    ("GPTNeoXForCausalLM", FAR | {"partial_rotary_factor": 0.25}, {"rotary_emb_base": 1e6, "rotary_pct": 0.25}),
    ("Gemma3ForCausalLM", LAYERS, {"rope_theta": 1e6, "rope_local_base_freq": 5e3}),
    ("ModernBertForMaskedLM", LAYERS, {"global_rope_theta": 1e6, "local_rope_theta": 5e3}),
]
OLDER = os.environ.get("TUNESMITH_TRANSFORMERS_4")
"""Folder of packages with transformers 4.57; `make transformers-4` makes it and runs these tests."""
READ = """
import sys, torch, transformers
from transformers import AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
torch.manual_seed(0)
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
inputs = AutoTokenizer.from_pretrained(sys.argv[1])("far <|im_end|> and near " * 9, return_tensors="pt")
with torch.no_grad():
    torch.save((dict(inputs), model(**inputs).logits), sys.argv[1] + "/read")
"""


def tiny_model(name, positions):
    import torch
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if name.startswith("Gemma3") else {}
    return kind(kind.config_class(**SIZES, **kinds, rope_parameters=positions)).eval()


@pytest.fixture(params=MODELS, ids=lambda it: f"{it[0]}-{it[1].get('rope_type', 'layers')}")
def written(request, tmp_path):
    name, positions, older = request.param
    model = tiny_model(name, positions)
    save_model(model, tmp_path)
    save_processor(tiny.byte_tokenizer(), tmp_path)
    return model, older, tmp_path


def test_positions_are_said_under_both_names_and_read_back_alike(written):
    model, older, folder = written
    config = json.loads((folder / "config.json").read_text())
    assert {name: config.get(name) for name in older} == older
    assert config["torch_dtype"] == config["dtype"] == "float32"
    again = type(model).from_pretrained(folder).config
    assert again.rope_parameters == model.config.rope_parameters


def test_a_plain_tokenizer_has_the_name_that_all_know(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny.byte_tokenizer()
    save_processor(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_end|>"]
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    assert "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.extra_special_tokens == ["<|im_end|>"]
    assert again("a <|im_end|>")["input_ids"] == tokenizer("a <|im_end|>")["input_ids"]


def test_parts_of_a_model_that_sees_are_told_as_well(tmp_path):
    tiny.llava(tmp_path / "made")
    from transformers import AutoModelForImageTextToText

    save_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "made"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == config["text_config"]["rope_parameters"]["rope_theta"]


@pytest.mark.skipif(not OLDER, reason="needs transformers 4.57: make transformers-4")
def test_transformers_4_computes_the_same(written):
    import torch

    model, _, folder = written
    environment = os.environ | {"PYTHONPATH": OLDER}
    subprocess.run([sys.executable, "-c", READ, str(folder), type(model).__name__], env=environment, check=True)
    inputs, logits = torch.load(Path(folder, "read"))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist()[0] == tiny.byte_tokenizer()("far <|im_end|> and near " * 9)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
