"""The memory estimate: what is counted is exact where it can be, and moves the right way where it can't."""

import subprocess
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
from tunesmith_api.memory.estimate import BITSANDBYTES, CUDA_BUILD, GPU_RUNTIME, RUNTIME, activation_bytes, estimate
from tunesmith_api.v1alpha1.training import Strategy
from tunesmith_trainer.methods.adapters import add_adapters
from tunesmith_trainer.models.files import facts_of

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
    facts = facts_of(folders[name])
    assert facts.parameters == sum(parameter.numel() for parameter in models()[name].parameters())
    assert facts.layers == (6 if name == "t5" else 3)
    assert facts.is_gated == (name in ("llama", "tied"))


def test_without_weights_the_config_must_do(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["llama"] / "config.json").read_bytes())
    real, guessed = facts_of(folders["llama"]), facts_of(tmp_path)
    assert guessed.parameters == pytest.approx(real.parameters, rel=0.01)  # norms are left out
    assert sum(m.size for m in guessed.matrices) == sum(m.size for m in real.matrices)


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]])
def test_trained_adapters_are_counted_to_the_last(folders, method, targets):
    plan = training_plan(method={"type": method, "lora": {"r": 4, "targetModules": targets}})
    model = add_adapters(models()["llama"], plan, type("Task", (), {"head_modules": lambda self, model: ()})())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    found = estimate(facts_of(folders["llama"]), plan, 4)
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    assert found.weights == 4 * sum(parameter.numel() for parameter in model.parameters())


def found(folders, name="llama", width=4, strategy=Strategy.DDP, **changes):
    return estimate(facts_of(folders[name]), training_plan(**changes), width, strategy)


def test_full_training_holds_everything_four_times_and_replicas_all_of_it(folders):
    facts = facts_of(folders["llama"])
    one = found(folders)
    assert (one.weights, one.gradients, one.optimizer) == tuple(facts.parameters * size for size in (4, 4, 8))
    assert found(folders, replicas=4).optimizer == one.optimizer
    parts = one.weights + one.gradients + one.optimizer + one.activations + one.logits + one.transient + RUNTIME
    assert one.total == one.step == parts


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


@pytest.mark.parametrize(("gpus", "more"), [(0, CUDA_BUILD), (1, 0)])
def test_a_build_of_torch_for_gpus_takes_more_of_a_cpus_memory(folders, gpus, more):
    facts, plan = facts_of(folders["llama"]), training_plan(gpus_per_worker=gpus)
    bare, built = (estimate(facts, plan, 4, cuda_build=cuda_build) for cuda_build in (False, True))
    assert (built.step - bare.step, built.saving - bare.saving) == (more, more)


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
    facts = facts_of(folders["llama"])
    matrices = sum(matrix.size for matrix in facts.matrices)
    saved = found(folders, method="LoRA").weights - found(folders, method="QLoRA").weights
    assert saved == pytest.approx(matrices * (4 - 0.5), rel=0.02)


def test_a_quantized_base_is_shared_out_but_for_its_constants(folders):
    facts = facts_of(folders["llama"])
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
    assert str(found(folders)).startswith("about 44")
    assert "weights" in str(found(folders))


def test_it_needs_no_torch():
    code = "import sys, tunesmith_api.memory.remedies, tunesmith_trainer.models.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- what a step holds beside the weights ---


def test_short_numbers_are_kept_beside_the_weights_that_they_are_made_of(folders):
    facts = facts_of(folders["llama"])
    matrices = sum(matrix.size for matrix in facts.matrices)
    long, short = found(folders), found(folders, width=2)
    assert short.weights - long.weights == 2 * matrices
    again = {"training": {"gradient_checkpointing": True}}
    assert found(folders, width=2, **again).weights == short.weights, "autocast keeps those of trained weights"
    frozen = found(folders, method="LoRA", width=2).weights - found(folders, method="LoRA").weights
    assert frozen == 2 * matrices
    assert found(folders, method="LoRA", width=2, **again).weights == found(folders, method="LoRA").weights


def test_a_frozen_base_of_16_bits_stays_so_where_16_bits_are_computed_with(tmp_path):
    models()["llama"].bfloat16().save_pretrained(tmp_path)
    facts = facts_of(tmp_path)
    matrices = sum(matrix.size for matrix in facts.matrices)
    for method, saved in (("LoRA", facts.parameters), ("QLoRA", facts.parameters - matrices)):
        plan = training_plan(method=method)
        assert estimate(facts, plan, 4).weights - estimate(facts, plan, 2).weights == 2 * saved


