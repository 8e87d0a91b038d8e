"""The local cluster's nodes: pods, names, Services, images, fake GPUs, and the loss of a node."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devcluster import Cluster, ClusterFailed, ClusterSpec, CommandFailed, UnsupportedMachine, images, paths, reaper
from devcluster.processes import wait_until, with_environment
from devcluster.sandbox import MARK

SECONDS = 60


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this file's own: it loses nodes."""
    try:
        started = Cluster.start(ClusterSpec(name="lossy", nodes=2, gpus_per_node=2, node_monitor_grace_seconds=6))
    except UnsupportedMachine as reason:
        pytest.skip(f"no local cluster: this machine {reason}")
    with started:
        yield started


def container(*arguments, **resources):
    return {
        "name": "main",
        "image": images.PROBE,
        "args": list(arguments),
        "resources": {"limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def pod_spec(*arguments, node=None, restart="Never", **resources):
    spec = {
        "restartPolicy": restart,
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container(*arguments, **resources)],
    }
    return spec | ({"nodeSelector": {"kubernetes.io/hostname": node}} if node else {})


def run(cluster, namespace, name, *arguments, **options):
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": "probe"}},
        "spec": pod_spec(*arguments, **options),
    }
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(pod))


def get(cluster, kind, name, namespace=""):
    found = cluster.get(kind, name, namespace)
    assert found, f"no {kind} {name}"
    return found


def phase(cluster, namespace, name):
    return get(cluster, "pod", name, namespace)["status"]["phase"]


def wait_phase(cluster, namespace, name, wanted):
    assert wait_until(lambda: phase(cluster, namespace, name) == wanted, SECONDS, every=0.2), cluster.kubectl(
        "describe", "pod", name, "-n", namespace
    )


def sleeper(cluster, namespace, pod):
    """The process of a pod that sleeps. The kubelet calls a container running while its program is still being loaded."""

    def there():
        return [it.command_line for it in cluster.pod_pids(namespace, pod)] == ["/devtool sleep"]

    assert wait_until(there, SECONDS, every=0.2), cluster.pod_pids(namespace, pod)
    (process,) = cluster.pod_pids(namespace, pod)
    return process


def answers(ask, pod):
    try:
        return bool(ask(pod))
    except CommandFailed:
        return False


def test_both_nodes_are_ready_and_run_what_users_run(cluster):
    nodes = cluster.get_all("nodes")
    assert [node["metadata"]["name"] for node in nodes] == ["node1", "node2"]
    for node in nodes:
        assert node["status"]["nodeInfo"]["kubeletVersion"] == "v1.37.2"
        assert node["status"]["nodeInfo"]["containerRuntimeVersion"].startswith("containerd://2.")


def test_pods_of_an_indexed_job_find_each_other_across_nodes_by_hostname(cluster, namespace):
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "peers"},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": "ring"}},
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "ring"}},
    }
    spec = pod_spec("serve") | {"subdomain": "peers", "topologySpreadConstraints": [spread]}
    template = {"metadata": {"labels": {"app": "ring"}}, "spec": spec}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "ring"},
        "spec": {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "template": template},
    }
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(service))
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(job))
    cluster.kubectl("wait", "-n", namespace, "pod", "-l", "app=ring", "--for=condition=Ready", f"--timeout={SECONDS}s")
    first, second = sorted(cluster.get_all("pods", namespace), key=lambda pod: pod["metadata"]["name"])
    assert first["spec"]["nodeName"] != second["spec"]["nodeName"]
    name = first["metadata"]["name"]

    def look_up(peer):
        return cluster.exec_pod(namespace, name, "/devtool", "lookup", peer).split()

    everyone = f"peers.{namespace}.svc.cluster.local"
    # A pod may be Ready a moment before the name server knows it.
    assert wait_until(lambda: answers(lambda name: len(look_up(name)) == 2, everyone), SECONDS)
    assert look_up("ring-1.peers") == [second["status"]["podIP"]]
    assert cluster.exec_pod(namespace, name, "/devtool", "get", "http://ring-1.peers:8080").strip() == "ring-1"
    assert sorted(look_up(everyone)) == sorted(pod["status"]["podIP"] for pod in (first, second))
    with pytest.raises(CommandFailed, match="no such host"):
        look_up("ring-2.peers")
    assert "serving ring-0" in cluster.kubectl("logs", "-n", namespace, name)


def test_a_service_reaches_every_pod_from_every_pod_itself_included(cluster, namespace):
    for number in (1, 2):
        run(cluster, namespace, f"web-{number}", "serve", node=f"node{number}")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "probe"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(service))
    cluster.kubectl("wait", "-n", namespace, "pod", "-l", "app=probe", "--for=condition=Ready", f"--timeout={SECONDS}s")

    def ask(pod):
        return cluster.exec_pod(namespace, pod, "/devtool", "get", "http://web").strip()

    # A pod may be Ready a moment before the proxy knows it: only the first answers may be missing.
    reached = {ask("web-1")} if wait_until(lambda: answers(ask, "web-1"), SECONDS) else set()
    assert wait_until(lambda: len(reached) == 2 or reached.add(ask("web-1")), SECONDS)
    for pod in ("web-1", "web-2"):
        seen = {ask(pod) for _ in range(20)}
        assert seen == {"web-1", "web-2"}


