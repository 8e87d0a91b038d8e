"""A control plane of its own for the operator's tests: they count every write, so nobody else may write there."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devcluster import Cluster, ClusterSpec, UnsupportedMachine
from support.fakekubelet import FakeKubelet, running
from support.operatorprocess import OperatorProcess

ROOT = Path(__file__).resolve().parents[2]
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

    def get(self, *arguments: str) -> dict[str, Any]:
        text = self.kubectl("get", *arguments, "-o", "json", "--ignore-not-found")
        found: dict[str, Any] = json.loads(text) if text.strip() else {}
        return found

    def items(self, *arguments: str) -> list[dict[str, Any]]:
        return list(self.get(*arguments).get("items", []))

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


@pytest.fixture(scope="session")
def operator_plane() -> Iterator[Cluster]:
    """A control plane with our CRDs."""
    try:
        cluster = Cluster.start(ClusterSpec(name="operator", nodes=0, audit=True))
    except UnsupportedMachine as reason:
        pytest.skip(f"no local cluster: this machine {reason}")
    with cluster:
        for plural in ("finetunejobs", "modeldeployments"):
            cluster.kubectl("apply", "-f", str(ROOT / f"crds/tunesmith.dev_{plural}.yaml"))
        yield cluster


@pytest.fixture(scope="session")
def operator(operator_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The operator as a process of its own."""
    process = OperatorProcess(operator_plane, tmp_path_factory.mktemp("operator") / "log")
    yield process
    process.stop()


@pytest.fixture(scope="session")
def kubelet(operator_plane: Cluster) -> Iterator[FakeKubelet]:
    """An imaginary node."""
    node = FakeKubelet(operator_plane, running)
    yield node
    node.close()


@pytest.fixture
def stage(operator_plane: Cluster, operator: OperatorProcess, kubelet: FakeKubelet) -> Iterator[Stage]:
    """A fresh, restricted namespace."""
    name = f"op-{uuid.uuid4().hex[:6]}"
    operator_plane.kubectl("create", "namespace", name)
    operator_plane.kubectl("label", "namespace", name, RESTRICTED)
    kubelet.script = running
    yield Stage(operator_plane, operator, kubelet, name)
    operator_plane.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
