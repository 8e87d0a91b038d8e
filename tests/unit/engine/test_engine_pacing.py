"""When requests to the API server are made. Time is the event loop's, and it is virtual: nobody sleeps."""

import asyncio

import pytest

from support.virtualtime import virtually
from tunesmith_operator.engine.pacing import RequestPace, TokenBucket


def now():
    return asyncio.get_running_loop().time()


def test_a_bucket_refills_no_further_than_its_burst():
    bucket = TokenBucket(rate=1, burst=2)
    assert [bucket.reserve(1000), bucket.reserve(1000), bucket.reserve(1000)] == [0, 0, 1]


def test_urgent_requests_are_paced_after_a_burst_and_served_in_their_order():
    async def scenario():
        waited, times = [], []
        pace = RequestPace(rate=2, burst=3, on_wait=waited.append)

        async def request(number):
            await pace.turn()
            times.append((number, round(now(), 5)))

        await asyncio.gather(*(request(number) for number in range(6)))
        return times, waited

    times, waited = virtually(scenario())
    assert [number for number, _ in times] == [0, 1, 2, 3, 4, 5]
    assert [moment for _, moment in times] == pytest.approx([0, 0, 0, 0.5, 1, 1.5], abs=1e-3)
    assert waited == pytest.approx([0, 0, 0, 0.5, 1, 1.5], abs=1e-3)


def test_what_is_not_urgent_takes_what_is_left_over_and_leaves_half_of_a_burst():
    async def scenario():
        pace = RequestPace(rate=1, burst=10, progress_at_once=100)
        taken = sum(pace.spare() for _ in range(100))
        began = now()
        for _ in range(5):
            await pace.turn()
        assert now() == began, "urgent requests find half of a burst"
        assert not pace.spare()
        waiting = [asyncio.create_task(pace.turn()) for _ in range(20)]
        await asyncio.sleep(10)
        assert not pace.spare(), "while others wait, nothing is left over"
        await asyncio.gather(*waiting)
        return taken

    assert virtually(scenario()) == 5


def test_of_what_is_not_urgent_only_so_much_is_under_way():
    async def scenario():
        pace = RequestPace(rate=100, burst=100, progress_at_once=2)
        assert [pace.spare() for _ in range(3)] == [True, True, False]
        pace.answered()
        assert [pace.spare() for _ in range(2)] == [True, False]

    virtually(scenario())


@pytest.mark.parametrize(("jobs", "seconds"), [(0, 10), (60, 10), (100, 10), (1000, 100)])
def test_progress_of_all_jobs_takes_half_of_the_rate_at_most(jobs, seconds):
    assert RequestPace(rate=20, burst=40).progress_seconds(jobs) == seconds
