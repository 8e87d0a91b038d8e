"""A control plane of its own for the operator's tests: they count every write, so nobody else may write there."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import Cluster, ClusterSpec, UnsupportedMachine
from support.fakekubelet import FakeKubelet, running
from support.operatorprocess import OperatorProcess
from support.stage import RESTRICTED, Stage
from tunesmith_api import keys

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def plane(name: str) -> Iterator[Cluster]:
    try:
        cluster = Cluster.start(ClusterSpec(name=name, nodes=0, audit=True))
    except UnsupportedMachine as reason:
        pytest.skip(f"no local cluster: this machine {reason}")
    with cluster:
        for plural in ("finetunejobs", "modeldeployments"):
            cluster.kubectl("apply", "-f", str(ROOT / f"crds/tunesmith.dev_{plural}.yaml"))
        yield cluster


@pytest.fixture(scope="session")
def operator_plane() -> Iterator[Cluster]:
    """A control plane with our CRDs."""
    with plane("operator") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def api(control_plane: Cluster) -> Cluster:
    """The control plane that all tests share, with our CRDs and without an operator."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(ROOT / "crds"))
    for plural in (keys.FINETUNEJOB_PLURAL, keys.MODELDEPLOYMENT_PLURAL):
        name = f"crd/{plural}.{keys.GROUP}"
        control_plane.kubectl("wait", "--for=condition=Established", name, "--timeout=30s")
    return control_plane


@pytest.fixture
def own_plane() -> Iterator[Cluster]:
    """Another one, for a test that does to it what others couldn't bear."""
    with plane("outage") as cluster:
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
