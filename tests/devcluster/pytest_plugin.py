"""Fixtures for tests on a real cluster: ``control_plane``, ``cluster`` and ``namespace``.

The two clusters are made once per session, on the first use. A machine that cannot run one skips the test with the
reason; it is never counted as passed. (An existing KUBECONFIG could be honoured in ``_session_cluster``.)
"""

import contextlib
import uuid
from collections.abc import Iterator

import pytest

from devcluster import Cluster, ClusterSpec, UnsupportedMachine, binaries, machine, progress

RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
CLUSTERS = {"control_plane", "cluster"}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the programs before the first test that needs them: minutes that no test's time limit should count."""
    needed = any(CLUSTERS.intersection(getattr(item, "fixturenames", ())) for item in session.items)
    if not needed or session.config.option.collectonly:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    report = progress.to_stderr()
    with contextlib.suppress(UnsupportedMachine), capture.global_and_fixture_disabled():  # the fixtures say why
        machine.ensure(1, report)
        binaries.ensure(report)


def _session_cluster(spec: ClusterSpec) -> Iterator[Cluster]:
    try:
        started = Cluster.start(spec)
    except UnsupportedMachine as reason:
        pytest.skip(f"no local cluster: this machine {reason}")
    with started:
        yield started


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """A control plane without nodes, with an audit log."""
    yield from _session_cluster(ClusterSpec(name="control-plane", nodes=0, audit=True))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes that run pods, with an audit log."""
    yield from _session_cluster(ClusterSpec(name="nodes", nodes=2, audit=True))


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh namespace that enforces the restricted Pod Security Standard, deleted after the test.

    In ``cluster`` where the test uses that, else in ``control_plane``.
    """
    used = "cluster" if "cluster" in request.fixturenames else "control_plane"
    home: Cluster = request.getfixturevalue(used)
    name = f"test-{uuid.uuid4().hex[:8]}"
    home.kubectl("create", "namespace", name)
    home.kubectl("label", "namespace", name, RESTRICTED)
    yield name
    home.kubectl("delete", "namespace", name, "--wait=false")
    if home.spec.nodes:
        # Its containers must be gone before the next test measures anything; the namespace itself takes longer.
        home.kubectl("wait", "--for=delete", "pod", "--all", "-n", name, "--timeout=90s", check=False)
