"""Optimizers: what is decayed, what a step does, and state that survives being packed."""

import copy

import pytest
import torch
from torch import nn

from support.plans import optimization
from tunesmith_api.v1alpha1.training import Optim
from tunesmith_trainer.checkpoint.optimizer_state import portable_state, restore_state
from tunesmith_trainer.loop.optimizer import make_optimizer

CPU = torch.device("cpu")


class Odd(nn.Module):
    """A norm whose weight is a matrix, next to everything else that can be exempt."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(512, 64)
        self.rows = nn.LayerNorm([4, 64])
        self.linear = nn.Linear(64, 96)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(96))

    def forward(self, ids):
        return self.linear(self.rows(self.embedding(ids))) * self.scale


def stepped(model, optimizer, steps, rate=1e-2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(512, (8, 4), generator=generator)
        model(ids).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def test_biases_and_norms_are_not_decayed_whatever_their_shape():
    model = Odd()
    optimizer = make_optimizer(model, optimization(weight_decay=0.1), CPU)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    free = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == {"embedding.weight", "linear.weight"}
    assert free == {"rows.weight", "rows.bias", "linear.bias", "scale"}


def test_adamw_is_that_of_torch():
    ours, theirs = Odd(), Odd()
    stepped(ours, make_optimizer(ours, optimization(weight_decay=0.0), CPU), 3)
    plain = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    stepped(theirs, plain, 3)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_sgd_has_adams_first_beta_as_momentum():
    ours, theirs = Odd(), Odd()
    stepped(ours, make_optimizer(ours, optimization(optim=Optim.SGD, weight_decay=0.0, adam_beta1=0.8), CPU), 3)
    stepped(theirs, torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1e-2, momentum=0.8), 3)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("optim", list(Optim))
def test_a_step_over_shared_parameters_is_that_over_whole_ones(optim):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    plan = optimization(optim=optim, weight_decay=0.1)
    ours, theirs = Odd(), Odd()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(ours)
        for model in (ours, theirs):
            stepped(model, make_optimizer(model, plan, CPU), 3)
        found = [parameter.full_tensor() for parameter in ours.parameters()]
    finally:
        distributed.destroy_process_group()
    for one, other in zip(found, theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_8_bit_adam_goes_where_adam_goes_with_a_quarter_of_the_state():
    start, short, full = Odd(), Odd(), Odd()
    small = make_optimizer(short, optimization(optim=Optim.ADAMW_8BIT, weight_decay=0.0), CPU)
    large = make_optimizer(full, optimization(weight_decay=0.0), CPU)
    stepped(short, small, 5, rate=1e-3)
    stepped(full, large, 5, rate=1e-3)
    moved = torch.cat([(a - b).flatten() for a, b in zip(full.parameters(), start.parameters(), strict=True)])
    apart = torch.cat([(a - b).flatten() for a, b in zip(full.parameters(), short.parameters(), strict=True)])
    assert apart.norm() < 0.1 * moved.norm()

    def size(state):
        return sum(
            value.nbytes for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key
        )

    ratio = size(small.state[short.embedding.weight]) / size(large.state[full.embedding.weight])
    assert ratio == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("optim", list(Optim))
def test_going_on_from_the_portable_state_equals_not_stopping(optim):
    plan = optimization(optim=optim, weight_decay=0.1)
    model = Odd()
    optimizer = make_optimizer(model, plan, CPU)
    stepped(model, optimizer, 4)
    other = copy.deepcopy(model)
    again = make_optimizer(other, plan, CPU)
    for (_, one), (_, two) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        state = portable_state(optimizer, one)
        if one.requires_grad:
            names = {"momentum_buffer"} if optim is Optim.SGD else {"step", "exp_avg", "exp_avg_sq"}
            assert set(state) == names
            assert all(value.shape in (one.shape, ()) and value.dtype is torch.float32 for value in state.values())
            restore_state(again, two, {name: value.clone() for name, value in state.items()})
    stepped(model, optimizer, 3, seed=2)
    stepped(other, again, 3, seed=2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-7, rtol=1e-6)


def test_packing_8_bit_state_again_gives_the_same_codes():
    model = Odd()
    plan = optimization(optim=Optim.ADAMW_8BIT)
    optimizer, again = make_optimizer(model, plan, CPU), make_optimizer(model, plan, CPU)
    stepped(model, optimizer, 4)
    for weight in (model.embedding.weight, model.linear.weight):
        restore_state(again, weight, portable_state(optimizer, weight))
        for name in ("state1", "state2"):
            assert optimizer.state[weight][name].dtype is torch.uint8
            # in a block of zeros any code means zero
            real = (optimizer.state[weight][name.replace("state", "absmax")] > 0).repeat_interleave(256)
            codes = [each.state[weight][name].flatten()[real] for each in (optimizer, again)]
            assert len(codes[0])
            assert torch.equal(*codes)
        for name in ("absmax1", "absmax2"):
            assert torch.allclose(optimizer.state[weight][name], again.state[weight][name], rtol=1e-6)


def test_there_is_no_state_before_the_first_step():
    model = Odd()
    assert portable_state(make_optimizer(model, optimization(), CPU), model.linear.weight) == {}