def test_a_containers_process_can_be_killed_by_number(cluster, namespace):
    run(cluster, namespace, "victim", "sleep", restart="Never")
    wait_phase(cluster, namespace, "victim", "Running")
    os.kill(sleeper(cluster, namespace, "victim").pid, signal.SIGKILL)
    wait_phase(cluster, namespace, "victim", "Failed")
    ended = get(cluster, "pod", "victim", namespace)["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 128 + signal.SIGKILL
    assert wait_until(lambda: cluster.pod_pids(namespace, "victim") == [], SECONDS, every=0.2)


def test_exit_code_and_termination_message_reach_the_status(cluster, namespace):
    run(cluster, namespace, "failing", "exit", "41", "the last words")
    wait_phase(cluster, namespace, "failing", "Failed")
    ended = get(cluster, "pod", "failing", namespace)["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["exitCode"], ended["message"]) == (41, "the last words")


def test_fake_gpus_are_scheduled_named_to_the_container_and_can_fall_ill(cluster, namespace):
    def healthy():
        return get(cluster, "node", "node1")["status"]["allocatable"].get("nvidia.com/gpu")

    assert wait_until(lambda: healthy() == "2", SECONDS, every=0.2)
    run(cluster, namespace, "uses-gpus", "env", "NVIDIA_VISIBLE_DEVICES", node="node1", **{"nvidia.com/gpu": "2"})
    wait_phase(cluster, namespace, "uses-gpus", "Succeeded")
    assert sorted(cluster.kubectl("logs", "-n", namespace, "uses-gpus").strip().split(",")) == ["GPU-0", "GPU-1"]
    cluster.node(1).set_gpu_health(1, healthy=False)
    assert wait_until(lambda: healthy() == "1", SECONDS, every=0.2)
    cluster.node(1).set_gpu_health(1, healthy=True)
    assert wait_until(lambda: healthy() == "2", SECONDS, every=0.2)


def test_a_lost_node_is_noticed_its_pods_leave_and_it_comes_back(cluster, namespace):
    run(cluster, namespace, "on-lost-node", "sleep", node="node2")
    wait_phase(cluster, namespace, "on-lost-node", "Running")
    process = sleeper(cluster, namespace, "on-lost-node")
    cluster.node(2).stop()
    assert not Path(f"/proc/{process.pid}").exists()

    def ready():
        conditions = get(cluster, "node", "node2")["status"]["conditions"]
        return next(entry["status"] for entry in conditions if entry["type"] == "Ready")

    try:
        assert wait_until(lambda: ready() == "Unknown", SECONDS, every=0.5)
        gone = lambda: "deletionTimestamp" in get(cluster, "pod", "on-lost-node", namespace)["metadata"]  # noqa: E731
        assert wait_until(gone, SECONDS, every=0.5)
    finally:
        cluster.node(2).start()
    assert ready() == "True"
    run(cluster, namespace, "after", "exit", "0", node="node2")
    wait_phase(cluster, namespace, "after", "Succeeded")


def test_containers_outlive_their_kubelet(cluster, namespace):
    run(cluster, namespace, "steady", "sleep", node="node1")
    wait_phase(cluster, namespace, "steady", "Running")
    before = [sleeper(cluster, namespace, "steady")]
    cluster.node(1).kill_kubelet()
    assert cluster.pod_pids(namespace, "steady") == before
    cluster.node(1).start()
    time.sleep(2)
    assert cluster.pod_pids(namespace, "steady") == before
    assert phase(cluster, namespace, "steady") == "Running"


def test_a_killed_owner_of_nodes_and_pods_leaves_nothing(cluster):
    program = (
        "import time; from devcluster import Cluster, ClusterSpec, images\n"
        "cluster = Cluster.start(ClusterSpec(name='orphan-nodes', nodes=1))\n"
        "cluster.kubectl('run', 'p', '--image=' + images.PROBE, '--', 'sleep')\n"
        "cluster.kubectl('wait', '--for=condition=Ready', 'pod/p', '--timeout=60s')\n"
        "print(cluster.id, cluster.pod_pids('default', 'p')[0].pid, flush=True); time.sleep(600)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    identifier, container_pid = owner.stdout.readline().split()
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not Path(f"/proc/{container_pid}").exists(), 10), "a container outlived its cluster"
    reaper.reap()
    assert not (paths.clusters() / identifier).exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/tunesmith-{identifier}-n*"))
    assert identifier not in Path("/proc/mounts").read_text()
    assert not list(with_environment(f"{MARK}={identifier}"))
    cluster.kubectl("get", "nodes")


def test_an_unreadable_archive_is_refused_by_name(cluster, tmp_path):
    archive = tmp_path / "no.tar"
    archive.write_text("no archive")
    with pytest.raises(images.UnreadableArchive, match=r"no\.tar"):
        cluster.load_image(archive)


def test_a_control_plane_alone_holds_no_images(control_plane, tmp_path):
    with pytest.raises(ClusterFailed, match="start the cluster with nodes"):
        control_plane.load_image(tmp_path / "any.tar")


def test_images_are_imported_once_and_kept_between_boots(cluster, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "bin").symlink_to(paths.cache() / "bin")
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    archive = tmp_path / "image.tar"
    program = Path(cluster.programs.path("devtool")).read_bytes()

    def write(extra):
        images.write(archive, "localhost/mine:1", {"/devtool": program, "/extra": extra}, ["/devtool"])

    write(b"first")
    spec = ClusterSpec(name="images", nodes=1)
    with Cluster.start(spec) as first:
        assert first.node(1).load_image(archive)
        assert not first.node(1).load_image(archive)
        first.kubectl("run", "left-over", "--image=localhost/mine:1", "--", "sleep")
        wait_phase(first, "default", "left-over", "Running")
    with Cluster.start(spec) as second:
        assert not second.node(1).load_image(archive)
        write(b"changed")
        assert second.node(1).load_image(archive)
        never = ("--image-pull-policy=Never", "--restart=Never")
        second.kubectl("run", "fresh", "--image=localhost/mine:1", *never, "--", "exit", "0")
        wait_phase(second, "default", "fresh", "Succeeded")
        assert len(second.node(1).container_ids()) == 2, "the first cluster's containers are still there"
