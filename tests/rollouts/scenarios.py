"""What `make rollouts` goes through, each with a client at work: good and bad revisions, scaling, a drained node.

The server is a stand-in that answers at once, so that what is measured is the way of the requests and not a model. A
request failed where it got no answer, or one other than the two that the stand-in gives: 200, and 500 by the bad one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import kubernetes.client

from rollouts.client import Client
from rollouts.image import write_image
from testbed import Testbed
from testbed.jobs import storage
from tunesmith_api import keys

JSON = dict[str, Any]
NAME = "served"
SECONDS = 90.0
IMAGES = {"good": {}, "better": {}, "bad": {"ERROR_PERCENT": "10"}, "slow": {"DELAY_SECONDS": "0.8"}}
STEPS = [{"weight": 33, "pauseSeconds": 10}]
ANALYSIS = {"maxErrorPercent": 3, "maxLatencyP95Seconds": 0.5, "minRequests": 40}


@dataclass
class Stage:
    """A namespace with one deployment of two replicas that answers."""

    bed: Testbed
    folder: Path
    namespace: str = field(default_factory=lambda: f"rolls-{uuid.uuid4().hex[:6]}")
    images: dict[str, str] = field(default_factory=dict)
    results: dict[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, environment in IMAGES.items():
            reference = self.images[name] = f"localhost/rollouts-{name}:{uuid.uuid4().hex[:8]}"
            archive = self.folder / f"{name}.tar"
            write_image(self.bed.images.operator, reference, environment | {"IMAGE": name}, archive)
            self.bed.cluster.load_image(archive)
        self.bed.create_namespace(self.namespace)

    def close(self) -> None:
        """Leave nothing behind."""
        self.bed.cluster.kubectl("delete", "namespace", self.namespace, "--wait=false", "--ignore-not-found")

    def ask_for(self, image: str, replicas: int = 2, autoscaling: JSON | None = None, **rollout: Any) -> None:
        """Apply the whole spec, as a file of a user's would be."""
        spec = {
            "source": {"uri": "s3://models/none"},
            "storage": storage(),
            "image": self.images[image],
            "replicas": replicas,
            "api": {"maxWaitingRequests": 1000},
            "resources": {"cpu": "100m", "memory": "128Mi"},
            "rollout": {"progressDeadlineSeconds": 120, **rollout},
        } | ({"autoscaling": autoscaling} if autoscaling else {})
        metadata = {"name": NAME, "namespace": self.namespace}
        self.bed.apply(
            {"apiVersion": keys.API_VERSION, "kind": keys.MODELDEPLOYMENT_KIND, "metadata": metadata, "spec": spec}
        )

    def status(self) -> JSON:
        found: JSON = self.bed.get("mdep", NAME, self.namespace)
        status: JSON = found.get("status", {})
        seen = status.get("observedGeneration") == found.get("metadata", {}).get("generation")
        return status if seen else {}

    def until(self, what: str, holds: Callable[[JSON], Any]) -> None:
        """Wait for it."""
        try:
            self.bed.wait_until(lambda: holds(self.status()), what, SECONDS)
        except TimeoutError as error:
            pods = self.bed.cluster.kubectl("get", "pods", "-n", self.namespace, "-o", "wide", check=False)
            raise AssertionError(f"{error}: {self.status()}\n{pods}") from None

    @contextmanager
    def under_load(self, name: str) -> Iterator[JSON]:
        """Note under that name what becomes of a client's requests; `outcome` is to be set."""
        with self.asked_by(name, Client(self.bed.url(self.namespace, NAME))) as result:
            yield result

    @contextmanager
    def asked_by(self, name: str, client: Client) -> Iterator[JSON]:
        """The same with that client."""
        result: JSON = self.results.setdefault(name, {"outcome": "Failed"})
        began = time.monotonic()
        with client:
            time.sleep(1)
            yield result
            time.sleep(2)
        result |= {
            "requests": client.requests,
            "failed_requests": len(client.failures),
            "answered_500": client.answered_500,
            "seconds": round(time.monotonic() - began, 1),
            "longest_seconds": round(client.longest, 1),
            "pods_of": sorted(client.pods),
        }
        if client.failures:
            result["failures"] = sorted(set(client.failures))[:5]


def ready(status: JSON, replicas: int = 2) -> bool:
    """The newest revision serves with so many replicas."""
    newest = status.get("latestRevision") == status.get("currentRevision")
    return newest and status.get("phase") == "Ready" and status.get("readyReplicas") == replicas


def gone(stage: Stage, revision: str) -> bool:
    """That revision's servers have ended. The pod of its quantize Job may stay, for who looks for a cause."""
    label = f"{keys.LABEL_REVISION}={revision.rpartition('-')[2]},{keys.LABEL_COMPONENT}={keys.COMPONENT_SERVER}"
    return not stage.bed.list("pods", stage.namespace, label)


def _takes_over(stage: Stage, name: str, image: str, **rollout: Any) -> None:
    old = stage.status()["currentRevision"]
    with stage.under_load(name) as result:
        stage.ask_for(image, **rollout)
        stage.until(f"{image} serves", lambda it: ready(it) and it["currentRevision"] != old)
        stage.until("the old pods' end", lambda it: gone(stage, old))
        result["outcome"] = "RolledOut"


