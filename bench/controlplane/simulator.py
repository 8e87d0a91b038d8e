"""Nodes and pods without containers. `python -m bench.controlplane.simulator KUBECONFIG`: runs until its input closes.

It registers nodes, renews their leases and, as a kubelet does, reports every pod that the real scheduler has placed: Running,
later its end, and the deletion. Every pod has an address of its own, at which the progress of its job is served. What pods do is
told by JSON objects, one a line, on standard input (`Orders`); when the last running trainer has been told to end, `idle` is said.
Runs in the cluster's network.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aiohttp import web

from bench.controlplane.api import JSON, Api, Refused
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.reports import CheckpointRef, ModelRef, Outcome, ProgressReport, TerminationReport, TrainerState

NODES = 12
PODS_PER_NODE = 1500
LEASE_SECONDS = 3.0
STEPS = 1_000_000
INDEX = "batch.kubernetes.io/job-completion-index"
# pods of Ray and of a model server run until they are deleted
STAY = (keys.SERVER_CONTAINER, "ray-head", "ray-worker")
# the submitter of a RayJob is a Job of its name
JOB_NAME, PORT_RAY_DASHBOARD = "batch.kubernetes.io/job-name", 8265
ARTIFACT = ModelRef(uri="s3://models/base/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)
QUANTIZED = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=ARTIFACT)


@dataclass
class Orders:
    """What pods do from now on. A line of input changes the fields that it names."""

    run_seconds: float = 5.0
    """A trainer ends after so long; below 0: it runs until told to finish."""
    addresses: bool = True
    """Whether pods get an address."""
    serve: bool = True
    """Whether progress is answered."""
    moving: bool = False
    """Whether the step moves each second; else reports stay the same but for the heartbeat."""
    finish: list[str] = field(default_factory=list)
    """Jobs that end now."""
    finish_per_second: float = 0.0
    """All that run end now, at this pace."""


def address(number: int) -> str:
    """The pod's address: all of 10.244/16 leads to this process."""
    return f"10.244.{number // 250 % 250}.{number % 250 + 1}"


