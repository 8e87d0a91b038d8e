"""What Kubernetes does by itself: Job and Deployment controller, kubelets, garbage collector; on a FakeCluster.

`simulation.world` runs it, one step a second. Nothing here knows of the operator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from support import make
from support.fakecluster import FakeCluster
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.reports import (
    CheckpointRef,
    ModelRef,
    Outcome,
    ProgressReport,
    TerminationReport,
    TrainerState,
)
from tunesmith_api.v1alpha1.gate import Estimate, Evaluation
from tunesmith_api.v1alpha1.gate import Figures as Measured
from tunesmith_operator.core.pods.figures import Figures

JSON = dict[str, Any]
INDEX = "batch.kubernetes.io/job-completion-index"
STARTS_AFTER, AVAILABLE_AFTER, QUANTIZED_AFTER, GRACE = 2, 4, 5, 2
STEPS = 30
_SAME = Measured(tokens_per_second="1000.00", size_bytes=1, memory_bytes=1)
_NONE, _ALL = Estimate(value="0.00", low="0.00", high="0.00"), Estimate(value="100.00", low="100.00", high="100.00")
NO_LOSS = Evaluation(
    examples=10,
    baseline=_SAME,
    quantized=_SAME,
    perplexity_increase_percent=_NONE,
    accuracy_drop_percent=_NONE,
    agreement_percent=_ALL,
)
"""What any gate lets pass: the quantizer of this cluster loses nothing."""


class Kubernetes:
    """Steps through the life of all pods. `exit_of` may give a trainer's end other than success."""

    def __init__(self, cluster: FakeCluster, stamp: Callable[[], str], unix: Callable[[], float]) -> None:
        self._cluster, self._stamp, self._unix = cluster, stamp, unix
        self._ages: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self._made = 0
        self.error_percent: Callable[[JSON], float] = lambda pod: 0.0
        """Of the requests that a server pod answers, ten a second."""
        self.exit_of: Callable[[JSON], tuple[int, str] | None] = lambda pod: None
        self.last_step = STEPS
        """Trainers get so far; only at the end of STEPS they end."""

    async def run(self) -> None:
        """Step by step until cancelled."""
        while True:
            self.step()
            await asyncio.sleep(1.0)

    def step(self) -> None:
        """One second's worth."""
        self._collect()
        for job in self._cluster.of_kind("Job"):
            self._follow_job(job)
        for deployment in self._cluster.of_kind("Deployment"):
            self._follow_deployment(deployment)
        for pod in self._cluster.of_kind("Pod"):
            self._follow_pod(pod)

    def progress(self, host: str) -> ProgressReport | None:
        """What worker 0 at that address says."""
        pod = next((it for it in self._cluster.of_kind("Pod") if it["status"].get("podIP") == host), None)
        if pod is None or not _runs(pod):
            return None
        step = self._steps.get(self._run_of(pod), 0)
        return ProgressReport(
            state=TrainerState.TRAINING, global_step=step, max_steps=STEPS, loss=2.0 / (1 + step), heartbeat_unix=self._unix(),
            workers_joined=2, checkpoint=CheckpointRef(step=step // 10 * 10, uri=f"s3://c/{step // 10 * 10}") if step >= 10 else None,
        )  # fmt: skip

    def figures(self, host: str) -> Figures | None:
        """What the server at that address has counted."""
        pod = next((it for it in self._cluster.of_kind("Pod") if it["status"].get("podIP") == host), None)
        if pod is None or not _runs(pod):
            return None
        requests = 10.0 * self._ages.get(pod["metadata"]["uid"], 0)
        return Figures(requests, requests * self.error_percent(pod) / 100, {0.1: requests})

    # --- garbage collector ---

    def _collect(self) -> None:
        uids = {raw["metadata"]["uid"] for raw in self._cluster.objects.values()}
        for (kind, namespace, name), raw in list(self._cluster.objects.items()):
            owners = raw["metadata"].get("ownerReferences")
            if owners and not any(owner["uid"] in uids for owner in owners):
                self._cluster.remove(kind, namespace, name, cascade=False)

    # --- controllers ---

    def _follow_job(self, job: JSON) -> None:
        spec, status = job["spec"], job.get("status", {})
        conditions = {it["type"]: it for it in status.get("conditions", ())}
        if "Complete" in conditions or "Failed" in conditions:
            return
        pods = self._pods_of(job)
        indexed = spec.get("completionMode") == "Indexed"
        heads = [pod for pod in pods if _index(pod) == 0]
        done = any(pod["status"]["phase"] == "Succeeded" for pod in heads)
        failed = [pod for pod in pods if pod["status"]["phase"] == "Failed" and _exit_code(pod) in FINAL_CODES]
        if done or "SuccessCriteriaMet" in conditions:
            left = [pod for pod in pods if pod["status"]["phase"] == "Running"]
            if indexed and "SuccessCriteriaMet" not in conditions:
                self._condition(job, "SuccessCriteriaMet", "True", "SuccessPolicy")
            elif left:
                for pod in left:
                    self._terminate(pod)
            else:
                self._condition(job, "Complete", "True", "", completionTime=self._stamp())
        elif failed or "FailureTarget" in conditions:
            kind = "Failed" if "FailureTarget" in conditions else "FailureTarget"
            self._condition(job, kind, "True", "PodFailurePolicy")
        elif spec.get("suspend"):
            for pod in pods:
                self._terminate(pod)
            if conditions.get("Suspended", {}).get("status") != "True":
                self._condition(job, "Suspended", "True", "JobSuspended", startTime=None)
        elif conditions.get("Suspended", {}).get("status") == "True":
            self._condition(job, "Suspended", "False", "JobResumed", startTime=self._stamp())
        elif "startTime" not in status:
            self._cluster.change("Job", job["metadata"]["name"], {"status": {"startTime": self._stamp()}})
        else:
            present = {_index(pod) for pod in pods if pod["status"]["phase"] in ("Pending", "Running")}
            for index in range(spec.get("parallelism", 1)):
                if index not in present:
                    self._make_pod(job, index)

    def _follow_deployment(self, deployment: JSON) -> None:
        wanted, meta = deployment["spec"].get("replicas", 1), deployment["metadata"]
        pods = self._pods_of(deployment)
        for _ in range(len(pods), wanted):
            self._make_pod(deployment, 0)
        for pod in pods[wanted:]:
            self._terminate(pod)
        available = sum(1 for pod in pods[:wanted] if self._ages.get(pod["metadata"]["uid"], 0) >= AVAILABLE_AFTER)
        status = {
            "observedGeneration": meta["generation"], "replicas": min(len(pods), wanted), "updatedReplicas": min(len(pods), wanted),
            "readyReplicas": available, "availableReplicas": available,
        }  # fmt: skip
        if deployment.get("status") != status:
            self._cluster.change("Deployment", meta["name"], {"status": status}, meta["namespace"])

    def _condition(self, job: JSON, type_: str, status: str, reason: str, **fields: Any) -> None:
        entry = {"type": type_, "status": status, "reason": reason, "lastTransitionTime": self._stamp()}
        kept = [it for it in job.get("status", {}).get("conditions", ()) if it["type"] != type_]
        meta = job["metadata"]
        self._cluster.change(
            "Job", meta["name"], {"status": {"conditions": [*kept, entry], **fields}}, meta["namespace"]
        )

    # --- pods ---

    def _pods_of(self, owner: JSON) -> list[JSON]:
        uid = owner["metadata"]["uid"]
        return [it for it in self._cluster.of_kind("Pod") if it["metadata"]["ownerReferences"][0]["uid"] == uid]

    def _make_pod(self, owner: JSON, index: int) -> None:
        self._made += 1
        meta, template = owner["metadata"], owner["spec"]["template"]
        self._cluster.put(
            {
                "kind": "Pod",
                "metadata": {
                    "name": f"{meta['name']}-{index}-{self._made}",
                    "namespace": meta["namespace"],
                    "labels": dict(template["metadata"]["labels"]),
                    "annotations": {INDEX: str(index)},
                    "creationTimestamp": self._stamp(),
                    "ownerReferences": [{"kind": owner["kind"], "uid": meta["uid"], "controller": True}],
                },
                "spec": {"containers": template["spec"]["containers"]},
                "status": {"phase": "Pending"},
            }
        )

    def _terminate(self, pod: JSON) -> None:
        if pod["metadata"].get("deletionTimestamp") is None:
            meta = {"deletionTimestamp": self._stamp()}
            self._cluster.change("Pod", pod["metadata"]["name"], {"metadata": meta}, pod["metadata"]["namespace"])

    def _follow_pod(self, pod: JSON) -> None:
        meta, status = pod["metadata"], pod["status"]
        age = self._ages[meta["uid"]] = self._ages.get(meta["uid"], 0) + 1
        if meta.get("deletionTimestamp") is not None:
            self._ages[meta["uid"]] = age = max(age, 1000) + 1
            if age > 1000 + GRACE:
                self._cluster.remove("Pod", meta["namespace"], meta["name"], cascade=False)
        elif status["phase"] == "Pending":
            self._start(pod, age)
        elif status["phase"] == "Running":
            self._work(pod, age)

    def _start(self, pod: JSON, age: int) -> None:
        scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": self._stamp()}
        if age == 1:
            waiting = {"waiting": {"reason": "ContainerCreating"}}
            self._report(pod, {"conditions": [scheduled], "containerStatuses": [self._container(pod, waiting)]})
        elif age > STARTS_AFTER:
            number = int(pod["metadata"]["uid"].rpartition("-")[2])
            running = {"running": {"startedAt": self._stamp()}}
            ready = {"type": "Ready", "status": "True"}
            found = {"conditions": [scheduled, ready], "containerStatuses": [self._container(pod, running)]}
            self._report(pod, found | {"phase": "Running", "podIP": f"10.0.{number // 256}.{number % 256}"})

    def _work(self, pod: JSON, age: int) -> None:
        if not _runs(pod):
            code = _exit_code(pod)
            self._report(pod, {"phase": "Succeeded" if code == 0 else "Failed"})
            return
        box, end = pod["spec"]["containers"][0]["name"], self.exit_of(pod)
        if box == keys.TRAINER_CONTAINER and _index(pod) == 0:
            run = self._run_of(pod)
            self._steps[run] = min(self.last_step, self._steps.get(run, 0) + 1)
            if end is None and self._steps[run] >= STEPS:
                end = (0, make.succeeded(STEPS).to_json())
        elif box == keys.QUANTIZE_CONTAINER and end is None and age >= QUANTIZED_AFTER:
            model = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)
            report = TerminationReport(
                outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=model, evaluation=NO_LOSS
            )
            end = (0, report.to_json())
        if end is not None:
            ended = {"exitCode": end[0], "message": end[1], "reason": "Completed", "finishedAt": self._stamp()}
            kept = [it for it in pod["status"]["conditions"] if it["type"] != "Ready"]
            self._report(pod, {"conditions": kept, "containerStatuses": [self._container(pod, {"terminated": ended})]})

    def _run_of(self, pod: JSON) -> str:
        """Whose checkpoints a trainer goes on from."""
        return f"{pod['metadata']['namespace']}/{pod['metadata']['labels'].get(keys.LABEL_FINETUNEJOB)}"

    def _report(self, pod: JSON, status: JSON) -> None:
        self._cluster.change("Pod", pod["metadata"]["name"], {"status": status}, pod["metadata"]["namespace"])

    @staticmethod
    def _container(pod: JSON, state: JSON) -> JSON:
        box = pod["spec"]["containers"][0]
        return {"name": box["name"], "image": box["image"], "state": state}


FINAL_CODES = frozenset(int(code) for code in keys.TERMINAL_EXIT_CODES)


def _index(pod: JSON) -> int:
    return int(pod["metadata"]["annotations"][INDEX])


def _runs(pod: JSON) -> bool:
    boxes = pod["status"].get("containerStatuses") or [{}]
    return "running" in boxes[0].get("state", {})


def _exit_code(pod: JSON) -> int | None:
    boxes = pod["status"].get("containerStatuses") or [{}]
    code: int | None = boxes[0].get("state", {}).get("terminated", {}).get("exitCode")
    return code
