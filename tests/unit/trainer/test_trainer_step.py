"""The loss and its gradient: by hand, however the batch is cut, padded or packed."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from support.plans import training_plan
from tunesmith_trainer.data.order import micro_batches
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.loop.evaluation import evaluate
from tunesmith_trainer.loop.step import clipped_norm, compute_gradients, take_step
from tunesmith_trainer.models.attention import packed_implementation
from tunesmith_trainer.tasks.base import IGNORE, Example
from tunesmith_trainer.tasks.causal_lm import ChatSFT, keeps_logits

CPU = torch.device("cpu")


class Alone:
    """One process: what `parallel.wrap` makes of a model without peers."""

    dp_size = 1

    def __init__(self, module):
        self.module = module

    def sync(self, last):
        return nullcontext()

    def clip_grad_norm(self, max_norm):
        return float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm))


def example(*tokens, spoken):
    labels = [token if number in spoken else IGNORE for number, token in enumerate(tokens)]
    units = float(sum(label != IGNORE for label in labels[1:]))
    return Example({"input_ids": list(tokens), "labels": labels}, len(tokens), units)


EXAMPLES = [
    example(1, 2, 3, 4, spoken={2, 3}),
    example(5, 6, spoken={1}),
    example(7, 8, 9, 1, 2, spoken={3}),
    example(3, 3, 3, spoken={0, 1, 2}),
    example(9, 8, 7, spoken={2}),
]
UNITS = sum(item.units for item in EXAMPLES)


def llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def task(tokenizer):
    found = ChatSFT(training_plan())
    found.processor = tokenizer
    found._keep = True
    return found


def by_hand(model, smoothing=0.0):
    total = 0
    for item in EXAMPLES:
        logits = model(torch.tensor([item.features["input_ids"]])).logits[0]
        for position, label in enumerate(item.features["labels"][1:]):
            if label != IGNORE:
                likelihoods = functional.log_softmax(logits[position], -1)
                total = total - (1 - smoothing) * likelihoods[label] - smoothing * likelihoods.mean()
    return total / UNITS


def gradients(task, parts, packed, model=None):
    model = llama() if model is None else model
    with packed_implementation(model, packed):
        batches = [task.collate(part, CPU, packed) for part in parts]
        found = compute_gradients(Alone(model), batches, task.loss, global_units=UNITS)
    return model, found


def flat(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_loss_and_gradient_are_those_of_the_mean_over_the_assistants_tokens(task, packed, keep):
    task._keep = keep
    expected = llama()
    loss = by_hand(expected)
    loss.backward()
    model, found = gradients(task, [EXAMPLES], packed)
    assert found.loss_sum / UNITS == pytest.approx(loss.item(), abs=1e-5)
    assert torch.allclose(flat(model), flat(expected), atol=1e-5)


def test_label_smoothing_is_torchs(task):
    task.plan = training_plan(training={"label_smoothing_factor": 0.2})
    _, found = gradients(task, [EXAMPLES], packed=True)
    assert found.loss_sum / UNITS == pytest.approx(by_hand(llama(), 0.2).item(), abs=1e-5)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(size=st.integers(1, 4), longest=st.integers(5, 12), order=st.permutations(EXAMPLES), packed=st.booleans())
def test_however_the_batch_is_cut_the_gradient_is_the_same(task, size, longest, order, packed):
    whole, _ = gradients(task, [EXAMPLES], packed=False)
    parts, _ = gradients(task, micro_batches(order, size, longest, packed), packed)
    assert torch.allclose(flat(whole), flat(parts), atol=1e-5)


def test_a_micro_batch_without_targets_is_harmless(task):
    expected, _ = gradients(task, [EXAMPLES], packed=True)
    model, found = gradients(task, [EXAMPLES, [example(4, 5, 6, spoken=set())]], packed=True)
    assert torch.allclose(flat(model), flat(expected), atol=1e-6)
    assert math.isfinite(found.loss_sum)


def test_batches_that_only_keep_other_ranks_company_count_for_nothing(task):
    expected, alone = gradients(task, [EXAMPLES], packed=True)
    model = llama()
    with packed_implementation(model, True):
        batches = [task.collate(part, CPU, True) for part in (EXAMPLES, EXAMPLES[:2], EXAMPLES[1:])]
        found = compute_gradients(Alone(model), batches, task.loss, global_units=UNITS, idle=2)
    assert found.loss_sum == pytest.approx(alone.loss_sum, abs=1e-5)
    assert torch.allclose(flat(model), flat(expected), atol=1e-6)


def test_clipping_bounds_the_gradient_and_returns_the_norm_before(task):
    model, _ = gradients(task, [EXAMPLES], packed=True)
    norm = flat(model).norm().item()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert clipped_norm(Alone(model), optimizer, 0.0, None) == pytest.approx(norm, rel=1e-5)
    assert flat(model).norm().item() == pytest.approx(norm, rel=1e-5), "0 leaves gradients alone"
    assert clipped_norm(Alone(model), optimizer, 0.01, None) == pytest.approx(norm, rel=1e-5)
    assert flat(model).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_step_uses_the_rate_it_is_given_and_drops_the_gradient(task):
    model, _ = gradients(task, [EXAMPLES], packed=True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    changes = [parameter.grad.clone() for parameter in model.parameters()]
    take_step(Alone(model), torch.optim.SGD(model.parameters(), 99.0), learning_rate=0.5)
    for old, change, new in zip(before, changes, model.parameters(), strict=True):
        assert torch.allclose(new, old - 0.5 * change)
        assert new.grad is None


def test_keeps_logits_looks_at_the_signature():
    assert keeps_logits(llama())
    assert not keeps_logits(torch.nn.Linear(1, 1))


class Held(list):
    def get(self, index, epoch=0):
        return self[index]


def evaluated(task, model, examples, packed):
    with packed_implementation(model, packed):
        return evaluate(
            task, model, Held(examples), [item.length for item in examples], group=Group(), autocast=lambda: None, packed=packed,
            data_rank=0, data_ranks=1, lockstep=False,
        )  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_counts_what_the_model_gets_right(task, packed):
    model = llama()
    found = evaluated(task, model, EXAMPLES, packed)
    assert found.metrics["loss"] == pytest.approx(by_hand(model).item(), abs=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(by_hand(model).item()), rel=1e-4)
    assert found.examples == len(EXAMPLES)
    losses = [outcome.loss for outcome in found.assessment.outcomes]
    assert losses == sorted(losses, reverse=True)
    assert {outcome.index for outcome in found.assessment.outcomes} == set(range(len(EXAMPLES)))
    # teach it one example by heart: that one matches exactly
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        task.loss(model, task.collate([EXAMPLES[2]], CPU, False)).backward()
        optimizer.step()
    one = evaluated(task, model, [EXAMPLES[2]], packed)
    assert (one.metrics["tokenAccuracy"], one.metrics["exactMatch"]) == (1.0, 1.0)
    assert model.training
