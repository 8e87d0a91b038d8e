"""The loss and its gradient: by hand, however the batch is cut."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.chat import IGNORE, EncodedChat
from tunesmith_trainer.data import collate
from tunesmith_trainer.evaluate import evaluate
from tunesmith_trainer.group import Group
from tunesmith_trainer.model import Numerics
from tunesmith_trainer.order import micro_batches
from tunesmith_trainer.step import keeps_logits, make_optimizer, target_logits, train_step

CPU = torch.device("cpu")


class TwoLayers(torch.nn.Module):
    """The smallest language model: each token predicts the next."""

    def __init__(self, vocabulary=11, width=6):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep=None):
        hidden = self.norm(self.embedding(input_ids))
        if logits_to_keep is not None:
            hidden = hidden[:, logits_to_keep]
        return SimpleNamespace(logits=self.head(hidden))


def example(*tokens, spoken):
    return EncodedChat(list(tokens), [token if number in spoken else IGNORE for number, token in enumerate(tokens)])


EXAMPLES = [
    example(1, 2, 3, 4, spoken={2, 3}),
    example(5, 6, spoken={1}),
    example(7, 8, 9, 1, 2, spoken={3}),
    example(3, 3, 3, spoken={0, 1, 2}),
    example(9, 8, 7, spoken={2}),
]
TOKENS = sum(item.trained_tokens for item in EXAMPLES)


def by_hand(model):
    total = 0
    for item in EXAMPLES:
        logits = model(torch.tensor([item.input_ids]), None, False).logits[0]
        for position, label in enumerate(item.labels[1:]):
            if label != IGNORE:
                total = total - functional.log_softmax(logits[position], -1)[label]
    return total / TOKENS


def stepped(parts, keep=True, clip=0.0, rate=0.1):
    model = TwoLayers()
    optimizer = make_optimizer(model.named_parameters(), weight_decay=0.1, betas=(0.9, 0.999), epsilon=1e-8)
    batches = [collate(part, 0, CPU) for part in parts]
    result = train_step(
        model, optimizer, batches, global_tokens=TOKENS, world_size=1, learning_rate=rate, max_grad_norm=clip, keep=keep
    )
    return model, result


def test_the_loss_is_the_mean_over_the_assistants_tokens():
    _, result = stepped([EXAMPLES])
    assert result.nll_sum / TOKENS == pytest.approx(by_hand(TwoLayers()).item(), abs=1e-6)


@pytest.mark.parametrize("keep", [True, False])
def test_the_gradient_norm_is_that_of_the_mean(keep):
    model = TwoLayers()
    by_hand(model).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    _, result = stepped([EXAMPLES], keep=keep)
    assert result.grad_norm == pytest.approx(float(expected), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 6), order=st.permutations(EXAMPLES))
def test_however_the_batch_is_cut_the_step_is_the_same(size, order):
    whole, _ = stepped([EXAMPLES], rate=1e-2)
    parts, _ = stepped(micro_batches(order, size), rate=1e-2)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_only_positions_with_a_target_get_logits():
    batch = collate([EXAMPLES[0], EXAMPLES[2]], 0, CPU)
    logits, targets = target_logits(TwoLayers(), batch, keep=True)
    assert logits.shape == (2, 2, 11)
    assert targets.tolist() == [[3, 4], [IGNORE, 1]]


def test_a_micro_batch_without_targets_is_harmless():
    idle = collate([EXAMPLES[0]], 0, CPU)
    idle.labels.fill_(IGNORE)
    model, batches = TwoLayers(), [collate(EXAMPLES, 0, CPU), idle]
    optimizer = make_optimizer(model.named_parameters(), weight_decay=0.1, betas=(0.9, 0.999), epsilon=1e-8)
    options = {"global_tokens": TOKENS, "world_size": 1, "learning_rate": 0.1, "max_grad_norm": 0.0, "keep": True}
    train_step(model, optimizer, batches, **options)
    expected, _ = stepped([EXAMPLES])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    model = TwoLayers()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model.named_parameters(), weight_decay=0.0, betas=(0.9, 0.999), epsilon=1e-8)
    batches = [collate(EXAMPLES, 0, CPU)]
    options = {"global_tokens": TOKENS, "world_size": 1, "learning_rate": 0.1, "max_grad_norm": 1.0, "keep": True}
    with pytest.raises(UserError) as caught:
        train_step(model, optimizer, batches, **options)
    assert (caught.value.reason, caught.value.exit_code) == (Reason.DIVERGED, ExitCode.DIVERGED)
    assert torch.equal(before["embedding.weight"], model.embedding.weight)


def test_biases_and_norms_are_not_decayed():
    model = TwoLayers()
    optimizer = make_optimizer(model.named_parameters(), weight_decay=0.1, betas=(0.9, 0.999), epsilon=1e-8)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model.embedding.weight), id(model.head.weight)}


def test_clipping_bounds_the_step_but_reports_the_norm():
    _, free = stepped([EXAMPLES])
    _, clipped = stepped([EXAMPLES], clip=0.01)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)


def test_keeps_logits_looks_at_the_signature():
    assert keeps_logits(TwoLayers())
    assert not keeps_logits(torch.nn.Linear(1, 1))


def test_evaluation_counts_what_the_model_gets_right():
    model = TwoLayers()
    options = {"group": Group(), "numerics": Numerics(CPU, False), "pad_id": 0, "keep": True}
    result = evaluate(model, EXAMPLES, micro_batch_size=2, **options)
    assert result.loss == pytest.approx(by_hand(model).item(), abs=1e-6)
    assert result.examples == len(EXAMPLES)
    # teach it one example by heart: that one matches exactly
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        logits, targets = target_logits(model, collate([EXAMPLES[2]], 0, CPU), True)
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE).backward()
        optimizer.step()
    one = evaluate(model, [EXAMPLES[2]], micro_batch_size=2, **options)
    assert (one.token_accuracy, one.exact_match) == (1.0, 1.0)
    assert model.training
