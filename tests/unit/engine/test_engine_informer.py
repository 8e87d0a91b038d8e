"""Informers against a scripted API server, in virtual time: what is known afterwards is what there is."""

import asyncio
import contextlib
import random

from support import make
from support.fakecluster import FakeCluster
from support.fakewatch import FakeSource
from support.virtualtime import virtually
from tunesmith_operator.adapters.errors import Expired, Gone, Rejected, Transient
from tunesmith_operator.core.kubernetes.resources import FINETUNEJOB, JOB, Key
from tunesmith_operator.engine.informer import LONGEST_PAUSE, RELIST_SECONDS, Informer
from tunesmith_operator.engine.store import WATCHED, Store


def key(name, namespace="ml"):
    return Key("FineTuneJob", namespace, name)


class Scene:
    """A cluster, a store and an informer for each kind."""

    def __init__(self, namespaces=(None,)):
        self.cluster, self.woken = FakeCluster(), []
        self.source = FakeSource(self.cluster)
        self.store = Store(lambda key: None, self.woken.append, namespaces)
        self.informers = [
            Informer(self.source, self.store, resource, namespace, chance=random.Random(1))
            for namespace in namespaces
            for resource in WATCHED
        ]

    def known(self):
        return {it.value.body and it.group.name for it in self.store._cache(FINETUNEJOB)}

    @contextlib.asynccontextmanager
    async def running(self):
        tasks = [asyncio.create_task(informer.run()) for informer in self.informers]
        try:
            await asyncio.sleep(1)
            yield
            assert not any(task.done() for task in tasks), "an informer never ends by itself"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def scene(act, **settings):
    async def scenario():
        it = Scene(**settings)
        for number in range(5):
            it.cluster.put(make.finetunejob(f"job-{number}"))
        async with it.running():
            await act(it)
        return it

    return virtually(scenario())


def test_what_is_listed_page_by_page_is_known_and_woken_once_all_kinds_are():
    async def act(it):
        assert it.known() == {f"job-{number}" for number in range(5)}
        assert sorted(it.woken) == [key(f"job-{number}") for number in range(5)]

    scene(act)


def test_nothing_is_woken_before_everything_is_listed():
    async def scenario():
        it = Scene()
        it.cluster.put(make.finetunejob("a"))
        it.source.fail = lambda verb, resource, namespace: Transient("away") if resource == JOB else None
        async with it.running():
            await asyncio.sleep(30)
            assert (it.woken, it.store.ready("ml")) == ([], False)
            it.source.fail = lambda verb, resource, namespace: None
            await asyncio.sleep(60)
            assert it.woken == [key("a")]

    virtually(scenario())


def test_what_vanished_while_a_watch_had_expired_is_no_longer_known():
    async def act(it):
        it.woken.clear()
        it.source.fail = lambda verb, resource, namespace: Transient("away")
        it.source.cut()
        await asyncio.sleep(60)
        it.cluster.remove("FineTuneJob", "ml", "job-1")
        it.source.compact()
        it.source.fail = lambda verb, resource, namespace: None
        await asyncio.sleep(60)
        assert it.known() == {"job-0", "job-2", "job-3", "job-4"}
        assert it.store.custom_resource(key("job-1")) is None
        assert it.woken == [key("job-1")]

    scene(act)


def test_all_that_vanished_is_dropped_by_an_empty_list():
    async def act(it):
        it.source.fail = lambda verb, resource, namespace: Expired("too old") if verb == "stream" else None
        for number in range(5):
            it.cluster.remove("FineTuneJob", "ml", f"job-{number}")
        it.source.fail = lambda verb, resource, namespace: None
        await asyncio.sleep(60)
        assert it.known() == set()

    scene(act)


def test_an_event_that_never_came_is_made_up_for_by_the_next_list():
    async def act(it):
        it.source.deliver = lambda changes: []
        it.source.cut()
        it.cluster.remove("FineTuneJob", "ml", "job-1")
        it.cluster.put(make.finetunejob("new"))
        await asyncio.sleep(60)
        it.source.cut()
        await asyncio.sleep(1.3 * RELIST_SECONDS)
        it.source.cut()
        await asyncio.sleep(60)
        assert it.known() == {"job-0", "job-2", "job-3", "job-4", "new"}

    scene(act)


def test_events_doubled_and_reversed_end_in_the_same():
    async def act(it):
        it.source.deliver = lambda changes: [*changes[::-1], *changes]
        it.cluster.change("FineTuneJob", "job-0", {"spec": {"suspend": True}})
        it.cluster.remove("FineTuneJob", "ml", "job-1")
        it.cluster.put(make.finetunejob("job-1"))
        it.cluster.change("FineTuneJob", "job-2", {"spec": {"suspend": True}})
        it.cluster.remove("FineTuneJob", "ml", "job-2")
        await asyncio.sleep(5)
        assert it.known() == {"job-0", "job-1", "job-3", "job-4"}
        assert it.store.custom_resource(key("job-0")).spec.suspend
        uid = it.cluster.get("FineTuneJob", "job-1")["metadata"]["uid"]
        assert it.store.custom_resource(key("job-1")).metadata.uid == uid

    scene(act)


def test_an_api_server_that_is_away_is_asked_ever_less_often_and_never_given_up():
    async def act(it):
        asked = []
        it.source.fail = lambda verb, resource, namespace: asked.append(verb) or Transient("503")
        it.source.cut()
        await asyncio.sleep(600)
        per_informer = len(asked) / len(WATCHED)
        assert 600 / (1.3 * LONGEST_PAUSE) <= per_informer <= 600 / (0.7 * LONGEST_PAUSE) + 6
        assert all(informer.silent_for() <= 1.5 * LONGEST_PAUSE for informer in it.informers)
        it.source.fail = lambda verb, resource, namespace: None
        it.cluster.put(make.finetunejob("late"))
        await asyncio.sleep(1.5 * LONGEST_PAUSE)
        assert "late" in it.known()

    scene(act)


