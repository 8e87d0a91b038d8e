"""A bad step is told from a good one, and a run that goes wrong too often ends."""

import math

import pytest

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_trainer.loop.guards import LossGuard, diverged


def fed(guard, losses):
    return [guard.problem(loss, 1.0) for loss in losses]


def test_an_ordinary_curve_is_no_trouble():
    assert not any(fed(LossGuard(4.0), [4.0 * 0.97**step + 0.3 * (step % 3) for step in range(200)]))


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "loss is not finite"),
        (math.inf, 1.0, "loss is not finite"),
        (2.0, math.nan, "gradient is not finite"),
    ],
)
def test_what_is_not_finite_is_trouble_from_the_first_step(loss, norm, words):
    assert words in LossGuard(0.0).problem(loss, norm)


def test_a_jump_is_a_spike_once_there_is_a_usual_loss():
    guard = LossGuard(4.0)
    assert not guard.problem(50.0, 1.0), "the first losses are no measure"
    guard.forget()
    fed(guard, [2.0] * 10)
    assert "jumped to 9 from 2" in guard.problem(9.0, 1.0)
    assert not guard.problem(7.9, 1.0)


def test_a_spike_is_not_remembered_as_usual():
    guard = LossGuard(4.0)
    fed(guard, [2.0] * 10)
    assert all(fed(guard, [20.0] * 40))


def test_tiny_losses_may_jump():
    guard = LossGuard(4.0)
    fed(guard, [0.01] * 10)
    assert not guard.problem(0.3, 1.0)


def test_factor_zero_watches_for_nothing_but_what_is_not_finite():
    guard = LossGuard(0.0)
    fed(guard, [1.0] * 10)
    assert not guard.problem(1e6, 1.0)


def test_after_going_back_the_guard_starts_anew():
    guard = LossGuard(4.0)
    fed(guard, [1.0] * 10)
    guard.forget()
    assert not guard.problem(9.0, 1.0)


def test_the_end_names_the_bound_and_the_remedy():
    error = diverged("the loss is not finite", 12, 3)
    assert (error.reason, error.exit_code) == (Reason.DIVERGED, ExitCode.DIVERGED)
    assert "maxRollbacks" in error.message
    assert "learningRate" in error.message
