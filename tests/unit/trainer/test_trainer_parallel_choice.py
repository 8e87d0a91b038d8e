"""Which way a model is spread, and what is refused: arithmetic, no ranks."""

import pytest
import torch

from support.plans import training_plan
from tunesmith_api.memory.estimate import MemoryEstimate
from tunesmith_api.v1alpha1.training import Strategy
from tunesmith_store.errors import UserError
from tunesmith_trainer.distributed import parallel
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.models.numerics import Numerics

SMALL = MemoryEstimate(1, 1, 1, 1, 1, 1)
HUGE = MemoryEstimate(1 << 50, 1, 1, 1, 1, 1)


class Pair(Group):
    """Two ranks that agree without talking."""

    def __init__(self, world_size=2, local_world_size=1):
        super().__init__(0, world_size, local_world_size=local_world_size)

    def broadcast(self, value):
        return value


@pytest.mark.parametrize(
    ("estimate", "group", "changes", "strategy"),
    [
        (HUGE, Group(), {}, Strategy.DDP),
        (SMALL, Pair(), {}, Strategy.DDP),
        (HUGE, Pair(), {}, Strategy.FSDP),
        (HUGE, Pair(), {"strategy": "DDP"}, Strategy.DDP),
        (SMALL, Pair(), {"strategy": "FSDP"}, Strategy.FSDP),
        (HUGE, Pair(), {"method": "QLoRA"}, Strategy.FSDP),
        (SMALL, Pair(4), {"tensor_parallel": 2}, Strategy.FSDP),
        (SMALL, Pair(2), {"tensor_parallel": 2}, Strategy.DDP),
        (SMALL, Pair(4), {"strategy": "HSDP", "replicas": 2, "processes_per_worker": 2}, Strategy.HSDP),
        (SMALL, Pair(2), {"strategy": "HSDP", "processes_per_worker": 2}, Strategy.FSDP),
    ],
    ids=[
        "one worker",
        "fits",
        "doesn't fit",
        "DDP asked for",
        "FSDP asked for",
        "4-bit base",
        "replicas of parts",
        "one of parts",
        "HSDP asked for",
        "HSDP in one worker",
    ],
)
def test_the_strategy_is_chosen_by_memory_unless_it_is_given(estimate, group, changes, strategy):
    assert parallel.choose(training_plan(**changes), estimate, group) is strategy


@pytest.mark.parametrize(("processes", "strategy"), [(1, Strategy.DDP), (2, Strategy.FSDP)])
def test_the_processes_of_a_pod_share_its_memory(monkeypatch, processes, strategy):
    monkeypatch.setattr(parallel, "memory_limit_bytes", lambda: 100)
    half = MemoryEstimate(45, 1, 1, 1, 1, 1)
    assert parallel.choose(training_plan(), half, Pair(4, processes)) is strategy


@pytest.mark.parametrize(
    ("world", "changes", "message"),
    [
        (4, {"tensor_parallel": 3}, r"tensorParallel 3 is no divisor of the 4 training processes"),
        (4, {"tensor_parallel": 2, "strategy": "DDP"}, "needs strategy FSDP or Auto"),
        (2, {"tensor_parallel": 2, "method": "QLoRA"}, r"method\.type Full and LoRA only"),
        (2, {"tensor_parallel": 2, "method": {"type": "Full", "pruning": {}}}, r"method\.pruning"),
        (2, {"tensor_parallel": 2, "task": "DPO"}, r"needs method\.type LoRA"),
    ],
)
def test_what_can_not_be_spread_is_refused_before_anything_is_loaded(world, changes, message):
    with pytest.raises(UserError, match=message):
        parallel.mesh(training_plan(**changes), Pair(world))


def test_one_worker_is_clipped_as_torch_does():
    models = [torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model(torch.ones(2, 8)).square().sum().backward()
    wrapped = parallel.wrap(models[0], Group(), Strategy.DDP, Numerics(torch.device("cpu")))
    norm = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.5)
    assert wrapped.clip_grad_norm(0.5) == pytest.approx(float(norm), rel=1e-6)
    assert torch.allclose(models[0].weight.grad, models[1].weight.grad, rtol=1e-5)
    assert wrapped.clip_grad_norm(float("inf")) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_told_and_left_alone(bad):
    model = torch.nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    model.weight.grad[0, 0] = bad
    before = model.bias.grad.clone()
    wrapped = parallel.wrap(model, Group(), Strategy.DDP, Numerics(torch.device("cpu")))
    norm = wrapped.clip_grad_norm(0.1)
    assert norm == bad or norm != norm
    assert torch.equal(model.bias.grad, before)