def test_nothing_is_decided_on_what_may_be_old_until_every_kind_is_listed_anew():
    async def act(it):
        it.woken.clear()
        away = {"FineTuneJob", "Job"}
        it.source.fail = lambda verb, resource, namespace: Transient("503") if resource.kind in away else None
        it.source.cut()
        await asyncio.sleep(60)
        assert (it.store.ready("ml"), it.store.lost_watches()) == (False, 2)
        it.cluster.put(make.finetunejob("new"))
        away.remove("Job")
        await asyncio.sleep(60)
        assert (it.store.ready("ml"), it.woken) == (False, [])
        away.clear()
        await asyncio.sleep(2 * LONGEST_PAUSE)
        assert it.store.ready("ml")
        assert it.woken == [key("new")]

    scene(act)


def test_a_connection_that_breaks_once_is_taken_up_where_it_was():
    async def act(it):
        lists, broken = it.source.lists, []

        def fail(verb, resource, namespace):
            if verb == "watch" and resource not in broken:
                broken.append(resource)
                return Transient("reset")
            return None

        it.source.fail = fail
        it.source.cut()
        await asyncio.sleep(1)
        it.cluster.remove("FineTuneJob", "ml", "job-1")
        await asyncio.sleep(5)
        assert len(broken) == len(WATCHED)
        assert it.source.lists == lists
        assert "job-1" not in it.known()
        assert it.store.ready("ml")

    scene(act)


def test_patience_that_the_server_asks_for_is_had():
    async def act(it):
        asked = []

        def fail(verb, resource, namespace):
            asked.append(asyncio.get_running_loop().time())
            return Transient("429", retry_after=100.0)

        it.source.fail = fail
        it.source.cut()
        await asyncio.sleep(350)
        assert len(asked) <= 4 * len(WATCHED)

    scene(act)


def test_one_namespace_that_may_not_be_read_is_nothing_to_another():
    async def scenario():
        it = Scene(namespaces=("ml", "gone"))
        it.source.fail = lambda verb, resource, namespace: Rejected("forbidden") if namespace == "gone" else None
        it.cluster.put(make.finetunejob("a"))
        async with it.running():
            await asyncio.sleep(120)
            assert it.woken == [key("a")]
            assert (it.store.ready("ml"), it.store.ready("gone")) == (True, False)
            it.source.fail = lambda verb, resource, namespace: None
            it.cluster.put(make.finetunejob("b", namespace="gone"))
            await asyncio.sleep(60)
            assert it.woken == [key("a"), key("b", "gone")]

    virtually(scenario())


def test_permissions_taken_away_and_given_back_leave_no_trace():
    async def act(it):
        it.source.fail = lambda verb, resource, namespace: Rejected("forbidden")
        it.source.cut()
        await asyncio.sleep(300)
        assert len(it.known()) == 5, "what is known stays known: nothing says that it is gone"
        it.cluster.remove("FineTuneJob", "ml", "job-1")
        it.source.fail = lambda verb, resource, namespace: None
        await asyncio.sleep(2 * LONGEST_PAUSE)
        assert it.known() == {"job-0", "job-2", "job-3", "job-4"}

    scene(act)


def test_a_kind_that_is_no_longer_served_has_no_objects_until_it_is_again():
    async def act(it):
        it.source.fail = lambda verb, resource, namespace: Gone("no such kind") if resource == FINETUNEJOB else None
        it.source.cut()
        await asyncio.sleep(10)
        assert it.known() == set()
        it.source.fail = lambda verb, resource, namespace: None
        it.cluster.put(make.finetunejob("back"))
        await asyncio.sleep(10)
        assert "back" in it.known()

    scene(act)


def test_one_own_write_is_known_though_an_older_list_lacks_it():
    store = Store(lambda key: None, lambda key: None)
    raw = make.finetunejob("a")
    raw["metadata"] |= {"uid": "u1", "resourceVersion": "12"}
    store.wrote(FINETUNEJOB, raw)
    store.listed(FINETUNEJOB, None, set(), 11)
    assert store.custom_resource(key("a")) is not None
    store.listed(FINETUNEJOB, None, set(), 12)
    assert store.custom_resource(key("a")) is None


def test_a_change_that_no_decision_looks_at_wakes_nobody():
    woken = []
    store = Store(lambda key: None, woken.append)
    for resource in WATCHED:
        store.listed(resource, None, set(), 1)
    meta = {"namespace": "ml", "name": "a-1", "uid": "u2", "labels": {"tunesmith.dev/finetunejob": "a"}}
    job = {"kind": "Job", "metadata": {**meta, "resourceVersion": "5"}, "spec": {}, "status": {}}
    store.received(JOB, job)
    assert woken == [key("a")]
    store.received(JOB, job | {"metadata": {**meta, "resourceVersion": "6", "managedFields": [{"manager": "x"}]}})
    assert woken == [key("a")]
    store.received(JOB, job | {"metadata": {**meta, "resourceVersion": "7"}, "spec": {"suspend": True}})
    assert woken == [key("a"), key("a")]
    store.removed(JOB, job | {"metadata": {**meta, "resourceVersion": "8"}})
    assert woken == [key("a")] * 3
