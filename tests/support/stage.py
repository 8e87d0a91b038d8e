"""A namespace of a real control plane with the operator at work in it: how integration tests look and wait."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from devcluster import Cluster
from support.fakekubelet import FakeKubelet
from support.operatorprocess import OperatorProcess

RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"


class Stage:
    """A namespace, the operator at work in it, and a kubelet that does as it is told."""

    def __init__(self, cluster: Cluster, operator: OperatorProcess, kubelet: FakeKubelet, namespace: str) -> None:
        self.cluster, self.operator, self.kubelet, self.namespace = cluster, operator, kubelet, namespace

    def kubectl(self, *arguments: str, **more: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments, **more)

    def apply(self, *objects: dict[str, Any]) -> None:
        for body in objects:
            self.kubectl("apply", "-f", "-", stdin=json.dumps(body))

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return self.cluster.get(kind, name, self.namespace)

    def items(self, kinds: str, selector: str = "") -> list[dict[str, Any]]:
        return [it for kind in kinds.split(",") for it in self.cluster.get_all(kind, self.namespace, selector)]

    def condition(self, kind: str, name: str, type_: str) -> tuple[str, str, str]:
        conditions = self.get(kind, name).get("status", {}).get("conditions", ())
        found = [(it["status"], it["reason"], it["message"]) for it in conditions if it["type"] == type_]
        return found[0] if found else ("", "", "")

    def wait(self, what: str, check: Callable[[], Any], seconds: float = 30) -> Any:
        deadline = time.monotonic() + seconds
        while not (result := check()):
            if time.monotonic() > deadline:
                objects = self.kubectl("get", "ftj,mdep,jobs,pods,deploy", "-o", "wide")
                raise AssertionError(f"not within {seconds} s: {what}\n{objects}\n{self.operator.log()}")
            time.sleep(0.2)
        return result

    def wait_condition(self, kind: str, name: str, type_: str, status: str, reason: str, seconds: float = 30) -> str:
        def check() -> str:
            found = self.condition(kind, name, type_)
            return found[2] if found[:2] == (status, reason) else ""

        message: str = self.wait(f"{kind} {name}: {type_}={status} ({reason})", check, seconds)
        return message