def _is_taken_back(stage: Stage, name: str, image: str) -> None:
    old = stage.status()["currentRevision"]
    with stage.under_load(name) as result:
        stage.ask_for(image, strategy="Canary", steps=[{"weight": 33}], analysis=ANALYSIS)
        stage.until(f"{image} is taken back", lambda it: it.get("phase") == "RolledBack")
        stage.until("its pods' end", lambda it: gone(stage, it["latestRevision"]))
        status = stage.status()
        assert status["currentRevision"] == old
        result["outcome"], result["message"] = status["revisions"][-1]["reason"], status["revisions"][-1]["message"]


def blue_green(stage: Stage) -> None:
    _takes_over(stage, "blue_green", "better", strategy="BlueGreen")


def rolling_update(stage: Stage) -> None:
    _takes_over(stage, "rolling_update", "good", strategy="RollingUpdate")


def canary(stage: Stage) -> None:
    _takes_over(stage, "canary", "better", strategy="Canary", steps=STEPS, analysis=ANALYSIS)


def bad_canary(stage: Stage) -> None:
    _is_taken_back(stage, "bad_canary", "bad")


def slow_canary(stage: Stage) -> None:
    _is_taken_back(stage, "slow_canary", "slow")


def scaling(stage: Stage) -> None:
    stage.ask_for("better", 1)
    stage.until("one replica", lambda it: ready(it, 1))
    with stage.under_load("scaling") as result:
        for replicas in (3, 1):
            stage.ask_for("better", replicas)
            stage.until(f"{replicas} replicas", lambda it, count=replicas: ready(it, count))
            time.sleep(3)
        result["outcome"] = "Scaled"


def zero_and_back(stage: Stage) -> None:
    stage.ask_for(
        "better", autoscaling={"minReplicas": 0, "maxReplicas": 2, "idleSeconds": 2, "scaleDownDelaySeconds": 60}
    )
    stage.until("one replica", lambda it: ready(it, 1) and it.get("autoscaling"))
    # who is woken answers late, and in time
    client = Client(stage.bed.url(stage.namespace, NAME), timeout=SECONDS)
    with stage.asked_by("zero_and_back", client) as result:
        with client.silence():
            stage.until("zero", lambda it: it.get("display", {}).get("ready") == "0/0")
            stage.until("the last pod's end", lambda it: gone(stage, it["currentRevision"]))
        stage.until("one replica again", lambda it: ready(it, 1))
        result["outcome"] = "Woken"


def drained_node(stage: Stage) -> None:
    stage.ask_for("better", 2)
    stage.until("two replicas", ready)
    pod = stage.bed.list("pods", stage.namespace, f"{keys.LABEL_COMPONENT}={keys.COMPONENT_SERVER}")[0]
    node, kubectl = pod["spec"]["nodeName"], stage.bed.cluster.kubectl
    with stage.under_load("drained_node") as result:
        kubectl("cordon", node)
        try:
            for it in stage.bed.list("pods", stage.namespace):
                if it["spec"].get("nodeName") == node:
                    _evict(stage, it["metadata"]["name"])
            stage.until("two replicas elsewhere", ready)
        finally:
            kubectl("uncordon", node)
        result["outcome"] = "Drained"


def _evict(stage: Stage, pod: str) -> None:
    """As `kubectl drain` does it for one namespace: asked again as long as the budget says no."""
    core = kubernetes.client.CoreV1Api(stage.bed.cluster.api_client())
    eviction = kubernetes.client.V1Eviction(
        metadata=kubernetes.client.V1ObjectMeta(name=pod, namespace=stage.namespace)
    )

    def evicted() -> bool:
        try:
            core.create_namespaced_pod_eviction(pod, stage.namespace, eviction)
        except kubernetes.client.ApiException as error:
            if error.status == HTTPStatus.TOO_MANY_REQUESTS:
                return False
            if error.status != HTTPStatus.NOT_FOUND:  # it may have ended by itself, as an activator's pod does
                raise
        return True

    stage.bed.wait_until(evicted, f"{pod} is evicted", SECONDS)


SCENARIOS: tuple[Callable[[Stage], None], ...] = (
    blue_green,
    rolling_update,
    canary,
    bad_canary,
    slow_canary,
    scaling,
    zero_and_back,
    drained_node,
)


def run_all(bed: Testbed, folder: Path, log: Callable[[str], None] = print) -> dict[str, JSON]:
    """Go through all scenarios on one deployment; what goes wrong in one is its outcome."""
    stage = Stage(bed, folder)
    try:
        stage.ask_for("good")
        stage.until("the first revision", ready)
        for scenario in SCENARIOS:
            log(f"rollouts: {scenario.__name__}")
            try:
                scenario(stage)
            except Exception as error:
                found = stage.results.setdefault(scenario.__name__, {"outcome": "Failed"})
                found |= {"outcome": "Failed", "error": str(error)[:1500]}
            log(f"rollouts: {stage.results[scenario.__name__]}")
        return stage.results
    finally:
        stage.close()
