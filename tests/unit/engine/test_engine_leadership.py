"""Leader election in virtual time: one acts at a time, whatever dies, stops or can't be reached."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.virtualtime import virtually
from tunesmith_operator.adapters.errors import Transient
from tunesmith_operator.engine.leadership import LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, Leadership, LeadershipLost


class Lease:
    """The Lease as the API server keeps it. `away` names those whose requests fail; `lost` those whose answers do."""

    def __init__(self):
        self.stored, self.version, self.away, self.lost, self.requests = None, 0, set(), set(), []

    def client(self, name):
        return Client(self, name)


class Client:
    def __init__(self, lease, name):
        self.lease, self.name = lease, name

    async def read(self):
        await self._travel("read")
        return self.lease.stored

    async def write(self, spec, version):
        await self._travel("write")
        known = self.lease.stored["metadata"]["resourceVersion"] if self.lease.stored else None
        if version != known:
            raise Transient("conflict")
        self.lease.version += 1
        self.lease.stored = {"metadata": {"resourceVersion": str(self.lease.version)}, "spec": dict(spec)}
        if self.name in self.lease.lost:
            raise Transient("timeout")
        return self.lease.stored

    async def _travel(self, verb):
        self.lease.requests.append((self.name, verb))
        await asyncio.sleep(0.01)
        if self.name in self.lease.away:
            raise Transient("away")


def claim(lease, name):
    return Leadership(lease.client(name), name, chance=random.Random(name))


async def lead(claimed):
    await claimed.acquire()
    await claimed.keep()


def clock():
    return asyncio.get_running_loop().time()


def test_the_first_leads_and_the_second_stands_by():
    async def scenario():
        lease = Lease()
        first, second = claim(lease, "a"), claim(lease, "b")
        await first.acquire()
        task = asyncio.create_task(second.acquire())
        keeping = asyncio.create_task(first.keep())
        await asyncio.sleep(300)
        assert (first.holds(), second.holds(), task.done()) == (True, False, False)
        assert lease.stored["spec"]["leaseTransitions"] == 0
        assert lease.requests.count(("a", "read")) == 1, "a leader writes, it doesn't read"
        keeping.cancel()
        await asyncio.wait_for(task, LEASE_SECONDS + 2 * RETRY_SECONDS)
        assert (first.holds(), second.holds()) == (False, True)
        assert lease.stored["spec"]["leaseTransitions"] == 1

    virtually(scenario())


def test_a_leader_that_ends_well_is_followed_at_once():
    async def scenario():
        lease = Lease()
        first, second = claim(lease, "a"), claim(lease, "b")
        await first.acquire()
        task = asyncio.create_task(second.acquire())
        await asyncio.sleep(5)
        await first.release()
        assert not first.holds()
        await asyncio.wait_for(task, 1.5 * RETRY_SECONDS)

    virtually(scenario())


def test_a_leader_that_is_cut_off_stops_before_another_begins():
    async def scenario():
        lease = Lease()
        first, second = claim(lease, "a"), claim(lease, "b")
        await first.acquire()
        keeping, waiting = asyncio.create_task(first.keep()), asyncio.create_task(second.acquire())
        await asyncio.sleep(20)
        lease.away.add("a")
        began = clock()
        await asyncio.sleep(RENEW_SECONDS)
        assert (first.holds(), second.holds()) == (False, False)
        with pytest.raises(LeadershipLost, match="couldn't be renewed"):
            await keeping
        await waiting
        assert clock() - began <= 20

    virtually(scenario())


def test_a_short_outage_costs_nothing():
    async def scenario():
        lease = Lease()
        first = claim(lease, "a")
        await first.acquire()
        keeping = asyncio.create_task(first.keep())
        for _ in range(20):
            lease.away.add("a")
            await asyncio.sleep(RENEW_SECONDS - RETRY_SECONDS - 0.5)
            lease.away.clear()
            await asyncio.sleep(2 * RETRY_SECONDS)
            assert first.holds()
        keeping.cancel()

    virtually(scenario())


def test_a_renewal_whose_answer_is_lost_is_seen_at_the_next_look():
    async def scenario():
        lease = Lease()
        first = claim(lease, "a")
        await first.acquire()
        keeping = asyncio.create_task(first.keep())
        await asyncio.sleep(5)
        lease.lost.add("a")
        await asyncio.sleep(RETRY_SECONDS)
        lease.lost.clear()
        await asyncio.sleep(60)
        assert first.holds()
        keeping.cancel()

    virtually(scenario())


def test_a_leader_whose_lease_was_taken_knows_it():
    async def scenario():
        lease = Lease()
        first = claim(lease, "a")
        await first.acquire()
        lease.version += 1
        lease.stored = {
            "metadata": {"resourceVersion": str(lease.version)},
            "spec": {"holderIdentity": "thief", "leaseDurationSeconds": 12},
        }
        with pytest.raises(LeadershipLost, match="thief"):
            await first.keep()
        assert not first.holds()

    virtually(scenario())


STEPS = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["away", "back", "lost", "found", "restart"]), st.floats(0, 15)),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_never_do_two_lead_and_in_the_end_one_does(steps):
    async def scenario():
        lease, claims, tasks = Lease(), {}, {}

        def start(name):
            if name in tasks:
                tasks[name].cancel()
            claims[name] = Leadership(lease.client(name), f"{name}{clock()}", chance=random.Random(1))
            tasks[name] = asyncio.create_task(lead(claims[name]))

        async def wait(seconds):
            until = clock() + seconds
            while clock() < until:
                await asyncio.sleep(0.25)
                # a killed process holds nothing any more: only those whose task still runs count
                assert sum(claims[it].holds() for it in claims) <= 1
                for name, task in tasks.items():
                    if task.done():
                        start(name)

        for name in "abc":
            start(name)
        for name, what, seconds in steps:
            {"away": lease.away.add, "back": lease.away.discard, "lost": lease.lost.add, "found": lease.lost.discard,
             "restart": start}[what](name)  # fmt: skip
            await wait(seconds)
        lease.away.clear()
        lease.lost.clear()
        await wait(3 * LEASE_SECONDS)
        assert sum(claims[it].holds() for it in claims) == 1
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    virtually(scenario())
