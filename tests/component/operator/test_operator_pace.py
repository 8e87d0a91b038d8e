"""How often the operator writes: a thousand live jobs, refusals that never read the same, a server that asks for time.

The whole engine at work, with its queue, workers and pace; time is virtual, and the API server takes 10 ms.
"""

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from datetime import timedelta

import pytest

from support import make
from support.fakecluster import FakeCluster
from support.make import NOW
from support.virtualtime import virtually
from support.world import observing
from tunesmith_api.keys import FINETUNEJOB_KIND, Reason
from tunesmith_api.reports import ProgressReport, TrainerState
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_operator.adapters.errors import Invalid, Rejected, Transient
from tunesmith_operator.adapters.metrics import Metrics
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.engine.controller import Controller
from tunesmith_operator.engine.pacing import RequestPace
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.workqueue import WorkQueue

INDEX = "batch.kubernetes.io/job-completion-index"


class Live(FakeCluster):
    """Tells the operator of every change, and takes its time; `log` has each request with its moment."""

    def __init__(self):
        super().__init__()
        self.log = []
        self.answer = lambda verb, name: None

    async def _request(self, verb, name):
        await asyncio.sleep(0.01)
        error = self.answer(verb, name)
        self.log.append((asyncio.get_running_loop().time(), verb, name))
        if error is not None:
            raise error

    async def create(self, resource, namespace, body):
        await self._request(f"create {resource.kind}", body["metadata"]["name"])
        return await super().create(resource, namespace, body)

    async def apply_status(self, resource, namespace, name, uid, version, status):
        await self._request("status", name)
        return await super().apply_status(resource, namespace, name, uid, version, status)

    async def record(self, resource, key, uid, note, now):
        await self._request("event", key.name)
        await super().record(resource, key, uid, note, now)


class Operator:
    """The engine over that cluster."""

    def __init__(self, qps=20.0, burst=40, interval=3.0):
        loop = asyncio.get_running_loop()
        self.cluster, self.metrics, self.loop = Live(), Metrics(), loop
        self.step = None
        queue, cluster = WorkQueue(chance=random.Random(1)), self.cluster
        self.add = queue.add
        self.poller = Poller(self.fetch, self.now, interval, random.Random(2))
        self.controller = Controller(
            store=observing(cluster, self.poller.sample, queue.add),
            cluster=cluster,
            recorder=cluster,
            queue=queue,
            pace=RequestPace(qps, burst, self.metrics.token_seconds.observe),
            poller=self.poller,
            metrics=self.metrics,
            config=make.CONFIG,
            now=self.now,
            new_token=lambda: "token",
        )

    def now(self):
        return NOW + timedelta(seconds=self.loop.time())

    async def fetch(self, host, port):
        await asyncio.sleep(0.005)
        step = self.step or int(self.loop.time()) + 1  # each poll brings news, unless it is told otherwise
        return ProgressReport(
            state=TrainerState.TRAINING, global_step=step, max_steps=10**6, heartbeat_unix=self.now().timestamp()
        )

    @contextlib.asynccontextmanager
    async def running(self):
        self.controller.start()
        yield
        self.controller.check()
        await self.controller.stop()

    def is_running(self, name):
        """All that the operator would make for the job is there already, and worker 0 runs."""
        made = self.cluster.put(make.finetunejob(name, workers={"replicas": 1}))
        manifests = build(FineTuneJob.model_validate(made), make.CONFIG, 1)
        for manifest in (manifests.service, manifests.network_policy, manifests.config_map, manifests.job):
            self.cluster.put(dict(manifest.body))
        self.pod(name)

    def pod(self, name):
        job = self.cluster.get("Job", f"{name}-1")
        meta = {
            "name": f"{name}-1-0-x",
            "namespace": "ml",
            "labels": job["spec"]["template"]["metadata"]["labels"],
            "annotations": {INDEX: "0"},
            "ownerReferences": [{"kind": "Job", "uid": job["metadata"]["uid"], "controller": True}],
        }
        container = {"name": "trainer", "image": "i", "state": {"running": {"startedAt": make.stamp()}}}
        status = {"phase": "Running", "podIP": f"ip-{name}", "containerStatuses": [container]}
        self.cluster.put({"kind": "Pod", "metadata": meta, "spec": {}, "status": status})

    def fail(self, name):
        raw = self.cluster.get("Pod", f"{name}-1-0-x")
        ended = {
            "exitCode": 43,
            "message": make.failed(Reason.DIVERGED).to_json(),
            "finishedAt": make.stamp(self.loop.time()),
        }
        raw["status"]["containerStatuses"][0]["state"] = {"terminated": ended}
        self.cluster.put(raw)
        reason = {"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"}
        self.cluster.change("Job", f"{name}-1", {"status": {"conditions": [reason]}})

    async def until(self, name, type_, wanted):
        for _ in range(100_000):
            if self.condition(name, type_) == wanted:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"never {wanted}")

    def statuses(self, name=None, since=0.0):
        return [
            moment
            for moment, verb, of in self.cluster.log
            if verb == "status" and name in (None, of) and moment > since
        ]

    def condition(self, name, type_):
        found = self.cluster.get(FINETUNEJOB_KIND, name).get("status", {}).get("conditions", ())
        return next(((it["status"], it["reason"]) for it in found if it["type"] == type_), None)


