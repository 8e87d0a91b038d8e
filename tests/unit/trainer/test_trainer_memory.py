"""The memory estimate: what is counted is exact where it can be, and moves the right way where it can't."""

import sys

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from support.plans import training_plan
from tunesmith_api.v1alpha1.training import Strategy
from tunesmith_trainer.methods.adapters import add_adapters
from tunesmith_trainer.models.files import ModelFacts
from tunesmith_trainer.models.memory import RUNTIME, estimate

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}


def models():
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, **SIZES)),
        "tied": LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, tie_word_embeddings=True, **SIZES)),
        "bert": BertForSequenceClassification(BertConfig(vocab_size=96, **SIZES)),
        "vit": ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SIZES)),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=96, d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=3)
        ),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, model in models().items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", ["llama", "tied", "bert", "vit", "t5"])
def test_parameters_are_those_that_the_model_has(folders, name):
    facts = ModelFacts.of(folders[name])
    assert facts.parameters == sum(parameter.numel() for parameter in models()[name].parameters())
    assert facts.layers == (6 if name == "t5" else 3)
    assert facts.is_gated == (name in ("llama", "tied"))


def test_without_weights_the_config_must_do(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    real, guessed = ModelFacts.of(folders["llama"]), ModelFacts.of(tmp_path)
    assert guessed.parameters == pytest.approx(real.parameters, rel=0.01)  # norms are left out
    assert sum(m.size for m in guessed.matrices) == sum(m.size for m in real.matrices)


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]])
def test_trained_adapters_are_counted_to_the_last(folders, method, targets):
    plan = training_plan(method={"type": method, "lora": {"r": 4, "targetModules": targets}})
    model = add_adapters(models()["llama"], plan, type("Task", (), {"head_modules": lambda self, model: ()})())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = estimate(ModelFacts.of(folders["llama"]), plan, 4)
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    assert found.weights == 4 * sum(parameter.numel() for parameter in model.parameters())


def found(folders, name="llama", width=4, strategy=Strategy.DDP, **changes):
    return estimate(ModelFacts.of(folders[name]), training_plan(**changes), width, strategy)


def test_full_training_holds_everything_four_times_and_replicas_all_of_it(folders):
    facts = ModelFacts.of(folders["llama"])
    one = found(folders)
    assert (one.weights, one.gradients, one.optimizer) == tuple(facts.parameters * size for size in (4, 4, 8))
    assert found(folders, replicas=4).optimizer == one.optimizer
    assert one.total == one.weights + one.gradients + one.optimizer + one.activations + one.logits + RUNTIME


def test_optimizers_differ_in_what_they_hold(folders):
    full = found(folders).optimizer
    assert found(folders, training={"optim": "adamw_8bit"}).optimizer == full // 4
    assert found(folders, training={"optim": "sgd"}).optimizer == full // 2
    assert found(folders, training={"optim": "sgd", "adam_beta1": 0.0}).optimizer == 0


def test_sharing_out_divides_state_and_not_activations(folders):
    one, four = found(folders), found(folders, replicas=4, strategy=Strategy.FSDP, training={"micro_batch_size": 2})
    assert four.optimizer == one.optimizer // 4
    assert four.gradients == one.gradients // 4
    assert four.weights < one.weights
    assert four.activations == one.activations


@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.FSDP])
def test_the_processes_of_a_worker_count_as_workers_of_one_do(folders, strategy):
    changes = {"strategy": strategy, "training": {"micro_batch_size": 8}}
    two_of_two = found(folders, replicas=2, processes_per_worker=2, **changes)
    assert two_of_two == found(folders, replicas=4, **changes)
    assert two_of_two.total < found(folders, replicas=2, **changes).total


def test_hybrid_shares_are_those_of_one_worker(folders):
    hybrid = found(folders, replicas=4, processes_per_worker=2, strategy=Strategy.HSDP)
    worker = found(folders, replicas=1, processes_per_worker=2, strategy=Strategy.FSDP)
    assert (hybrid.weights, hybrid.gradients, hybrid.optimizer) == (worker.weights, worker.gradients, worker.optimizer)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing_and_precision(folders):
    one = found(folders, training={"micro_batch_size": 2})
    assert found(folders, training={"micro_batch_size": 4}).activations == 2 * one.activations
    assert found(folders, training={"micro_batch_size": 2, "max_length": 32}).activations == one.activations // 2
    assert found(folders, width=2, training={"micro_batch_size": 2}).activations < one.activations
    assert (
        found(folders, training={"micro_batch_size": 2, "gradient_checkpointing": True}).activations
        < 0.6 * one.activations
    )


def test_a_share_smaller_than_the_micro_batch_bounds_it(folders):
    small = found(folders, replicas=8, training={"micro_batch_size": 8, "global_batch_size": 8})
    assert small.activations == found(folders, training={"micro_batch_size": 1}).activations


def test_a_quantized_base_is_a_fraction_of_a_whole_one(folders):
    facts = ModelFacts.of(folders["llama"])
    matrices = sum(matrix.size for matrix in facts.matrices)
    saved = found(folders, method="LoRA").weights - found(folders, method="QLoRA").weights
    assert saved == pytest.approx(matrices * (4 - 0.5), rel=0.02)


def test_a_quantized_base_is_shared_out_but_for_its_constants(folders):
    facts = ModelFacts.of(folders["llama"])
    matrices = sum(matrix.size for matrix in facts.matrices)
    gathered = 4 * (facts.vocabulary * facts.hidden + matrices // facts.layers)

    def weights(double, **changes):
        method = {"type": "QLoRA", "quantizedBase": {"useDoubleQuant": double}}
        return found(folders, method=method, **changes).weights

    for double, constants in ((False, matrices * 4 / 64), (True, matrices * (1 + 4 / 256) / 64)):
        shares = weights(double, replicas=4, strategy=Strategy.FSDP)
        assert shares == pytest.approx((weights(double) - constants) / 4 + constants + gathered, abs=2)


def test_classifiers_have_no_logits_worth_counting(folders):
    assert found(folders, "bert", task="SequenceClassification").logits == 0
    assert found(folders).logits == 2 * 64 * 96 * 12


def test_images_are_as_long_as_their_patches(folders):
    short = found(folders, "vit", task="ImageClassification", training={"max_length": 8})
    assert (
        short.activations == found(folders, "vit", task="ImageClassification", training={"max_length": 512}).activations
    )


def test_it_reads_like_a_sentence(folders):
    assert str(found(folders)).startswith("about 70")
    assert "weights" in str(found(folders))


def test_it_needs_no_torch():
    import subprocess

    code = "import sys, tunesmith_trainer.models.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
