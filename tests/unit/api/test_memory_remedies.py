"""What to change where memory doesn't do: arithmetic on sizes, no model."""

import pytest

from support.plans import training_plan
from tunesmith_api.memory.estimate import estimate
from tunesmith_api.memory.facts import ModelFacts
from tunesmith_api.memory.headers import StoredTensor
from tunesmith_api.memory.placement import Capacity, Models, enough_host, need_of
from tunesmith_api.memory.remedies import remedies
from tunesmith_api.v1alpha1.training import Strategy

GIB = 1 << 30
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
}  # fmt: skip
MODELS = Models(ModelFacts.of(LLAMA_8B, []))
TRAINING = {"max_length": 2048, "micro_batch_size": 8, "global_batch_size": 64, "precision": "Auto"}


def plan(method="LoRA", **changes):
    training = TRAINING | changes.pop("training", {})
    return training_plan(method=method, gpus_per_worker=1, training=training, **changes)


def changes(given, capacity):
    def fits(changed):
        return need_of(MODELS, changed, capacity).fits(capacity) is True

    assert not fits(given)
    found = remedies(given, fits)
    assert all(fits(remedy.plan) for remedy in found), "each is enough by itself"
    return [remedy.changes for remedy in found]


def test_sizes_follow_from_config_alone():
    facts = MODELS.student
    assert facts.parameters == pytest.approx(8.03e9, rel=0.01)
    assert (facts.stored_bytes, facts.is_measured, facts.is_tied) == (2, False, False)
    assert facts.head_parameters == 128256 * 4096


def test_headers_count_more_than_config():
    tensors = [
        StoredTensor("model.embed_tokens.weight", "BF16", (10, 4)),
        StoredTensor("lm_head.weight", "BF16", (10, 4)),
    ]
    facts = ModelFacts.of(LLAMA_8B | {"tie_word_embeddings": True, "vocab_size": 10, "hidden_size": 4}, tensors)
    assert (facts.parameters, facts.head_parameters, facts.is_tied, facts.is_measured) == (80, 40, False, True)


def test_fewer_examples_at_a_time_come_first_and_leave_the_result_alone():
    first, *_ = changes(plan(), Capacity(64 * GIB, 80 * GIB))
    assert set(first) <= {"training.microBatchSize", "training.gradientCheckpointing"}
    assert first.get("training.microBatchSize", 8) < 8


def test_the_largest_micro_batch_that_fits_is_named():
    capacity = Capacity(64 * GIB, 80 * GIB)
    size = changes(plan(), capacity)[0]["training.microBatchSize"]
    bigger = plan(training={"micro_batch_size": 2 * size})
    assert need_of(MODELS, bigger, capacity).fits(capacity) is False


def test_all_weights_on_a_small_gpu_need_other_workers_or_another_method():
    found = changes(plan("Full", training={"micro_batch_size": 1}), Capacity(256 * GIB, 80 * GIB))
    assert any("workers.replicas" in change for change in found)
    assert found[-1]["method.type"] in ("LoRA", "QLoRA")
    assert not any(set(change) <= {"training.microBatchSize"} for change in found), "one example is one"


def test_where_nothing_helps_nothing_is_named():
    assert changes(plan(), Capacity(64 * GIB, 1 * GIB)) == []


def test_settings_that_can_not_be_combined_are_not_named():
    pruned = plan({"type": "Full", "pruning": {}}, training={"micro_batch_size": 1})
    assert all("method.type" not in change for change in changes(pruned, Capacity(256 * GIB, 24 * GIB)))


def test_a_copy_for_each_worker_is_shared_out_where_that_is_enough():
    given = plan("Full", replicas=8, strategy="DDP", training={"micro_batch_size": 1})
    found = changes(given, Capacity(512 * GIB, 80 * GIB))
    assert {"parallelism.strategy": Strategy.FSDP} in found


def test_a_copy_for_each_worker_of_several_gpus_is_shared_out_over_all_of_them_where_that_is_enough():
    training = TRAINING | {"micro_batch_size": 1}
    given = training_plan(
        method="Full", gpus_per_worker=2, processes_per_worker=2, replicas=8, strategy="HSDP", training=training
    )
    found = changes(given, Capacity(512 * GIB, 80 * GIB))
    assert {"parallelism.strategy": Strategy.FSDP} in found
    more = changes(given.model_copy(update={"replicas": 2}), Capacity(512 * GIB, 40 * GIB))
    assert {"parallelism.strategy": Strategy.FSDP, "workers.replicas": 4} in more, "more copies take no less"


def test_a_gpu_whose_memory_is_not_known_leaves_it_open():
    assert need_of(MODELS, plan(), Capacity(64 * GIB)).fits(Capacity(64 * GIB)) is None
    assert need_of(MODELS, plan(), Capacity(1 * GIB)).fits(Capacity(1 * GIB)) is False, "the host's is known"


def test_a_merge_below_4_bits_needs_the_host_for_a_whole_model():
    given = plan("QLoRA", training={"micro_batch_size": 1})
    need = need_of(MODELS, given, Capacity(16 * GIB, 80 * GIB))
    assert need.host > 4 * MODELS.student.parameters
    assert need_of(MODELS, plan("QLoRA", save="Adapter"), Capacity(16 * GIB, 80 * GIB)).host < 8 * GIB


def test_processes_on_cpus_share_the_memory_of_their_pod_and_one_of_them_writes_the_model():
    given = training_plan(method="QLoRA", training=TRAINING | {"micro_batch_size": 1})
    need = need_of(MODELS, given, Capacity(64 * GIB))
    assert need.host == max(need.process.step, need.process.saving) + (600 << 20)
    assert need.process == estimate(MODELS.student, given, 4, cuda_build=True)


@pytest.mark.parametrize("workers", [1, 4])
def test_enough_memory_is_enough(workers):
    given = training_plan(method="Full", replicas=workers, training=TRAINING)
    size = enough_host(MODELS, given, Capacity(1 * GIB))
    assert need_of(MODELS, given, Capacity(size)).fits(Capacity(size))