def test_among_a_thousand_live_jobs_a_verdict_waits_for_no_progress():
    async def scenario():
        operator = Operator(qps=10_000, burst=10_000, interval=10.0)
        operator.cluster.find_invalid = lambda kind, status: None  # others look at what, this at when
        for number in range(1000):
            operator.is_running(f"job-{number}")
        async with operator.running():
            await asyncio.sleep(15)
            assert len(operator.poller) == 1000
            operator.controller._pace = RequestPace(20, 40)
            operator.controller._wrote_at.clear()  # as if 100 s had passed: each of them has numbers to write
            await asyncio.sleep(10)
            quiet, waits = operator.loop.time(), []
            for number in range(0, 1000, 100):
                began = operator.loop.time()
                operator.fail(f"job-{number}")
                await operator.until(f"job-{number}", "Succeeded", ("False", "Diverged"))
                waits.append(operator.loop.time() - began)
                await asyncio.sleep(3)
            return operator, quiet, operator.loop.time() - quiet, waits

    operator, quiet, spent, waits = virtually(scenario())
    assert max(waits) < 0.5, "a verdict is written at once"
    progress = len(operator.statuses(since=quiet)) - len(waits)
    assert 4 <= progress / spent <= 10.5, "of 20 requests a second, progress takes half at most"
    counts = Counter(name for moment, verb, name in operator.cluster.log if verb == "status" and moment > quiet)
    assert max(counts.values()) <= 2, "numbers once in 100 s, and a verdict"
    requests = sum(moment > quiet for moment, *_ in operator.cluster.log)
    assert requests <= 40 + 20 * spent, "every request has taken a token"


def test_a_running_job_is_written_once_in_ten_seconds_and_not_at_all_without_news():
    async def scenario():
        operator = Operator()
        async with operator.running():
            operator.cluster.put(make.finetunejob("job", workers={"replicas": 1}))
            await asyncio.sleep(5)
            operator.pod("job")
            await asyncio.sleep(30)
            began = operator.loop.time()
            await asyncio.sleep(300)
            written = operator.statuses("job", since=began)
            operator.step = 77
            began = operator.loop.time()
            await asyncio.sleep(110)
            return written, [entry for entry in operator.cluster.log if entry[0] > began + 11]

    written, later = virtually(scenario())
    assert 24 <= len(written) <= 30
    assert min(later - earlier for earlier, later in itertools.pairwise(written)) >= 9.9
    assert later == []


def never_the_same(operator):
    return Rejected(f"denied by a webhook at {operator.loop.time():.6f}")


