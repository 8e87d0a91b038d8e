"""Loading models and deciding in what format they compute."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from support.plans import training_plan
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.training import Precision
from tunesmith_store.errors import UserError
from tunesmith_trainer.methods.adapters import add_adapters
from tunesmith_trainer.models.loading import from_config, load_options, load_pretrained, new_modules, stored_dtype
from tunesmith_trainer.models.numerics import Numerics
from tunesmith_trainer.models.structure import apply_dropout, enable_gradient_checkpointing, transformer_blocks
from tunesmith_trainer.models.tokenizers import load_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(24).view(2, 12) % 96


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, **(sizes | changes)))


# ---- numerics


def test_auto_is_full_precision_on_a_cpu():
    numerics = Numerics.choose(Precision.AUTO, 0)
    assert (numerics.device, numerics.name, numerics.autocast(), numerics.scaler()) == (CPU, "fp32", None, None)


def test_bf16_computes_short_and_keeps_trained_weights_long():
    numerics = Numerics.choose(Precision.BF16, 0)
    with numerics.autocast():
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype is torch.bfloat16
    assert numerics.weights_dtype(MethodType.FULL, torch.bfloat16) is torch.float32
    assert numerics.weights_dtype(MethodType.LORA, torch.bfloat16) is torch.bfloat16
    # a float16 base would lose digits in bfloat16
    assert numerics.weights_dtype(MethodType.LORA, torch.float16) is torch.float32


def test_fp16_is_refused_without_a_gpu():
    with pytest.raises(UserError, match=r"spec\.training\.precision FP16 needs a GPU") as caught:
        Numerics.choose(Precision.FP16, 0)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_fp16_scales_gradients():
    numerics = Numerics(CPU, Precision.FP16)
    assert numerics.scaler().is_enabled()
    assert numerics.bytes_per_activation == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"spec\.workers\.gpusPerWorker"):
        Numerics.choose(Precision.AUTO, 1)


def test_what_was_used_grows_with_what_is_held():
    before = Numerics(CPU).used_bytes()
    held = torch.ones(64 << 18)  # 64 MiB
    assert Numerics(CPU).used_bytes() >= before
    assert Numerics(CPU).used_bytes() > held.nbytes


# ---- loading


@pytest.mark.parametrize(
    ("config", "kind"),
    [({"dtype": "bfloat16"}, torch.bfloat16), ({"torch_dtype": "float16"}, torch.float16), ({}, torch.float32)],
)
def test_without_weights_the_configuration_says_their_format(tmp_path, config, kind):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(tmp_path) is kind


def test_weights_are_loaded_in_the_format_asked_for_and_stay_what_they_were(tmp_path):
    original = llama().to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) is torch.bfloat16
    plan = training_plan()
    model = load_pretrained(AutoModelForCausalLM, tmp_path, **load_options(plan, Numerics(CPU), torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight.float())
    assert not model.config.use_cache
    assert new_modules(model) == ()


def test_a_new_head_is_known_as_new(tmp_path):
    llama().save_pretrained(tmp_path)
    model = load_pretrained(AutoModelForSequenceClassification, tmp_path, num_labels=3, dtype=torch.float32)
    assert new_modules(model) == ("score",)


def test_a_head_of_other_classes_is_new_too(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 96,
    }
    model = AutoModelForSequenceClassification.from_config(BertConfig(num_labels=2, **sizes))
    model.save_pretrained(tmp_path)
    again = load_pretrained(
        AutoModelForSequenceClassification, tmp_path, num_labels=5, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    assert new_modules(again) == ("classifier",)


def test_a_folder_that_is_no_model_is_the_users_fault(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"spec\.model\.uri: the model can't be loaded") as caught:
        load_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    assert caught.value.reason is Reason.MODEL_INVALID


def test_random_weights_are_a_function_of_the_seed_alone(tmp_path):
    llama().save_pretrained(tmp_path)
    drawn = []
    for seed in (1, 1, 2):
        torch.rand(seed + len(drawn))  # what was drawn before doesn't matter
        drawn.append(from_config(AutoModelForCausalLM, tmp_path, seed, torch.float32))
    weights = [model.lm_head.weight for model in drawn]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], llama().lm_head.weight)
    assert "model.layers.0.mlp.up_proj" in new_modules(drawn[0])


def test_a_config_nobody_knows_is_the_users_fault(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(UserError, match=r"spec\.model\.uri: config\.json is no good"):
        from_config(AutoModelForCausalLM, tmp_path, 0, torch.float32)


def test_only_chat_needs_a_template(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, chat=False).chat_template is None
    assert load_tokenizer(tmp_path).chat_template


# ---- dropout and checkpointing


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def bert():
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 96,
    }
    return BertForMaskedLM(BertConfig(**sizes))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=2, decoder_start_token_id=0)
    )


def outputs_differ(model):
    torch.manual_seed(1)
    extra = {"labels": IDS} if isinstance(model, T5ForConditionalGeneration) else {}
    with torch.no_grad():
        return not torch.equal(model(input_ids=IDS, **extra).logits, model(input_ids=IDS, **extra).logits)


@pytest.mark.parametrize("make", [gpt2, bert, t5])
def test_dropout_0_turns_all_of_it_off(make):
    model = make().train()
    assert outputs_differ(model)
    apply_dropout(model, 0.0)
    assert not outputs_differ(model)


def test_dropout_reaches_what_attention_reads_as_a_number():
    model = llama().train()
    assert not outputs_differ(model)
    apply_dropout(model, 0.5)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    assert outputs_differ(model)


def saved_bytes(model):
    total = 0

    def keep(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=IDS, use_cache=False)
    return total


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(method):
    found = []
    for checkpointed in (False, True):
        model = llama()
        if checkpointed:
            enable_gradient_checkpointing(model)
        if method == "LoRA":
            plan = training_plan(method="LoRA")
            model = add_adapters(model, plan, type("Task", (), {"head_modules": lambda self, model: ()})())
        model.train()
        size = saved_bytes(model)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append((size, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    assert found[1][0] < 0.4 * found[0][0]
    assert any(float(gradient.abs().sum()) > 0 for gradient in found[1][1].values())
    for name, gradient in found[0][1].items():
        assert torch.allclose(found[1][1][name], gradient, atol=1e-6), name


def test_blocks_are_the_layers_of_all_stacks():
    assert len(transformer_blocks(llama())) == 2
    assert len(transformer_blocks(t5())) == 4
    plain = nn.Sequential(nn.ModuleList([nn.Linear(1, 1) for _ in range(3)]))
    assert len(transformer_blocks(plain)) == 3
