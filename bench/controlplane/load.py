"""Makes many objects at a steady pace: custom resources for an operator, or, for comparison, all objects of a job without one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from pathlib import Path

from bench.controlplane.api import JSON, Api
from support import make
from tunesmith_api import keys

__all__ = ["create_all", "deployment", "job", "plain_objects"]

PATHS = {
    "FineTuneJob": f"/apis/{keys.API_VERSION}/namespaces/{{}}/finetunejobs",
    "ModelDeployment": f"/apis/{keys.API_VERSION}/namespaces/{{}}/modeldeployments",
    "Service": "/api/v1/namespaces/{}/services",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "Secret": "/api/v1/namespaces/{}/secrets",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "Job": "/apis/batch/v1/namespaces/{}/jobs",
    "TrainJob": "/apis/trainer.kubeflow.org/v1alpha1/namespaces/{}/trainjobs",
    "RayJob": "/apis/ray.io/v1/namespaces/{}/rayjobs",
}
PLAN_BYTES = 2500


def job(name: str, namespace: str) -> JSON:
    """A FineTuneJob of two workers with an output of its own."""
    return make.finetunejob(
        name, namespace, output={"uri": f"s3://models/{name}"}, checkpoint={"uri": f"s3://checkpoints/{name}"},
        failurePolicy={"startupTimeoutSeconds": 3600},
    )  # fmt: skip


def deployment(name: str, namespace: str) -> JSON:
    """A ModelDeployment of one replica."""
    return make.modeldeployment(name, namespace)


def plain_objects(name: str, namespace: str, network_policy: bool) -> list[JSON]:
    """What a user without an operator would apply for the same job.

    A headless Service, a ConfigMap with the plan, a Secret, and an Indexed Job of two pods; with the NetworkPolicy the same five objects
    as the operator's.
    """
    labels = {"plain": name}

    def meta(suffix: str = "") -> JSON:
        return {"name": name + suffix, "namespace": namespace, "labels": labels}

    container = {
        "name": "trainer", "image": "localhost/trainer:test", "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
        "volumeMounts": [{"name": "plan", "mountPath": "/etc/tunesmith"}],
        "env": [{"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": name, "key": "token"}}}],
    }  # fmt: skip
    pod = {
        "restartPolicy": "Never", "subdomain": name, "containers": [container],
        "volumes": [{"name": "plan", "configMap": {"name": name}}],
    }  # fmt: skip
    objects: list[JSON] = [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta(), "spec": {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta(), "data": {"plan.json": json.dumps({"plan": "x" * PLAN_BYTES})}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": meta(), "stringData": {"token": "t" * 64}},
    ]  # fmt: skip
    if network_policy:
        spec = {
            "podSelector": {"matchLabels": labels},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": {"matchLabels": labels}}]}],
        }
        objects.append(
            {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta(), "spec": spec}
        )
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0, "template": template}
    return [*objects, {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta(), "spec": spec}]


class Pace:
    """A client's rate limit as client-go has it: so many at once, so many a second after that."""

    def __init__(self, qps: float) -> None:
        self._every, self._free = 1.0 / qps, time.monotonic() - 1.0

    async def wait(self) -> None:
        """Wait for the next slot; a second's worth may be saved up."""
        now = time.monotonic()
        self._free = max(self._free, now - 1.0) + self._every
        await asyncio.sleep(max(0.0, self._free - now))


async def _create_all(kubeconfig: Path, batches: Iterable[list[JSON]], qps: float) -> None:
    pace = Pace(qps)
    async with Api(kubeconfig) as api:

        async def one(objects: list[JSON]) -> None:
            for body in objects:
                await pace.wait()
                await api.create(PATHS[body["kind"]].format(body["metadata"]["namespace"]), body)

        waiting = list(batches)[::-1]

        async def worker() -> None:
            while waiting:
                await one(waiting.pop())

        await asyncio.gather(*(worker() for _ in range(16)))


def create_all(kubeconfig: Path, batches: Iterable[list[JSON]], qps: float) -> tuple[float, float]:
    """Create the objects of each batch in order, batches side by side, at that pace; return when it began and ended."""
    begun = time.time()
    asyncio.run(_create_all(kubeconfig, batches, qps))
    return begun, time.time()