@pytest.mark.parametrize("refused", ["create Service", "create Job", "status"])
def test_a_refusal_whose_words_vary_is_tried_and_written_by_its_backoff_alone(refused):
    async def scenario():
        operator = Operator()
        operator.cluster.answer = lambda verb, name: never_the_same(operator) if verb == refused else None
        async with operator.running():
            operator.cluster.put(make.finetunejob("job"))
            for _ in range(600):
                await asyncio.sleep(0.1)
                operator.add(Key(FINETUNEJOB_KIND, "ml", "job"))  # whatever happens around it
            log = list(operator.cluster.log)
            operator.cluster.answer = lambda verb, name: None
            operator.cluster.change(FINETUNEJOB_KIND, "job", {"spec": {"suspend": False}})
            await asyncio.sleep(2)
            return log, operator.condition("job", "ChildrenApplied")

    log, applied = virtually(scenario())
    assert 5 <= sum(verb == refused for _, verb, _ in log) <= 7
    assert sum(verb == "status" for _, verb, _ in log) <= 7
    assert applied == ("True", "Applied"), "a changed spec is tried at once"


def test_a_child_that_is_refused_for_ever_keeps_no_verdict_back():
    async def scenario():
        operator = Operator()
        async with operator.running():
            operator.cluster.put(make.finetunejob("job", workers={"replicas": 1}))
            await asyncio.sleep(5)
            operator.pod("job")
            await asyncio.sleep(20)
            operator.cluster.answer = lambda verb, name: (
                never_the_same(operator) if verb == "create NetworkPolicy" else None
            )
            operator.cluster.remove("NetworkPolicy", "ml", "job-workers")
            operator.add(Key(FINETUNEJOB_KIND, "ml", "job"))
            await asyncio.sleep(60)
            moved = {
                it["lastTransitionTime"]
                for it in operator.cluster.get(FINETUNEJOB_KIND, "job")["status"]["conditions"]
                if it["type"] == "ChildrenApplied"
            }
            operator.fail("job")
            began = operator.loop.time()
            await operator.until("job", "Succeeded", ("False", "Diverged"))
            return moved, operator.loop.time() - began

    moved, waited = virtually(scenario())
    assert moved == {make.stamp(25)}, "it became False once"
    assert waited < 0.5


def test_a_server_that_asks_for_patience_gets_it_for_that_job_alone():
    async def scenario():
        operator = Operator()
        busy = Transient("too many requests", retry_after=30.0)
        operator.cluster.answer = lambda verb, name: busy if name == "one-1" and operator.loop.time() < 10 else None
        async with operator.running():
            operator.cluster.put(make.finetunejob("one"))
            operator.cluster.put(make.finetunejob("other"))
            for _ in range(290):
                await asyncio.sleep(0.1)
                operator.add(Key(FINETUNEJOB_KIND, "ml", "one"))
            early = [name for _, _, name in operator.cluster.log]
            await asyncio.sleep(10)
            return early, operator

    early, operator = virtually(scenario())
    assert early.count("one-1") == 1
    assert "other-1" in early
    assert operator.cluster.get("Job", "one-1") is not None


def test_a_status_that_is_found_invalid_loses_its_numbers_and_not_its_verdict(caplog):
    async def scenario():
        operator = Operator()

        def refuses(kind, status):
            return "status.progress: Invalid value" if "progress" in status else None

        async with operator.running():
            operator.cluster.put(make.finetunejob("job", workers={"replicas": 1}))
            await asyncio.sleep(5)
            operator.cluster.find_invalid = refuses
            operator.pod("job")
            await asyncio.sleep(20)
            training = operator.condition("job", "Succeeded")
            operator.fail("job")
            await asyncio.sleep(21)
            return operator, training

    operator, training = virtually(scenario())
    assert training == ("Unknown", "Training")
    status = operator.cluster.get(FINETUNEJOB_KIND, "job")["status"]
    assert operator.condition("job", "Succeeded") == ("False", "Diverged")
    assert status["phase"] == "Failed"
    assert "completionTime" in status
    assert "progress" not in status
    assert operator.metrics.refused_statuses.labels(FINETUNEJOB_KIND)._value.get() >= 1
    assert "writing its conditions and phase alone" in caplog.text
    assert len(operator.statuses()) <= 14
    assert ("Warning", "Diverged") in operator.cluster.events
    assert issubclass(Invalid, Rejected)
