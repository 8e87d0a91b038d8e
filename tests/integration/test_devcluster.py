"""The local control plane itself: what it serves, and that it comes and goes without a trace."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes
import pytest

from devcluster import Cluster, ClusterFailed, ClusterSpec, CommandFailed, paths, reaper, state
from devcluster.processes import wait_until, with_environment
from devcluster.sandbox import MARK

CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "widgets.test.tunesmith.dev"},
    "spec": {
        "group": "test.tunesmith.dev",
        "scope": "Namespaced",
        "names": {"kind": "Widget", "plural": "widgets"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "properties": {"size": {"type": "integer"}},
                                "x-kubernetes-validations": [
                                    {"rule": "self.size >= oldSelf.size", "message": "size never shrinks"}
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def widget(size):
    return json.dumps(
        {
            "apiVersion": "test.tunesmith.dev/v1",
            "kind": "Widget",
            "metadata": {"name": "w"},
            "spec": {"size": size},
        }
    )


def machine_state():
    """What a cluster must not change out here."""
    return {
        "links": subprocess.run(["ip", "-br", "addr"], capture_output=True, text=True, check=True).stdout,
        "routes": subprocess.run(["ip", "route"], capture_output=True, text=True, check=True).stdout,
        "settings": [
            Path("/proc/sys", name).read_text()
            for name in ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward")
        ],
    }


def leftovers(identifier):
    """Everything on this machine that still belongs to a cluster."""
    return {
        "processes": [found.pid for found in with_environment(f"{MARK}={identifier}")],
        "folder": (paths.clusters() / identifier).exists(),
        "cgroups": [str(found) for found in Path("/sys/fs/cgroup").glob(f"**/tunesmith-{identifier}-n*")],
        "mounts": [line for line in Path("/proc/mounts").read_text().splitlines() if f"clusters/{identifier}" in line],
    }


NOTHING = {"processes": [], "folder": False, "cgroups": [], "mounts": []}


def test_serves_kubernetes_1_37_and_a_custom_resource_with_its_rules(control_plane, namespace):
    assert json.loads(control_plane.kubectl("version", "-o", "json"))["serverVersion"]["gitVersion"] == "v1.37.2"
    control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(CRD))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/widgets.test.tunesmith.dev", "--timeout=20s")
    control_plane.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", stdin=widget(2))
    with pytest.raises(CommandFailed, match="size never shrinks"):
        control_plane.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", stdin=widget(1))


def test_serves_native_gang_scheduling(control_plane):
    assert "podgroups" in control_plane.kubectl("api-resources", "--api-group=scheduling.k8s.io", "-o", "name")


def test_the_official_client_reaches_it_from_the_machines_own_network(control_plane, namespace):
    with control_plane.api_client() as client:
        core = kubernetes.client.CoreV1Api(client)
        assert core.read_namespace(namespace).metadata.labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_restricted_namespaces_refuse_privileged_pods(control_plane, namespace):
    with pytest.raises(CommandFailed, match="violates PodSecurity"):
        control_plane.kubectl("run", "p", "-n", namespace, "--image=none", "--privileged")


def test_the_audit_log_tells_who_wrote_what_since_when(control_plane, namespace):
    before = datetime.datetime.now(datetime.UTC)
    control_plane.kubectl("create", "configmap", "seen", "-n", namespace)

    def found():
        return [
            (event["verb"], event["user"]["username"])
            for event in control_plane.audit_events(since=before)
            if event.get("objectRef", {}).get("name") == "seen"
        ]

    assert wait_until(lambda: bool(found()), 5)
    assert found() == [("create", "devcluster-admin")]
    assert not list(control_plane.audit_events(since=before + datetime.timedelta(hours=1)))


def test_objects_are_read_as_kubectl_reads_them(control_plane, namespace):
    control_plane.kubectl("create", "configmap", "seen", "-n", namespace)
    control_plane.kubectl("label", "configmap", "seen", "-n", namespace, "which=this")
    seen = json.loads(control_plane.kubectl("get", "cm", "seen", "-n", namespace, "-o", "json"))
    for kind in ("configmaps", "configmap", "cm"):
        assert control_plane.get(kind, "seen", namespace) == seen
    assert control_plane.get_all("cm", namespace, "which=this") == [seen]
    assert seen in control_plane.get_all("cm")
    assert control_plane.get_all("cm", namespace, "which=that") == []
    assert control_plane.get("cm", "unseen", namespace) == {}
    assert control_plane.get("namespace", namespace)["metadata"]["name"] == namespace
    assert control_plane.get_all("deployments.apps", namespace) == control_plane.get_all("events", namespace) == []
    for ask in (lambda: control_plane.get_all("cm", namespace, "=what"), lambda: control_plane.get("nonsense", "seen")):
        with pytest.raises(ClusterFailed):  # and not: there is none
            ask()


def test_helm_installs_a_chart(control_plane, namespace, tmp_path):
    (tmp_path / "templates").mkdir()
    chart = {"apiVersion": "v2", "name": "tiny", "version": "0.1.0"}
    (tmp_path / "Chart.yaml").write_text(json.dumps(chart))
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "from-helm"}}
    (tmp_path / "templates/map.yaml").write_text(json.dumps(made))
    control_plane.helm("install", "tiny", str(tmp_path), "-n", namespace, "--wait")
    assert control_plane.kubectl("get", "configmap", "from-helm", "-n", namespace, "-o", "name")


def test_two_at_once_know_nothing_of_each_other_and_leave_the_machine_as_it_was(control_plane):
    before = machine_state()
    with Cluster.start(ClusterSpec(name="control-plane")) as other:
        assert machine_state() == before
        other.kubectl("create", "namespace", "only-here")
        assert "only-here" in other.kubectl("get", "namespaces", "-o", "name")
        assert "only-here" not in control_plane.kubectl("get", "namespaces", "-o", "name")
        identifier = other.id
    assert leftovers(identifier) == NOTHING
    assert machine_state() == before
    control_plane.kubectl("get", "namespaces")


def test_a_killed_owner_takes_its_cluster_along_and_the_next_start_removes_the_rest(control_plane):
    program = (
        "import time; from devcluster import Cluster, ClusterSpec\n"
        "cluster = Cluster.start(ClusterSpec(name='orphan'))\n"
        "server = cluster.run_in_network(['sleep', '600'])\n"
        "print(cluster.id, flush=True); time.sleep(600)\n"
    )
    path = os.pathsep.join(sys.path)
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    identifier = owner.stdout.readline().strip()
    left = state.read(paths.clusters() / identifier)
    assert left.init.alive
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert wait_until(lambda: not left.init.alive, 5), "nobody told the cluster that its owner is dead"
    reaper.reap()  # as the next start does, of this process or of any other
    assert leftovers(identifier) == NOTHING
    assert not reaper.remove_cluster(identifier)
    control_plane.kubectl("get", "namespaces")


def test_a_kept_cluster_is_found_by_name_and_refuses_a_second_one(control_plane, monkeypatch):
    name = f"kept-{os.getpid()}"
    kept = Cluster.start(ClusterSpec(name=name, keep=True))
    try:
        again = Cluster.attach(name)
        assert again.kubectl("get", "namespace", "default", "-o", "name") == "namespace/default\n"
        assert name not in reaper.reap()
        with pytest.raises(ClusterFailed, match="is up already"):
            Cluster.start(ClusterSpec(name=name, keep=True))
        again.stop()
        assert leftovers(name) == NOTHING
        with pytest.raises(LookupError, match="is up"):
            Cluster.attach(name)
    finally:
        kept.stop()


def test_a_server_in_the_clusters_network_is_reached_through_a_forward(control_plane, tmp_path):
    (tmp_path / "hello").write_text("from inside")
    argv = [sys.executable, "-m", "http.server", "8000", "--bind", control_plane.host_ip, "--directory", str(tmp_path)]
    server = control_plane.run_in_network(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    port = control_plane.forward(f"{control_plane.host_ip}:8000")
    try:
        fetch = ["curl", "-sf", "--retry", "20", "--retry-all-errors", "--retry-delay", "1"]
        done = subprocess.run([*fetch, f"http://127.0.0.1:{port}/hello"], capture_output=True, text=True, check=True)
        assert done.stdout == "from inside"
    finally:
        server.terminate()
        server.wait()


def test_starts_and_stops_in_seconds(control_plane):
    start = time.monotonic()
    with Cluster.start(ClusterSpec(name="quick")):
        up = time.monotonic() - start
        start = time.monotonic()
    down = time.monotonic() - start
    # Alone on two cores: 3.5 and 0.1 s. The bounds leave room for whatever else the machine does.
    assert up < 30, f"up in {up:.1f} s"
    assert down < 10, f"down in {down:.1f} s"
