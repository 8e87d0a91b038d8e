"""The arithmetic of taking over, as tables: shares of replicas, steps, pauses, and the way back."""

from datetime import timedelta

import pytest

from support import make
from tunesmith_api.v1alpha1.rollout import CanaryStep, RolloutStrategy
from tunesmith_operator.core.modeldeployment.strategy import Counts, Place, Takeover, share

BLUE_GREEN, ROLLING, CANARY = RolloutStrategy
STEPS = (CanaryStep(weight=10, pause_seconds=60), CanaryStep(weight=50))


def way(strategy=CANARY, replicas=10, steps=STEPS, available=0, desired=None, **more):
    desired = available if desired is None else desired
    settled = more.pop("settled", available >= desired)
    return Takeover(
        strategy=strategy, replicas=replicas, steps=steps, available=available, desired=desired, settled=settled,
        **{"alone": False, "before_available": replicas, **more},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("replicas", "weight", "before", "new"),
    [
        (1, 10, 1, 1), (1, 90, 1, 1), (2, 10, 2, 1), (3, 25, 3, 1), (4, 20, 4, 1), (10, 10, 10, 1), (10, 20, 10, 3),
        (10, 50, 10, 10), (10, 51, 10, 10), (10, 60, 7, 10), (10, 75, 3, 10), (10, 90, 1, 10), (10, 99, 1, 10),
        (100, 1, 100, 1), (100, 33, 100, 49),
    ],
)  # fmt: skip
def test_a_share_of_requests_is_a_share_of_replicas(replicas, weight, before, new):
    assert share(replicas, weight) == Counts(before, new)


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 40])
def test_a_share_has_both_revisions_and_never_fewer_replicas_than_asked_for(replicas):
    for weight in range(1, 100):
        counts = share(replicas, weight)
        assert min(counts.before, counts.new) >= 1
        assert max(counts.before, counts.new) == replicas
        if replicas == 40:
            assert abs(100 * counts.new / (counts.before + counts.new) - weight) < 2


def test_a_canary_goes_through_its_steps_by_replicas_clock_and_promotion():
    start = make.at(0)
    waiting = way(available=0, desired=1)
    assert waiting.next(Place(), start) == Place()
    assert waiting.counts(Place()) == Counts(10, 1)
    first = way(available=1)
    place = first.next(Place(), start)
    assert place == Place(0, 10, start)
    assert first.pause_end(place) == make.at(60)
    assert first.next(place, make.at(59)) == place
    second = first.next(place, make.at(60))
    assert second == Place(1, 10, make.at(60)), "the weight goes up when its replicas answer"
    assert first.counts(second) == Counts(10, 10)
    assert first.overdue_at(second) == make.at(660)
    half = way(available=10).next(second, make.at(70))
    assert half == Place(1, 50, make.at(70))
    assert way(available=10).paused(half)
    assert way(available=10).next(half, make.at(9999)) == half
    promoted = way(available=10, promoted=True)
    assert promoted.next(half, make.at(100)) == Place(2, 100, make.at(100))
    assert promoted.arrived(Place(2, 100, make.at(100)), make.at(100))


def test_a_promotion_skips_all_steps_and_waits_for_replicas_all_the_same():
    place = way(available=1, promoted=True).next(Place(0, 10, make.at(0)), make.at(5))
    assert place == Place(2, 10, make.at(5))
    assert way(available=1, desired=10, promoted=True).counts(place) == Counts(10, 10)


def test_steps_that_need_nothing_new_are_passed_in_one_look():
    steps = tuple(CanaryStep(weight=it, pause_seconds=0) for it in (10, 20, 40))
    assert way(replicas=1, steps=steps, available=1).next(Place(), make.at(0)) == Place(3, 100, make.at(0))


def test_beyond_half_the_old_replicas_go_only_as_new_ones_answer():
    steps = (CanaryStep(weight=90),)
    place = Place(0, 50, make.at(0))
    for available, before in ((0, 10), (4, 6), (9, 1), (10, 1)):
        assert way(steps=steps, available=available, desired=10).counts(place) == Counts(before, 10)


def test_blue_green_is_all_or_nothing():
    some, every = (way(BLUE_GREEN, available=it, desired=10) for it in (9, 10))
    assert some.next(Place(), make.at(0)) == Place()
    assert every.next(Place(), make.at(0)) == Place(0, 100, make.at(0))
    assert every.counts(Place(0, 100)) == some.counts(Place()) == Counts(10, 10)


def test_a_rolling_update_has_one_replica_more_than_asked_for():
    place, new = Place(), 0
    for available in range(4):
        step = way(ROLLING, replicas=4, available=available, desired=new)
        place = step.next(place, make.at(available))
        counts = step.counts(place)
        assert (counts.before, counts.new) == (4 - available, available + 1)
        assert place.weight == 25 * available
        new = counts.new
    assert way(ROLLING, replicas=4, available=4).next(place, make.at(9)) == Place(0, 100, make.at(9))
    assert way(ROLLING, replicas=4, available=1, desired=3).counts(Place(0, 75)) == Counts(3, 3), "one has gone away"


def test_after_the_switch_it_is_judged_for_a_while():
    step = way(BLUE_GREEN, available=10, after_switch=timedelta(seconds=30))
    place = Place(0, 100, make.at(0))
    assert not step.arrived(place, make.at(29))
    assert step.pause_end(place) == make.at(30)
    assert step.arrived(place, make.at(30))


def test_the_first_revision_and_one_without_replicas_go_through_no_steps():
    for replicas in (0, 3):
        step = way(replicas=replicas, available=replicas, alone=True, after_switch=timedelta(hours=1))
        place = step.next(Place(), make.at(0))
        assert step.arrived(place, make.at(0))


def test_replicas_that_a_further_step_needs_have_a_deadline():
    step = way(available=1, desired=10, settled=False, deadline=timedelta(seconds=100))
    assert step.overdue_at(Place(1, 10, make.at(0))) == make.at(100)
    for place in (Place(), Place(0, 10, make.at(0)), Place(1, 50, make.at(0)), Place(2, 100, make.at(0))):
        assert step.overdue_at(place) is None


@pytest.mark.parametrize(
    ("available", "before", "weight"),
    [
        (1, 10, 0), (1, 9, 0), (10, 10, 0), (10, 1, 91), (10, 9, 53), (10, 0, 100), (0, 1, 0), (0, 0, 100),
    ],
)  # fmt: skip
def test_what_failed_is_given_no_more_than_the_old_ones_cannot_take(available, before, weight):
    place = Place(1, 90, make.at(0))
    found = way(available=available, before_available=before).withdrawn(place, make.at(5))
    assert found == Place(1, weight, make.at(5) if weight == 0 else make.at(0))
    assert way().withdrawn(Place(1, 0, None), make.at(5)) == Place(1, 0, None)