def stamp() -> str:
    """Now, as Kubernetes writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def succeeded(name: str) -> str:
    """What worker 0 of a job leaves."""
    return TerminationReport(
        outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="10 steps, loss 2.1 to 0.4", global_step=10, max_steps=10,
        checkpoint=CheckpointRef(step=10, uri=f"s3://checkpoints/{name}/step-00000010"),
        model=ModelRef(uri=f"s3://models/{name}", digest="d" * 64, size_bytes=12), metrics={"trainLoss": 0.4123, "evalLoss": 0.5},
    ).to_json()  # fmt: skip


class Pod:
    """One pod: what it was told, what it has reported."""

    def __init__(self, body: JSON, number: int) -> None:
        meta, box = body["metadata"], body["spec"]["containers"][0]
        self.path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        self.box = box["name"]
        self.image = box["image"]
        labels = meta.get("labels", {})
        self.ours = keys.LABEL_FINETUNEJOB in labels
        self.name = labels.get(keys.LABEL_FINETUNEJOB) or labels.get(JOB_NAME) or meta["name"]
        self.index = int(meta.get("annotations", {}).get(INDEX, 0))
        self.started = body["metadata"]["creationTimestamp"]
        self.ip = address(number)
        self.phase = ""
        self.ending = False
        self.scheduled = [it for it in body["status"].get("conditions", []) if it["type"] == "PodScheduled"]

    def status(self, state: JSON, phase: str, ready: bool, ip: bool) -> JSON:
        """The status with one container in that state."""
        conditions = [{"type": it, "status": str(ready)} for it in ("Ready", "ContainersReady", "Initialized")]
        container = {
            "name": self.box, "image": self.image, "imageID": "", "ready": ready, "restartCount": 0, "started": ready, "state": state
        }  # fmt: skip
        found = {"phase": phase, "containerStatuses": [container], "conditions": [*self.scheduled, *conditions]}
        return found | ({"podIP": self.ip, "podIPs": [{"ip": self.ip}]} if ip else {})

    def running(self, ip: bool) -> JSON:
        """The container runs."""
        return self.status({"running": {"startedAt": self.started}}, "Running", True, ip)

    def ended(self, code: int, message: str = "") -> JSON:
        """The container has ended."""
        state = {
            "exitCode": code, "reason": "Error" if code else "Completed", "startedAt": self.started, "finishedAt": stamp(),
            "message": message,
        }  # fmt: skip
        return self.status({"terminated": state}, "Failed" if code else "Succeeded", False, False)


class Simulator:
    """All nodes and pods."""

    def __init__(self, api: Api) -> None:
        self.orders = Orders()
        self._api = api
        self._pods: dict[str, Pod] = {}
        self._by_ip: dict[str, Pod] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = time.monotonic()
        self._made = 0

    # --- nodes ---

    async def register(self) -> None:
        """Make the nodes."""
        amounts = {"cpu": "100000", "memory": "400000Gi", "pods": str(PODS_PER_NODE), "ephemeral-storage": "400000Gi"}
        ready = {"type": "Ready", "status": "True", "reason": "Simulated", "lastHeartbeatTime": stamp()}
        for number in range(NODES):
            name = f"simulated-{number}"
            metadata = {"name": name, "labels": {"kubernetes.io/hostname": name}}
            await self._api.create("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": metadata})
            status = {"status": {"capacity": amounts, "allocatable": amounts, "conditions": [ready]}}
            await self._api.merge(f"/api/v1/nodes/{name}/status", status)
            lease = {
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name, "namespace": "kube-node-lease"},
                "spec": {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": _now()},
            }  # fmt: skip
            await self._api.create("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", lease)

    async def beat(self) -> None:
        """Keep the nodes ready."""
        leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        while True:
            await asyncio.sleep(LEASE_SECONDS)
            for number in range(NODES):
                with contextlib.suppress(Refused):
                    await self._api.merge(f"{leases}/simulated-{number}", {"spec": {"renewTime": _now()}})

    # --- pods ---

    async def follow(self) -> None:
        """Do what kubelets do."""
        await self._api.follow("/api/v1/pods?fieldSelector=spec.nodeName!%3D", self._seen)

    def _seen(self, change: str, body: JSON) -> None:
        uid = body["metadata"]["uid"]
        if change == "DELETED":
            if pod := self._pods.pop(uid, None):
                self._by_ip.pop(pod.ip, None)
            return
        pod = self._pods.get(uid)
        if pod is None:
            self._made += 1
            pod = self._pods[uid] = Pod(body, self._made)
        if body["metadata"].get("deletionTimestamp"):
            if not pod.ending:
                pod.ending = True
                self._start(self._remove(pod))
        elif not pod.phase and body["status"].get("phase") == "Pending":
            pod.phase = "Running"
            self._start(self._run(pod))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(_quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, pod: Pod) -> None:
        if pod.box == keys.QUANTIZE_CONTAINER:
            await self._report(pod, pod.ended(0, QUANTIZED.to_json()))
            return
        self._by_ip[pod.ip] = pod
        await self._report(pod, pod.running(self.orders.addresses))
        if pod.box not in STAY and self.orders.run_seconds >= 0:
            await asyncio.sleep(self.orders.run_seconds)
            await self._end(pod)

    async def _end(self, pod: Pod) -> None:
        """Worker 0 of ours succeeds; the Job controller then ends the others, by the Job's success policy. Others' pods all end."""
        if (pod.index == 0 or not pod.ours) and pod.phase == "Running" and not pod.ending:
            pod.phase = "Succeeded"
            await self._report(pod, pod.ended(0, succeeded(pod.name)))

    async def _remove(self, pod: Pod) -> None:
        if pod.phase != "Succeeded":
            await self._report(pod, pod.ended(143))
        await self._api.call("DELETE", pod.path, {"gracePeriodSeconds": 0})

    async def dashboard(self, request: web.Request) -> web.Response:
        """What a Ray head says of its job, to KubeRay."""
        wanted = request.match_info["job"]
        ended = any(it.name == wanted and it.box not in STAY and it.phase == "Succeeded" for it in self._pods.values())
        status = "SUCCEEDED" if ended else "RUNNING"
        return web.json_response({"job_id": wanted, "submission_id": wanted, "status": status, "type": "SUBMISSION"})

    async def _report(self, pod: Pod, status: JSON) -> None:
        await self._api.merge(f"{pod.path}/status", {"status": status})

    # --- orders ---

    async def obey(self, line: str) -> None:
        """Change what pods do."""
        for name, value in json.loads(line).items():
            setattr(self.orders, name, value)
        assert set(vars(self.orders)) == {it.name for it in fields(Orders)}, line
        if self.orders.finish:
            chosen, self.orders.finish = set(self.orders.finish), []
            for pod in self._running():
                if pod.name in chosen:
                    self._start(self._end(pod))
        if self.orders.finish_per_second:
            pace, self.orders.finish_per_second = 1 / self.orders.finish_per_second, 0.0
            self._start(self._finish_all(pace))

    def _running(self) -> list[Pod]:
        return [
            it
            for it in self._pods.values()
            if it.phase == "Running" and it.box not in STAY and (it.index == 0 or not it.ours)
        ]

    async def _finish_all(self, pace: float) -> None:
        begun = time.monotonic()
        for number, pod in enumerate(self._running()):
            await asyncio.sleep(max(0.0, begun + number * pace - time.monotonic()))
            self._start(self._end(pod))

    # --- progress ---

    async def progress(self, request: web.Request) -> web.Response:
        """What worker 0 of the job at that address has got to."""
        assert request.transport is not None
        pod = self._by_ip.get(request.transport.get_extra_info("sockname")[0])
        if pod is None or not self.orders.serve:
            raise web.HTTPServiceUnavailable
        step = int(time.monotonic() - self._began) if self.orders.moving else 5
        report = ProgressReport(
            state=TrainerState.TRAINING, global_step=step, max_steps=STEPS, loss=2.0 / (1 + step / 100), heartbeat_unix=time.time(),
            workers_joined=2, eta_seconds=STEPS - step,
        )  # fmt: skip
        return web.Response(text=report.to_json(), content_type="application/json")


async def _quietly(work: Any) -> None:
    """A pod that is gone, or was changed by another in between, is no failure of a kubelet."""
    try:
        await work
    except Refused as error:
        if error.status not in (404, 409):
            print(f"simulator: {error}", file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def simulate(kubeconfig: Path) -> None:
    """Run until standard input closes."""
    async with Api(kubeconfig, connections=48) as api:
        simulator = Simulator(api)
        await simulator.register()
        app = web.Application()
        app.router.add_get(keys.PATH_PROGRESS, simulator.progress)
        runner = web.AppRunner(app, access_log=None)
        app.router.add_get("/api/jobs/{job}", simulator.dashboard)
        await runner.setup()
        for port in (keys.PORT_PROGRESS, PORT_RAY_DASHBOARD):
            await web.TCPSite(runner, "0.0.0.0", port).start()
        work = [asyncio.create_task(simulator.follow()), asyncio.create_task(simulator.beat())]
        print("ready", flush=True)
        reader = await _lines()
        while line := await reader.readline():
            await simulator.obey(line.decode())
            print("done", flush=True)
        for task in work:
            task.cancel()
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(simulate(Path(sys.argv[1])))