def test_dropout_costs_a_mask_and_on_a_cpu_the_attention_too(folders):
    none = found(folders, "bert", task="SequenceClassification", training={"dropout": 0.0})
    some = found(folders, "bert", task="SequenceClassification", training={"dropout": 0.1})
    assert found(folders, "bert", task="SequenceClassification").activations == some.activations, "its config's own"
    tokens, layers, heads = 2 * 64, 3, 4
    per_token = 2 * 64 * 4 + 4 * (3 * heads * 64 + 2 * 64)
    assert some.activations - none.activations == tokens * layers * per_token
    on_gpu = [
        found(folders, "bert", 4, task="SequenceClassification", gpus_per_worker=1, training={"dropout": value}).activations
        for value in (0.0, 0.1)
    ]  # fmt: skip
    assert on_gpu[1] - on_gpu[0] == tokens * layers * 2 * 64


def test_adapters_keep_less_of_norms_and_more_with_dropout(folders):
    plain = found(folders, method="LoRA").activations
    assert plain < found(folders).activations
    dropped = found(folders, method={"type": "LoRA", "lora": {"r": 4, "alpha": 8, "dropout": 0.1}}).activations
    columns = sum(matrix.columns for matrix in facts_of(folders["llama"]).matrices)
    assert dropped - plain == 2 * 64 * columns * 2 * 4


def test_a_head_that_is_the_embeddings_has_its_gradient_wait_for_theirs(folders):
    short = {"training": {"max_length": 2, "micro_batch_size": 1, "gradient_checkpointing": True}}
    tied, own = (found(folders, name, **short) for name in ("tied", "llama"))
    assert tied.transient > own.transient > 0
    frozen = found(folders, "tied", method="LoRA", **short)
    assert frozen.transient == (frozen.activations + frozen.gradients) // 2, "frozen ends have no gradient"


def test_a_teacher_is_held_whole_and_its_answers_are_compared(folders):
    plan = training_plan(method={"type": "Full", "distillation": {"teacherUri": "s3://models/teacher"}})
    student, teacher = facts_of(folders["llama"]), facts_of(folders["tied"])
    with_one = estimate(student, plan, 4, teacher=teacher)
    assert with_one.teacher == 4 * teacher.parameters + 2 * 64 * 96 * 4 * 5
    assert with_one.step - estimate(student, plan, 4).step == with_one.teacher


def test_guesses_of_masked_tokens_take_less_than_a_distribution_for_each(folders):
    masked = found(folders, "bert", task="MaskedLM").logits
    assert masked == int(2 * 64 * 96 * (4 + 0.15 * 12))


def test_a_classifier_loads_no_head_of_words(folders):
    facts = facts_of(folders["llama"])
    assert facts.head_parameters == 96 * 64
    assert not facts.is_tied
    assert facts_of(folders["tied"]).is_tied
    assert found(folders, task="SequenceClassification").weights == 4 * (facts.parameters - 96 * 64)


# --- the end ---


def test_a_model_of_4_bits_is_merged_into_a_whole_one_beside_it(folders):
    facts = facts_of(folders["llama"])
    merged = found(folders, method="QLoRA")
    assert merged.saving == merged.weights + merged.optimizer + 4 * facts.parameters + RUNTIME + BITSANDBYTES
    adapter = found(folders, method="QLoRA", save="Adapter")
    assert adapter.saving == adapter.weights + adapter.optimizer + RUNTIME + BITSANDBYTES
    on_gpu = found(folders, method="QLoRA", gpus_per_worker=1)
    assert on_gpu.saving == on_gpu.weights + on_gpu.optimizer + GPU_RUNTIME, "it is merged on the host"


def test_adapters_are_merged_into_float32(tmp_path):
    models()["llama"].bfloat16().save_pretrained(tmp_path)
    facts, plan = facts_of(tmp_path), training_plan(method="LoRA", gpus_per_worker=1)
    short = estimate(facts, plan, 2)
    assert short.saving == short.weights + short.optimizer + 2 * facts.parameters + GPU_RUNTIME


def test_precision_auto_is_short_on_gpus():
    for precision, gpus, width in (("Auto", 0, 4), ("Auto", 1, 2), ("FP32", 1, 4), ("BF16", 0, 2), ("FP16", 1, 2)):
        assert activation_bytes(training_plan(gpus_per_worker=gpus, training={"precision": precision})) == width
