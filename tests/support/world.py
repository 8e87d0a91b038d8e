"""A whole operator on an in-memory cluster, in slow motion: one steady state after another, with a clock of its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from support.fakecluster import Crash, FakeCluster
from support.make import CONFIG, NOW, stamp
from tunesmith_api import keys
from tunesmith_api.reports import ProgressReport, TerminationReport
from tunesmith_operator.adapters.metrics import Metrics
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kinds import KINDS
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import Sample
from tunesmith_operator.engine.controller import Controller
from tunesmith_operator.engine.pacing import RequestPace
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.store import WATCHED, Store
from tunesmith_operator.engine.workqueue import WorkQueue

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def observing(
    cluster: FakeCluster,
    progress: Callable[[Key], Sample | None],
    wake: Callable[[Key], None] = lambda key: None,
) -> Store:
    """A store that has listed the cluster and hears of every change at once."""
    store = Store(progress, wake)
    for resource in WATCHED:
        seen = {store.received(resource, raw) for raw in cluster.of_kind(resource.kind)}
        store.listed(resource, None, seen, cluster.version)
    watched = {resource.kind: resource for resource in WATCHED}

    def deliver(type_: str, raw: dict[str, Any]) -> None:
        resource = watched.get(raw["kind"])
        if resource is not None:
            store.removed(resource, raw) if type_ == "DELETED" else store.received(resource, raw)

    cluster.on_change = deliver
    return store


class World:
    """`reconcile` goes on until nothing is written any more; a Crash in between restarts the operator."""

    def __init__(self, config: Config = CONFIG) -> None:
        self.cluster, self.config, self.now = FakeCluster(), config, NOW
        self.samples: dict[Key, Sample] = {}
        self.restarts = 0
        self._boot()

    def _boot(self) -> None:
        async def nothing(host: str, port: int) -> ProgressReport | None:
            return None

        def seconds() -> float:
            return (self.now - NOW).total_seconds()

        self.store = observing(self.cluster, self.samples.get)
        self.controller = Controller(
            store=self.store, cluster=self.cluster, recorder=self.cluster,
            queue=WorkQueue(chance=random.Random(1), clock=seconds), pace=RequestPace(1e6, 10**6),
            poller=Poller(nothing, lambda: self.now, 3.0), metrics=Metrics(), config=self.config,
            now=lambda: self.now, new_token=lambda: "token",
        )  # fmt: skip

    def reconcile(self) -> None:
        """Reconcile all custom resources until a whole round writes nothing."""
        for _ in range(40):
            before = len(self.cluster.writes)
            try:
                asyncio.run(self._round())
            except Crash:
                self.restarts += 1
                self._boot()
                continue
            if len(self.cluster.writes) == before:
                return
        raise AssertionError(f"it never comes to rest: {self.cluster.writes[-12:]}")

    async def _round(self) -> None:
        for kind in KINDS:
            for raw in self.cluster.of_kind(kind.resource.kind):
                await self.controller.process(kind.key(raw["metadata"]["namespace"], raw["metadata"]["name"]))

    def wait(self, seconds: float) -> None:
        """Let time pass, then reconcile."""
        self.now += timedelta(seconds=seconds)
        self.reconcile()

    def stamp(self) -> str:
        """Now, as Kubernetes writes it."""
        return stamp((self.now - NOW).total_seconds())

    # --- the cluster's controllers and kubelets ---

    def pod(self, job_name: str, index: int = 0, suffix: str = "", ready: bool = False, **status: Any) -> str:
        """A pod of a Job, scheduled, its container running unless `status` says otherwise; returns its name."""
        job = self.cluster.get("Job", job_name)
        assert job is not None, f"no Job {job_name}"
        name = f"{job_name}-{index}-x{suffix}"
        container = job["spec"]["template"]["spec"]["containers"][0]
        running = {
            "name": container["name"],
            "image": container["image"],
            "state": {"running": {"startedAt": self.stamp()}},
        }
        conditions = [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": self.stamp()},
            {"type": "Ready", "status": "True" if ready else "False"},
        ]
        meta = {
            "name": name,
            "namespace": job["metadata"]["namespace"],
            "labels": job["spec"]["template"]["metadata"]["labels"],
            "annotations": {INDEX_LABEL: str(index)},
            "creationTimestamp": self.stamp(),
            "ownerReferences": [{"kind": "Job", "uid": job["metadata"]["uid"], "controller": True}],
        }
        base = {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions, "containerStatuses": [running]}
        self.cluster.put({"kind": "Pod", "metadata": meta, "spec": {}, "status": {**base, **status}})
        return name

    def exits(self, pod: str, code: int, report: TerminationReport | str = "", reason: str = "") -> None:
        """The pod's container ends; the kubelet hasn't torn the pod down yet, so that its phase is the same."""
        raw = self.cluster.get("Pod", pod)
        assert raw is not None
        message = report if isinstance(report, str) else report.to_json()
        container = raw["status"]["containerStatuses"][0]
        ended = {"exitCode": code, "message": message, "reason": reason or "Error", "finishedAt": self.stamp()}
        raw["status"]["containerStatuses"] = [{**container, "state": {"terminated": ended}}]
        raw["status"]["conditions"] = [it for it in raw["status"]["conditions"] if it["type"] != "Ready"]
        self.cluster.put(raw)

    def ends(self, pod: str, code: int, report: TerminationReport | str = "", reason: str = "") -> None:
        """The pod's container ends, and with it the pod."""
        self.exits(pod, code, report, reason)
        self.cluster.change("Pod", pod, {"status": {"phase": "Succeeded" if code == 0 else "Failed"}})

    def terminates(self, pod: str) -> None:
        """Somebody deletes the pod; its container has its grace period."""
        self.cluster.change("Pod", pod, {"metadata": {"deletionTimestamp": self.stamp()}})

    def job_is(self, name: str, type_: str, reason: str = "", message: str = "", status: str = "True") -> None:
        """The Job controller sets a condition."""
        raw = self.cluster.get("Job", name)
        assert raw is not None
        known = raw.get("status", {}).get("conditions", [])
        entry = {
            "type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": self.stamp(),
        }  # fmt: skip
        kept = [it for it in known if it["type"] != type_]
        self.cluster.change("Job", name, {"status": {"conditions": [*kept, entry]}})

    def rolls_out(self, name: str, available: int | None = None) -> None:
        """The Deployment controller brings up so many replicas (all by default)."""
        raw = self.cluster.get("Deployment", name)
        assert raw is not None, f"no Deployment {name}"
        count = raw["spec"]["replicas"] if available is None else available
        status = {
            "observedGeneration": 99, "replicas": count, "updatedReplicas": count, "readyReplicas": count,
            "availableReplicas": count,
        }  # fmt: skip
        self.cluster.change("Deployment", name, {"status": status})

    # --- looking ---

    def observed(self, key: Key) -> Any:
        """What its kind's `decide` is given to decide about."""
        return self.store.observe(key, self.store.custom_resource(key))

    def status(self, kind: str = keys.FINETUNEJOB_KIND, name: str = "sentiment") -> dict[str, Any]:
        """The status of a custom resource."""
        raw = self.cluster.get(kind, name)
        assert raw is not None
        status: dict[str, Any] = raw.get("status", {})
        return status

    def condition(self, type_: str, kind: str = keys.FINETUNEJOB_KIND, name: str = "sentiment") -> tuple[str, str, str]:
        """(status, reason, message) of a condition."""
        found = [it for it in self.status(kind, name).get("conditions", ()) if it["type"] == type_]
        return (found[0]["status"], found[0]["reason"], found[0]["message"]) if found else ("", "", "")
