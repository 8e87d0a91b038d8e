"""The learning rate as a function of the step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith_api.v1alpha1.training import LrSchedulerType
from tunesmith_trainer.schedule import lr_at, warmup_steps

KINDS = list(LrSchedulerType)


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
        (9, "constant", 1.0),
    ],
)
def test_known_values(step, kind, rate):
    assert lr_at(step, peak=1.0, max_steps=10, warmup=2, kind=LrSchedulerType(kind)) == pytest.approx(rate)


@given(max_steps=st.integers(1, 500), ratio=st.floats(0, 1), kind=st.sampled_from(KINDS), peak=st.floats(1e-6, 0.9))
def test_it_rises_to_the_peak_then_never_rises_again(max_steps, ratio, kind, peak):
    warmup = warmup_steps(max_steps, ratio)
    rates = [lr_at(step, peak=peak, max_steps=max_steps, warmup=warmup, kind=kind) for step in range(max_steps)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup:
        assert rates[warmup - 1] == pytest.approx(peak)
