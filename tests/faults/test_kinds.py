"""Whatever goes wrong between operator and API server, by kind and seed: in the end all is as if nothing had."""

import random

import pytest

from support.simulation.disturbances import KINDS
from support.simulation.lifecycle import live

SEEDS = 3
MORE_SEEDS = {"older_view": 8}
BUSIEST_MINUTE = 200
"""Reconciles of one key; without faults it is about 130, for there are as many events."""


@pytest.fixture(scope="module")
def undisturbed():
    return live()


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_is_the_same(undisturbed, kind, record_property):
    broken, seeds = [], MORE_SEEDS.get(kind, SEEDS)
    for seed in range(1, seeds + 1):
        life = live(lambda it, seed=seed: KINDS[kind](it, random.Random(seed)), seed)
        hot = life.simulation.hottest_minute()
        if life.faults or life.final != undisturbed.final or hot > BUSIEST_MINUTE:
            broken.append((seed, hot, life.faults, life.final))
    record_property(f"kind:{kind}", f"{seeds - len(broken)}/{seeds}")
    assert broken == []
