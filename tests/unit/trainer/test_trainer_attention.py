"""Packed examples never see each other, and give what they give alone."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen3Config

from tunesmith_trainer.models.attention import Layout, packed_implementation, packs_exactly

CPU = torch.device("cpu")
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def causal(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def llama():
    return causal(LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64))


def packed_logits(model, examples):
    with packed_implementation(model, True), torch.no_grad():
        return model(
            input_ids=torch.tensor([token for example in examples for token in example])[None],
            position_ids=torch.cat([torch.arange(len(example)) for example in examples])[None],
            packed=Layout.of([len(example) for example in examples], CPU),
            use_cache=False,
        ).logits[0]


examples = st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=examples)
def test_packed_examples_give_what_they_give_alone(llama, rows):
    together = packed_logits(llama, rows)
    with torch.no_grad():
        alone = torch.cat([llama(input_ids=torch.tensor(row)[None], use_cache=False).logits[0] for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=examples, data=st.data())
def test_changing_one_example_changes_no_other(llama, rows, data):
    changed = data.draw(st.integers(0, len(rows) - 1))
    other = [list(row) for row in rows]
    other[changed] = [(token + 1) % 97 for token in other[changed]]
    before, after = packed_logits(llama, rows), packed_logits(llama, other)
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
    assert torch.equal(before[owner != changed], after[owner != changed])
    assert not torch.allclose(before[owner == changed], after[owner == changed])


def test_gradients_through_packing_equal_those_of_single_examples(llama):
    rows = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    with packed_implementation(llama, True):
        logits = llama(
            input_ids=torch.tensor([token for row in rows for token in row])[None],
            position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
            packed=Layout.of([len(row) for row in rows], CPU),
            use_cache=False,
        ).logits
    logits.square().sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}
    llama.zero_grad()
    for row in rows:
        llama(input_ids=torch.tensor(row)[None], use_cache=False).logits.square().sum().backward()
    for name, parameter in llama.named_parameters():
        assert torch.allclose(together[name], parameter.grad, rtol=1e-4, atol=1e-5), name
    llama.zero_grad()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, num_key_value_heads=4),
        Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4),
    ],
    ids=lambda config: config.model_type,
)
def test_models_with_plain_or_windowed_attention_can_be_packed(config):
    assert packs_exactly(causal(config))


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
        Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.05, sliding_window=8),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_carry_state_or_cap_attention_are_found_out(config):
    assert not packs_exactly(causal(config))


def test_the_implementation_is_put_back(llama):
    before = llama.config._attn_implementation
    with packed_implementation(llama, True):
        assert llama.config._attn_implementation != before
    assert llama.config._attn_implementation == before
