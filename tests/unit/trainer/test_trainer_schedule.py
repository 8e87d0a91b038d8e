"""The learning rate as a function of the step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import optimization

from tunesmith_api.plan import OptimizationPlan
from tunesmith_api.v1alpha1.training import LrSchedulerType, Precision
from tunesmith_trainer.loop.schedule import lr_at, warmup_steps

KINDS = list(LrSchedulerType)
FALLING = [kind for kind in KINDS if kind is not LrSchedulerType.COSINE_WITH_RESTARTS]


def training(kind, peak=1.0, warmup_ratio=0.2, **changes) -> OptimizationPlan:
    values = {
        "num_train_epochs": 1, "learning_rate": peak, "lr_scheduler_type": LrSchedulerType(kind), "warmup_ratio": warmup_ratio,
        "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "global_batch_size": 8, "micro_batch_size": 2, "max_length": 64, "precision": Precision.FP32, "seed": 7,
    }  # fmt: skip
    return OptimizationPlan(**(values | changes))


@pytest.mark.parametrize(
    ("step", "kind", "rate"),
    [
        (0, "cosine", 0.5),
        (1, "cosine", 1.0),
        (2, "cosine", 1.0),
        (6, "cosine", 0.5),
        (2, "linear", 1.0),
        (6, "linear", 0.5),
        (9, "linear", 0.125),
        (0, "constant", 1.0),
        (9, "constant", 1.0),
        (0, "constant_with_warmup", 0.5),
        (9, "constant_with_warmup", 1.0),
        (2, "cosine_with_restarts", 1.0),
        (4, "cosine_with_restarts", 0.5),
        (6, "cosine_with_restarts", 1.0),
        (5, "warmup_stable_decay", 1.0),
        (6, "warmup_stable_decay", 1.0),
        (8, "warmup_stable_decay", 0.5),
        (9, "warmup_stable_decay", 0.25),
    ],
)
def test_known_values(step, kind, rate):
    plan = training(kind, num_cycles=2, decay_ratio=0.4)
    assert lr_at(step, plan, 10) == pytest.approx(rate)


def theirs(kind: LrSchedulerType, plan: OptimizationPlan, max_steps: int) -> list[float]:
    """What transformers' own scheduler gives each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    warmup = math.ceil(max_steps * plan.warmup_ratio)
    extra = {}
    if kind is LrSchedulerType.COSINE_WITH_RESTARTS:
        extra = {"num_cycles": plan.num_cycles}
    if kind is LrSchedulerType.WARMUP_STABLE_DECAY:
        extra = {"num_decay_steps": math.ceil(max_steps * plan.decay_ratio), "decay_type": "linear"}
    schedule = optimization.get_scheduler(
        kind.value, optimizer, num_warmup_steps=warmup, num_training_steps=max_steps, scheduler_specific_kwargs=extra
    )
    rates = []
    for _ in range(max_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("max_steps", "ratio"), [(50, 0.1), (33, 0.0), (200, 0.03)])
def test_after_warm_up_the_curve_is_that_of_transformers(kind, max_steps, ratio):
    plan = training(kind, peak=3e-4, warmup_ratio=ratio, num_cycles=3, decay_ratio=0.25)
    warmup = warmup_steps(plan, max_steps)
    ours = [lr_at(step, plan, max_steps) for step in range(max_steps)]
    assert ours[warmup:] == pytest.approx(theirs(kind, plan, max_steps)[warmup:], rel=1e-9, abs=1e-15)
    # warm-up is the same line, one step ahead: no step is wasted on a rate of 0
    if warmup > 1:
        assert ours[: warmup - 1] == pytest.approx(theirs(kind, plan, max_steps)[1:warmup])


@given(
    max_steps=st.integers(1, 500),
    ratio=st.floats(0, 1),
    decay=st.floats(0, 1),
    kind=st.sampled_from(FALLING),
    peak=st.floats(1e-6, 0.9),
)
def test_it_rises_to_the_peak_then_never_rises_again(max_steps, ratio, decay, kind, peak):
    plan = training(kind, peak=peak, warmup_ratio=ratio, decay_ratio=decay)
    warmup = warmup_steps(plan, max_steps)
    rates = [lr_at(step, plan, max_steps) for step in range(max_steps)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(peak)


@given(kind=st.sampled_from(KINDS), max_steps=st.integers(1, 100), beyond=st.integers(0, 50))
def test_it_stays_defined_after_the_last_step(kind, max_steps, beyond):
    assert 0 <= lr_at(max_steps + beyond, training(kind), max_steps) <= 1.0
