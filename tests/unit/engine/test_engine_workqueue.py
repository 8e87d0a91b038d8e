"""The work queue: who is worked on when. Time is the event loop's, and it is virtual: nobody sleeps."""

import asyncio
import random

import pytest

from support.virtualtime import virtually
from tunesmith_operator.engine.workqueue import WorkQueue


def queue(**settings):
    return WorkQueue(**{"jitter": 0.0, **settings})


def now():
    return asyncio.get_running_loop().time()


def test_keys_come_out_in_the_order_in_which_they_were_added_and_once():
    async def scenario():
        work = queue()
        for key in ("a", "b", "a", "c", "b"):
            work.add(key)
        assert len(work) == 3
        return [await work.get() for _ in range(3)]

    assert virtually(scenario()) == ["a", "b", "c"]


def test_a_key_in_work_is_not_given_out_twice_but_once_more_afterwards():
    async def scenario():
        work = queue()
        work.add("a")
        assert await work.get() == "a"
        work.add("a")
        work.add("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work.get(), 5)
        work.done("a")
        assert await work.get() == "a"
        work.done("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work.get(), 5)

    virtually(scenario())


def test_a_waiting_worker_is_woken_by_an_add():
    async def scenario():
        work = queue()
        asyncio.get_running_loop().call_later(7, work.add, "a")
        assert await work.get() == "a"
        return now()

    assert virtually(scenario()) == pytest.approx(7, abs=0.01)


def test_of_several_delays_the_shortest_counts():
    async def scenario():
        work = queue()
        work.add_after("a", 60)
        work.add_after("a", 10)
        work.add_after("a", 30)
        assert await work.get() == "a"
        first = now()
        work.done("a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work.get(), 100)
        return first

    assert virtually(scenario()) == pytest.approx(10, abs=0.01)


def test_a_shorter_delay_wakes_a_worker_that_waits_for_a_longer_one():
    async def scenario():
        work = queue()
        work.add_after("late", 60)
        asyncio.get_running_loop().call_later(1, work.add_after, "early", 2)
        assert await work.get() == "early"
        return now()

    assert virtually(scenario()) == pytest.approx(3, abs=0.01)


def test_failures_back_off_twice_as_long_each_time_up_to_a_cap_and_success_resets():
    async def scenario():
        work = queue(backoff_base=1, backoff_cap=5)
        delays = [work.backoff("a") for _ in range(4)]
        work.forget("a")
        return [*delays, work.backoff("a"), work.backoff("b")]

    assert virtually(scenario()) == [1, 2, 4, 5, 1, 1]


def test_a_backed_off_key_comes_back_after_its_delay():
    async def scenario():
        work = queue(backoff_base=4)
        work.add("a")
        await work.get()
        work.backoff("a")
        work.done("a")
        await work.get()
        return now()

    assert virtually(scenario()) == pytest.approx(4, abs=0.01)


def test_backoff_is_jittered_and_never_shorter_than_the_server_asks():
    async def scenario():
        work = queue(jitter=0.2, chance=random.Random(7))
        delays = [work.backoff(number) for number in range(50)]
        return delays, work.backoff("patient", at_least=30)

    delays, patient = virtually(scenario())
    assert len(set(delays)) == 50
    assert all(0.8 <= delay <= 1.2 for delay in delays)
    assert patient == 30


def test_a_cancelled_worker_loses_no_key():
    async def scenario():
        work = queue()
        task = asyncio.create_task(work.get())
        await asyncio.sleep(1)
        work.add("b")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await work.get()

    assert virtually(scenario()) == "b"


def test_a_cancellation_counts_though_a_key_comes_at_the_same_moment():
    async def scenario():
        work = queue()
        work.add_after("later", 100)

        async def worker():
            while True:
                work.done(await work.get())

        task = asyncio.create_task(worker())
        await asyncio.sleep(1)
        work.add("a")
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        return task.cancelled()

    assert virtually(scenario())


def test_keys_that_can_wait_come_after_all_others_and_in_their_order():
    async def scenario():
        work = queue()
        work.add("a", urgent=False)
        work.add("b", urgent=False)
        work.add("c")
        work.add("b")
        return [await work.get() for _ in range(3)]

    assert virtually(scenario()) == ["c", "b", "a"]


def test_a_key_that_is_due_and_can_wait_comes_after_the_others_too():
    async def scenario():
        work = queue()
        work.add_after("a", 1, urgent=False)
        work.add_after("b", 2)
        await asyncio.sleep(3)
        return [await work.get() for _ in range(2)]

    assert virtually(scenario()) == ["b", "a"]


def test_a_key_that_is_put_off_again_and_again_has_one_due_time():
    async def scenario():
        work = queue()
        for _ in range(50):
            work.add_after("a", 10, urgent=False)
            assert work.waits("a")
            work.add("a", urgent=False)
            await work.get()
            work.done("a")
            await asyncio.sleep(0.1)
        work.done(await work.get())
        first = now()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work.get(), 100)
        return first

    assert virtually(scenario()) == pytest.approx(10, abs=0.01)


def test_what_was_added_during_work_keeps_its_urgency_and_its_time():
    async def scenario():
        work = queue()
        work.add("a", urgent=False)
        assert await work.get() == "a"
        assert work.since("a") is None, "nobody but the poller asked for it"
        work.add("a")
        await asyncio.sleep(4)
        work.add("a", urgent=False)
        work.done("a")
        assert await work.get() == "a"
        return work.since("a")

    assert virtually(scenario()) == pytest.approx(4, abs=0.01)


def test_what_has_failed_is_held_until_its_backoff_but_no_longer_than_a_bound():
    async def scenario():
        work, held = queue(), []
        for _ in range(8):
            work.backoff("a")
            moments = [work.holds("a")]
            for _ in range(50):
                await asyncio.sleep(0.5)
                moments.append(work.holds("a"))
            held.append(moments.index(False) / 2)
        work.backoff("a", at_least=60)
        await asyncio.sleep(59)
        assert work.holds("a"), "the server asked for it"
        work.forget("a")
        assert not work.holds("a")
        return held

    assert virtually(scenario()) == [1, 2, 4, 8, 16, 20, 20, 20]


def test_the_longest_work_under_way_is_known():
    async def scenario():
        work = queue()
        assert work.longest_work() == 0
        work.add("a")
        await work.get()
        await asyncio.sleep(30)
        return work.longest_work()

    assert virtually(scenario()) == pytest.approx(30, abs=0.01)


def test_a_key_that_fails_again_while_it_is_held_comes_back_when_the_hold_ends():
    async def scenario():
        work = queue()
        work.backoff("a")
        await asyncio.sleep(0.5)
        work.backoff("a")
        assert await work.get() == "a"
        assert work.holds("a"), "the first backoff is over, the second isn't"
        work.return_held("a")
        work.done("a")
        assert await work.get() == "a"
        return work.holds("a"), now()

    held, at = virtually(scenario())
    assert not held
    assert at == pytest.approx(2.5, abs=0.01)


def test_new_keys_and_those_that_were_worked_on_take_turns_three_to_one():
    async def scenario():
        work = queue()
        for key in ("a", "b"):
            work.add(key)
            work.done(await work.get())
        for number in range(5):
            work.add(f"new-{number}")
        work.add("a")
        work.add("b")
        taken = [await work.get() for _ in range(7)]
        assert len(work) == 0
        return taken

    assert virtually(scenario()) == ["new-0", "new-1", "new-2", "a", "new-3", "new-4", "b"]


def test_a_key_whose_object_is_gone_is_new_again_and_stands_in_one_line_only():
    async def scenario():
        work = queue()
        work.add("a")
        work.add("b")
        work.done(await work.get())
        assert await work.get() == "b"
        work.add("b")
        work.drop("b")
        work.done("b")
        work.add("new")
        work.add("a")
        assert len(work) == 3
        return [await work.get() for _ in range(3)]

    assert virtually(scenario()) == ["b", "new", "a"]
