"""In which format a model is written: what rounding takes of an update is measured, and decides."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from support.plans import training_plan
from tunesmith_trainer import methods
from tunesmith_trainer.loop.published import MOST_LOST, Format, choose_format, lost_share, release
from tunesmith_trainer.methods.pruning import remove_layers
from tunesmith_trainer.models.loading import load_pretrained
from tunesmith_trainer.models.numerics import Numerics
from tunesmith_trainer.tasks.causal_lm import CausalLM

SHORT, LONG, HALF = torch.bfloat16, torch.float32, torch.float16


def llama(layers=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=layers, tie_word_embeddings=True, **sizes))


def moved(model, part):
    """Move every weight by this part of its size, up or down."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += part * parameter.abs() * (torch.randint(2, parameter.shape, generator=generator) * 2 - 1)
    return model


@pytest.fixture
def base(tmp_path):
    """A folder of 16-bit weights, and a function that makes the model anew in float32."""
    llama().to(SHORT).save_pretrained(tmp_path)
    return tmp_path, lambda: LlamaForCausalLM.from_pretrained(tmp_path, dtype=LONG)


class Task(CausalLM):
    def load_model(self, folder, **options):
        return load_pretrained(AutoModelForCausalLM, folder, **options)


def chosen(folder, model, dtype="Auto", removed=(), **changes):
    plan = training_plan(task="CausalLM", output_dtype=dtype, **changes)
    return choose_format(model, plan, folder, Task(plan), removed)


def test_an_update_smaller_than_half_of_the_last_bit_is_all_lost(base):
    _, make = base
    # bfloat16 has 8 bits: neighbours are 2**-8 to 2**-7 of a weight apart
    assert lost_share(moved(make(), 2**-10), make(), SHORT) == pytest.approx(1, abs=1e-3)
    assert 0.2 < lost_share(moved(make(), 3 * 2**-10), make(), SHORT) < 0.95
    assert lost_share(moved(make(), 2**-2), make(), SHORT) < 0.01
    assert lost_share(moved(make(), 2**-10), make(), LONG) == 0
    assert lost_share(make(), make(), SHORT) == 0


def test_without_a_start_all_of_the_weights_are_the_update(base):
    _, make = base
    assert 0 < lost_share(moved(make(), 2**-10), None, SHORT) < 2**-8


def test_a_new_head_hides_nothing_of_the_rest(tmp_path):
    body = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=96, **body)).to(SHORT).save_pretrained(tmp_path)
    # the head is drawn anew each time
    model, start = (load_pretrained(AutoModelForSequenceClassification, tmp_path, dtype=kind) for kind in (LONG, SHORT))
    model.classifier.weight.data += 1
    assert lost_share(moved(model, 2**-10), start, SHORT) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("part", "dtype"), [(2**-10, LONG), (2**-2, SHORT)])
def test_auto_is_the_format_of_the_base_unless_rounding_takes_too_much(base, part, dtype):
    folder, make = base
    found = chosen(folder, moved(make(), part))
    assert found.dtype is dtype
    assert (found.lost <= MOST_LOST) == (dtype is SHORT)
    assert found.rounded is SHORT


def test_a_base_in_full_precision_is_written_so_and_nothing_is_lost(tmp_path):
    llama().save_pretrained(tmp_path)
    found = chosen(tmp_path, moved(llama(), 2**-10))
    assert (found.dtype, found.lost, found.rounding()) == (LONG, 0, "")


@pytest.mark.parametrize(("asked", "dtype", "lost"), [("BF16", SHORT, 1), ("FP32", LONG, 0), ("FP16", HALF, 0.13)])
def test_what_is_asked_for_is_obeyed_whatever_it_costs(base, asked, dtype, lost):
    folder, make = base
    found = chosen(folder, moved(make(), 2**-10), asked)
    assert found.dtype is dtype
    assert found.lost == pytest.approx(lost, abs=0.1)


def test_weights_beyond_the_range_of_half_precision_are_not_written_as_infinite(base):
    folder, make = base
    model = make()
    model.model.embed_tokens.weight.data[0, 0] = 1e5
    found = chosen(folder, model, "FP16")
    assert found.dtype is LONG
    assert "float32: rounding to float16 would take some weights altogether" in found.rounding()


def test_layers_that_were_removed_are_not_compared_with_others(tmp_path):
    llama(4).to(SHORT).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=LONG)
    remove_layers(model, [1])
    assert chosen(tmp_path, moved(model, 2**-10), removed=[1]).lost == pytest.approx(1, abs=1e-3)


def test_the_costs_are_told_in_percent():
    assert (
        Format(SHORT, SHORT, 0.021).rounding()
        == "the files hold bfloat16: rounding to it takes 2.1% of what training changed"
    )
    assert Format(LONG, SHORT, 0.94).rounding() == (
        "the files hold float32: rounding to bfloat16 would take 94.0% of what training changed (spec.output.dtype)"
    )
    assert math.isinf(Format(LONG, HALF, math.inf).lost)


def test_an_adapter_is_written_bit_for_bit_as_it_was_trained(tmp_path):
    plan = training_plan(method="LoRA", save="Adapter")
    model = methods.apply(llama().to(SHORT), plan, Numerics(torch.device("cpu")), Task(plan), list).model
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for value in trained.values():
        value.data.normal_()
    methods.save_adapter(model, tmp_path, plan)
    files = load_file(tmp_path / "adapter_model.safetensors")
    assert len(files) == len(trained)
    for name, value in trained.items():
        written = files[name.replace(".default", "")]
        assert written.dtype is LONG
        assert torch.equal(written, value)


def test_what_was_trained_gives_its_memory_back():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    release(model, optimizer, is_sharded=False)
    assert sum(value.untyped_storage().nbytes() for value in model.parameters()) == 0
    assert not optimizer.state
