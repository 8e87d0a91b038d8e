"""Small FineTuneJobs and ModelDeployments on the real model and real tweets, for the end-to-end tests."""

from __future__ import annotations

import json
from typing import Any

from testbed.bed import SECRET_NAME, STORE_ENDPOINT, Testbed
from tunesmith_api import keys

BASE_MODEL = "s3://models/smollm2-135m-instruct"
FINISHED = ("Succeeded", "Failed")
PATIENCE = 480.0
"""Seconds for what takes a fifth of that on nodes that share the machine with nothing else."""


def storage(secret: str = SECRET_NAME) -> dict[str, Any]:
    """Storage settings that lead to the testbed's store."""
    return {"endpointURL": STORE_ENDPOINT, "secretRef": {"name": secret}}


def fine_tune_job(name: str, namespace: str, data: str, **changes: Any) -> dict[str, Any]:
    """A FineTuneJob of two workers; `changes` replace whole fields of its spec."""
    spec = {
        "model": {"uri": BASE_MODEL},
        "dataset": {"train": {"uri": data}},
        "training": {
            "maxSteps": 12,
            "learningRate": 1e-3,
            "globalBatchSize": 4,
            "microBatchSize": 2,
            "maxLength": 96,
        },
        "method": {"type": "LoRA", "lora": {"r": 8, "alpha": 16, "targetModules": ["q_proj", "v_proj"]}},
        "workers": {"replicas": 2, "resources": {"cpu": "900m", "memory": "3Gi"}},
        "checkpoint": {"uri": f"s3://checkpoints/{namespace}/{name}", "everySteps": 5, "keepLast": 2},
        "output": {"uri": f"s3://models/{namespace}/{name}"},
        "storage": storage(),
    }
    return {
        "apiVersion": keys.API_VERSION,
        "kind": keys.FINETUNEJOB_KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {**spec, **changes},
    }


def model_deployment(name: str, namespace: str, job: str, **changes: Any) -> dict[str, Any]:
    """A ModelDeployment of a job's result."""
    spec = {
        "source": {"fineTuneJobRef": {"name": job}},
        "engine": {"type": "LlamaCpp", "contextLength": 256, "parallelRequests": 2},
        "resources": {"cpu": "1", "memory": "2Gi"},
    }
    return {
        "apiVersion": keys.API_VERSION,
        "kind": keys.MODELDEPLOYMENT_KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {**spec, **changes},
    }


def step_of(bed: Testbed, name: str, namespace: str) -> int:
    """Steps done, as the custom resource says."""
    progress = bed.get("ftj", name, namespace).get("status", {}).get("progress") or {}
    return int(progress.get("globalStep", 0))


def wait_for_step(bed: Testbed, name: str, namespace: str, step: int, timeout: float = PATIENCE) -> None:
    """Wait until the custom resource shows at least this step."""

    def reached() -> bool:
        status = bed.get("ftj", name, namespace).get("status", {})
        if status.get("phase") in FINISHED:
            raise AssertionError(f"{name} ended before step {step}: {describe(bed, name, namespace)}")
        return int((status.get("progress") or {}).get("globalStep", 0)) >= step

    try:
        bed.wait_until(reached, f"{name} at step {step}", timeout)
    except TimeoutError as error:
        raise AssertionError(f"{error}: {describe(bed, name, namespace)}") from None


def wait_finished(bed: Testbed, name: str, namespace: str, timeout: float = PATIENCE) -> dict[str, Any]:
    """Wait until a job has ended and return its status."""

    def finished() -> dict[str, Any] | None:
        status: dict[str, Any] = bed.get("ftj", name, namespace).get("status", {})
        return status if status.get("phase") in FINISHED else None

    try:
        result: dict[str, Any] = bed.wait_until(finished, f"{name} ended", timeout)
    except TimeoutError as error:
        raise AssertionError(f"{error}: {describe(bed, name, namespace)}") from None
    return result


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return a condition; an empty dict where it isn't there."""
    return next((entry for entry in status.get("conditions", []) if entry["type"] == kind), {})


def describe(bed: Testbed, name: str, namespace: str) -> str:
    """Everything that explains why a job stands where it stands."""
    kubectl = bed.cluster.kubectl
    parts = [json.dumps(bed.get("ftj", name, namespace).get("status", {}), indent=1)]
    parts.append(kubectl("get", "pods,jobs", "-n", namespace, "-o", "wide", check=False))
    for pod in bed.list("pods", namespace, f"{keys.LABEL_FINETUNEJOB}={name}"):
        pod_name = pod["metadata"]["name"]
        parts.append(f"--- {pod_name}\n" + kubectl("logs", "-n", namespace, pod_name, "--tail=25", check=False))
    return "\n".join(parts)


def history(bed: Testbed, status: dict[str, Any]) -> list[dict[str, float]]:
    """Return the recorded steps of the finished model."""
    report = json.loads(bed.store.get_bytes(status["model"]["uri"].rstrip("/") + "/metrics.json"))
    steps: list[dict[str, float]] = report["history"]
    return steps
