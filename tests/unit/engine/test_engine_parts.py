"""Snapshots and the poller."""

import asyncio
import contextlib
from datetime import timedelta

from support import make
from tunesmith_api.reports import ProgressReport, TrainerState
from tunesmith_operator.core.kinds import owner_key
from tunesmith_operator.core.kubernetes.resources import FINETUNEJOB, Key
from tunesmith_operator.core.pods.figures import Figures
from tunesmith_operator.core.reconcile.progress import (
    LoadTarget,
    PollTarget,
    QuotaSample,
    QuotaTarget,
    ServersTarget,
)
from tunesmith_operator.core.reconcile.unreadable import Unreadable
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.store import Store

KEY = Key("FineTuneJob", "ml", "sentiment")


def custom(version, uid="u1", **status):
    raw = make.finetunejob()
    raw["metadata"] |= {"uid": uid, "resourceVersion": str(version)}
    return raw | {"status": status}


def store(*raws):
    known = Store(lambda key: None, lambda key: None)
    for raw in raws:
        known.received(FINETUNEJOB, raw)
    return known


def test_a_status_just_written_is_observed_before_the_watch_delivers_it():
    known = store(custom(5))
    known.wrote(FINETUNEJOB, custom(7, phase="Training"))
    known.received(FINETUNEJOB, custom(6, phase="Pending"))
    assert known.custom_resource(KEY).status.phase == "Training"


def test_a_status_written_to_a_predecessor_is_not_observed_on_its_namesake():
    known = store(custom(9, uid="new"))
    known.wrote(FINETUNEJOB, custom(7, uid="old", phase="Training"))
    assert known.custom_resource(KEY).status.phase == "Pending"


def test_what_is_not_indexed_is_absent():
    assert store().custom_resource(KEY) is None


def test_an_unreadable_spec_is_described_and_keeps_its_status():
    raw = custom(5, phase="Training")
    raw["spec"]["training"] = {"learningRate": "3"}
    found = store(raw).custom_resource(KEY)
    assert isinstance(found, Unreadable)
    assert "spec.training.learningRate" in found.message
    assert found.status.phase == "Training"


def test_the_owner_is_told_by_the_labels():
    assert owner_key("ml", {"tunesmith.dev/finetunejob": "a"}) == Key("FineTuneJob", "ml", "a")
    assert owner_key("ml", {"tunesmith.dev/modeldeployment": "b"}) == Key("ModelDeployment", "ml", "b")
    assert owner_key("ml", {"app": "x"}) is None


async def rounds(poller, count):
    news = []
    task = asyncio.create_task(poller.run(lambda key, moved: news.append((key, moved))))
    await asyncio.sleep(0.02 * count)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return news


class Pod:
    def __init__(self, *reports):
        self.reports, self.asked = list(reports), 0

    async def __call__(self, host, port):
        self.asked += 1
        return self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]


async def test_news_wakes_the_controller_and_no_news_does_not():
    saving = {"global_step": 2, "state": TrainerState.SAVING}
    reports = [{"global_step": 1}, {"global_step": 1}, {"global_step": 2}, saving, saving | {"restarts": 1}]
    pod = Pod(*(ProgressReport(**report) for report in reports))
    poller = Poller(pod, make.at, 0.001)
    poller.follow(KEY, PollTarget("u1", "10.0.0.1", 8080))
    news = await rounds(poller, 5)
    assert pod.asked > 5
    assert news == [(KEY, True), (KEY, False), (KEY, True), (KEY, True)], "whether more than numbers has moved"
    assert poller.sample(KEY).report.global_step == 2


async def test_a_silent_heartbeat_keeps_the_time_of_the_last_sign_of_life():
    moments = iter(range(1000))
    pod = Pod(
        ProgressReport(heartbeat_unix=5.0),
        ProgressReport(heartbeat_unix=6.0),
        ProgressReport(heartbeat_unix=6.0, global_step=1),
    )
    poller = Poller(pod, lambda: make.NOW + timedelta(seconds=next(moments)), 0.001)
    poller.follow(KEY, PollTarget("u1", "10.0.0.1", 8080))
    await rounds(poller, 3)
    assert poller.sample(KEY).report.global_step == 1
    assert poller.sample(KEY).alive_at == make.at(1)


async def test_kueue_is_asked_until_it_says_something_and_then_seldom():
    answers = [None, "", "no quota", "still no quota"]

    async def quota(namespace, job_uid):
        assert (namespace, job_uid) == ("ml", "j")
        return answers.pop(0)

    poller = Poller(Pod(None), make.at, 0.001, quota=quota)
    poller.follow(KEY, QuotaTarget("ml", "j"))
    assert await rounds(poller, 10) == [(KEY, True)]
    assert poller.sample(KEY) == QuotaSample("j", "no quota")
    assert answers == ["still no quota"], "its words are no progress"
    poller.follow(KEY, None)
    assert poller.sample(KEY) is None


async def test_servers_are_added_up_and_a_new_window_counts_anew():
    counted = {"10.0.0.1": 10.0, "10.0.0.2": 5.0}

    async def figures(host, port):
        if host == "10.0.0.3":
            raise TimeoutError
        counted[host] += 1
        return Figures(counted[host], 1.0)

    poller = Poller(Pod(None), make.at, 0.001, figures=figures)
    pods = tuple((host[-1], host) for host in (*counted, "10.0.0.3"))
    poller.follow(KEY, ServersTarget("r2/0", pods, 8080))
    news = await rounds(poller, 2)
    assert news[0] == (KEY, True)
    first = poller.sample(KEY)
    assert (first.window, first.figures) == ("r2/0", Figures(sum(counted.values()), 2.0))
    poller.follow(KEY, ServersTarget("r2/1", pods, 8080))
    await rounds(poller, 2)
    second = poller.sample(KEY)
    assert (second.window, second.figures) == ("r2/1", Figures(sum(counted.values()) - first.figures.requests, 0.0))
    poller.follow(KEY, None)
    assert poller.sample(KEY) is None


async def test_requests_in_flight_are_heard_as_often_as_is_asked_and_news_only_where_they_change():
    heard = iter([0.0, 0.0, 3.0, 3.0])

    async def figures(host, port):
        return Figures(in_flight=next(heard))

    poller = Poller(Pod(None), make.at, 1000.0, figures=figures)
    poller.follow(KEY, ServersTarget("", (), 8080, LoadTarget((("a", "10.0.0.1"),), 1, 60.0, 0.001)))
    news, enough = [], asyncio.Event()

    def told(key, moved):
        news.append(poller.sample(key).load)
        if news[-1].sustained:
            enough.set()

    task = asyncio.create_task(poller.run(told))
    async with asyncio.timeout(30):
        await enough.wait()
    task.cancel()
    assert [(it.in_flight, it.before) for it in news] == [(0.0, 0.0), (3.0, 0.0), (3.0, 3.0)]


async def test_a_pod_that_does_not_answer_is_no_news_and_an_unfollowed_one_is_forgotten():
    pod = Pod(None)
    poller = Poller(pod, make.at, 0.001)
    poller.follow(KEY, PollTarget("u1", "10.0.0.1", 8080))
    assert await rounds(poller, 2) == []
    poller.follow(KEY, None)
    asked = pod.asked
    await rounds(poller, 2)
    assert pod.asked == asked
    assert poller.sample(KEY) is None
