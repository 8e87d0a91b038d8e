"""A stand-in for a node on a control plane that has none.

It registers a node, keeps it ready, and gives the pods that the real scheduler puts there the status that a script
says. No container runs.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Callable
from typing import Any

import kubernetes
import urllib3

from devcluster import Cluster
from tunesmith_api.reports import TerminationReport

NODE = "imaginary"
_ENDS: dict[str, str] = {}
Script = Callable[[dict[str, Any]], "dict[str, Any] | None"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    """The first container's spec."""
    container: dict[str, Any] = pod["spec"]["containers"][0]
    return container


def index_of(pod: dict[str, Any]) -> int:
    """Completion index of a Job's pod."""
    return int(pod["metadata"].get("annotations", {}).get("batch.kubernetes.io/job-completion-index", 0))


def status_of(
    pod: dict[str, Any], state: dict[str, Any], phase: str, ready: bool = False, ip: str = ""
) -> dict[str, Any]:
    """A pod status with one container in that state."""
    box = container_of(pod)
    running = "running" in state
    status: dict[str, Any] = {
        "phase": phase,
        "containerStatuses": [
            {
                "name": box["name"], "image": box["image"], "imageID": "", "ready": ready, "restartCount": 0,
                "started": running, "state": state,
            }
        ],
        "conditions": [
            {"type": "Ready", "status": "True" if ready else "False"},
            {"type": "ContainersReady", "status": "True" if ready else "False"},
        ],
    }  # fmt: skip
    if ip:
        status |= {"podIP": ip, "podIPs": [{"ip": ip}]}
    return status


def running(pod: dict[str, Any], ready: bool = True, ip: str = "") -> dict[str, Any]:
    """The container runs."""
    return status_of(pod, {"running": {"startedAt": pod["metadata"]["creationTimestamp"]}}, "Running", ready, ip)


def waiting(pod: dict[str, Any], reason: str, message: str) -> dict[str, Any]:
    """The container can't start."""
    return status_of(pod, {"waiting": {"reason": reason, "message": message}}, "Pending")


def ended(pod: dict[str, Any], code: int, report: TerminationReport | None = None) -> dict[str, Any]:
    """The container has ended and left a report."""
    stamp = pod["metadata"]["creationTimestamp"]
    # one time per pod, so that the status stays the same from look to look
    end = _ENDS.setdefault(pod["metadata"]["uid"], _now()[:19] + "Z")
    state = {
        "exitCode": code, "reason": "Completed" if code == 0 else "Error", "startedAt": stamp, "finishedAt": end,
        "message": report.to_bounded_json() if report is not None else "",
    }  # fmt: skip
    return status_of(pod, {"terminated": state}, "Succeeded" if code == 0 else "Failed")


class FakeKubelet:
    """Runs in a thread until closed. `script` may be exchanged at any time."""

    def __init__(self, cluster: Cluster, script: Script) -> None:
        self.script = script
        self._api = cluster.api_client()
        self._sent: dict[str, str] = {}
        self._stop = threading.Event()
        self._register()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self._api.rest_client.close()

    def _call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
        headers = {"Accept": "application/json", "Content-Type": kind}
        request = self._api.param_serialize(
            method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        response = self._api.call_api(*request)
        parsed: dict[str, Any] = json.loads(response.read() or b"{}")
        if response.status >= 300:
            raise kubernetes.client.ApiException(status=response.status, reason=str(parsed.get("message")))
        return parsed

    def _register(self) -> None:
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE, "labels": {"kubernetes.io/hostname": NODE}},
        }
        self._call("POST", "/api/v1/nodes", node)
        amounts = {"cpu": "500", "memory": "2000Gi", "pods": "1000", "ephemeral-storage": "1000Gi"}
        self._report(capacity=amounts, allocatable=amounts)
        lease = {
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "metadata": {"name": NODE, "namespace": "kube-node-lease"},
            "spec": {"holderIdentity": NODE, "leaseDurationSeconds": 40, "renewTime": _now()},
        }  # fmt: skip
        self._call("POST", "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", lease)

    def _report(self, **status: Any) -> None:
        """That the node is ready: where a busy machine let the Lease expire once, the control plane waits to hear it."""
        ready = {"type": "Ready", "status": "True", "reason": "Imagined", "lastHeartbeatTime": _now()}
        body = {"status": {**status, "conditions": [ready]}}
        self._call("PATCH", f"/api/v1/nodes/{NODE}/status", body, "application/merge-patch+json")

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(0.2):
            with contextlib.suppress(kubernetes.client.ApiException, urllib3.exceptions.HTTPError, OSError):
                beat += 1
                if beat % 10 == 0:
                    path = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{NODE}"
                    self._call("PATCH", path, {"spec": {"renewTime": _now()}}, "application/merge-patch+json")
                    self._report()
                for pod in self._call("GET", f"/api/v1/pods?fieldSelector=spec.nodeName={NODE}")["items"]:
                    with contextlib.suppress(kubernetes.client.ApiException):
                        self._sync(pod)

    def _sync(self, pod: dict[str, Any]) -> None:
        meta = pod["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        if meta.get("deletionTimestamp"):
            if pod["status"].get("phase") not in ("Succeeded", "Failed"):
                self._patch_status(path, pod, ended(pod, 143))
            self._call("DELETE", path, {"gracePeriodSeconds": 0})
            return
        if pod["status"].get("phase") in ("Succeeded", "Failed"):
            return
        wanted = self.script(pod)
        key = json.dumps(wanted, sort_keys=True)
        if wanted is not None and self._sent.get(meta["uid"]) != key:
            self._patch_status(path, pod, wanted)
            self._sent[meta["uid"]] = key

    def _patch_status(self, path: str, pod: dict[str, Any], status: dict[str, Any]) -> None:
        kept = [it for it in pod["status"].get("conditions", []) if it["type"] not in ("Ready", "ContainersReady")]
        body = {"status": {**status, "conditions": [*kept, *status["conditions"]]}}
        self._call("PATCH", f"{path}/status", body, "application/merge-patch+json")
