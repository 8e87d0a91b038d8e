"""One node: a box inside its cluster's with a containerd and a kubelet, under the paths that they have everywhere.

A node covers ``/run``, ``/var/lib`` and ``/var/log`` with folders of its own, so that the kubelet, containerd and its
shims may use the paths they hard-code, and two nodes of one machine never meet. Only its image store lies elsewhere,
in a slot of the cache that the cluster leases, and is kept between boots.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from devcluster import cgroups, images, machine, network, paths, sandbox
from devcluster.binaries import Binaries
from devcluster.controlplane import IN_CLUSTER_SERVER, Api
from devcluster.errors import ClusterFailed, UnsupportedMachine
from devcluster.pki import Authority
from devcluster.processes import wait_until
from devcluster.sandbox import Process, Sandbox
from devcluster.spec import ClusterSpec
from devcluster.state import NodeState, State

CONTAINERD_ROOT = "/run/containerd"
KUBELET_ROOT = "/var/lib/kubelet"
GPU_RESOURCE = "nvidia.com/gpu"
READY_SECONDS = 60.0
MOST_SLOTS = 64
# The kubelet sets these for the whole machine, unless they already read so.
PRETENDED_SETTINGS = {
    "/proc/sys/vm/overcommit_memory": 1,
    "/proc/sys/vm/panic_on_oom": 0,
    "/proc/sys/kernel/panic": 10,
    "/proc/sys/kernel/panic_on_oops": 1,
    "/proc/sys/kernel/keys/root_maxkeys": 1000000,
    "/proc/sys/kernel/keys/root_maxbytes": 25000000,
}

# Without CAP_SYS_RESOURCE nobody may lower an OOM score: restrict_oom_score_adj lets sandboxes start all the same.
CONTAINERD_CONFIG = """\
version = 3
root = "{store}"
state = "{run}/state"
[grpc]
  address = "{run}/containerd.sock"
[plugins.'io.containerd.internal.v1.opt']
  path = "{run}/opt"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = "{pause}"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["{plugins}"]
    conf_dir = "{conf}"
"""


@dataclass(frozen=True)
class Slot:
    """A set of image stores, leased as long as the lock's descriptor is open somewhere."""

    folder: Path
    descriptor: int


def lease_slot() -> Slot:
    """The first set of image stores that no other cluster uses."""
    paths.slots().mkdir(parents=True, exist_ok=True)
    for number in range(MOST_SLOTS):
        descriptor = os.open(paths.slots() / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Slot(paths.slots() / str(number), descriptor)
        except BlockingIOError:
            os.close(descriptor)
    raise ClusterFailed(f"all {MOST_SLOTS} image stores in {paths.slots()} are leased: stop a cluster first")


class Node:
    """A node of a cluster, numbered from 1."""

    def __init__(self, cluster: Sandbox, binaries: Binaries, made: State, api: Api, state: NodeState) -> None:
        self._cluster, self._binaries, self._api, self._made, self._state = cluster, binaries, api, made, state
        self._spec: ClusterSpec = made.spec
        self._cluster_folder = made.folder
        self._import = Lock()
        self.number = state.number
        self.name = f"node{state.number}"
        self.folder = made.folder / self.name
        self._sandbox = Sandbox(cluster.cluster_id, state.init) if state.init else None
        self._kubelet: Process | None = None
        self._containerd: Process | None = None

    # --- what tests do to a node ---

    @property
    def running(self) -> bool:
        """Whether the node's box is there (its kubelet may be dead)."""
        return self._sandbox is not None and self._sandbox.init.alive

    def kill_kubelet(self) -> None:
        """SIGKILL the kubelet: the node falls silent, its containers run on."""
        kubelet = self._kubelet.inner if self._kubelet else self._state.kubelet
        if kubelet is not None:
            kubelet.kill(signal.SIGKILL)
            wait_until(lambda: not kubelet.alive, 10)

    def stop(self) -> None:
        """Lose the node: kubelet, containerd and every container die at this moment, as by pulling its plug."""
        if self._sandbox is not None:
            self._sandbox.destroy()
            cgroups.remove(self._cluster.cluster_id, [self.number])

    def start(self) -> None:
        """Bring a stopped node, or a killed kubelet, back and wait until the node is Ready."""
        before = self._heartbeat()
        if not self.running:
            self.boot()
        self.start_kubelet()
        if not wait_until(lambda: self.ready() and self._heartbeat() != before, READY_SECONDS):
            raise ClusterFailed(f"{self.name} did not come back within {READY_SECONDS:.0f} s; see {self.folder}/*.log")

    def set_gpu_health(self, index: int, healthy: bool) -> None:
        """Let fake GPU ``index`` (from 0) of this node be healthy or not; the kubelet learns it within a second."""
        file = self.folder / "unhealthy-gpus"
        sick = set(file.read_text().split()) if file.exists() else set()
        sick = sick - {f"GPU-{index}"} if healthy else sick | {f"GPU-{index}"}
        scratch = file.with_suffix(".new")
        scratch.write_text("".join(f"{gpu}\n" for gpu in sorted(sick)))
        scratch.rename(file)

    # --- booting ---

    def prepare(self, archives: Iterable[Path]) -> None:
        """First boot: the box, containerd without what an earlier cluster ran, and these images."""
        for part in ("kubelet", "log"):
            (self.folder / part).mkdir(parents=True)
        self.boot()
        if self.container_ids():
            self._forget_containers()
        for archive in archives:
            self.load_image(archive)

    def boot(self) -> None:
        """The box and containerd."""
        cgroups.make(self._cluster.cluster_id, self.number)
        arguments = [f"-tmpfs={covered}" for covered in ("/run", "/var/lib")]
        arguments += [f"-bind={self.folder / 'kubelet'}:{KUBELET_ROOT}", f"-bind={self.folder / 'log'}:/var/log"]
        arguments += [f"-pretend={setting}={value}" for setting, value in PRETENDED_SETTINGS.items()]
        self._sandbox = sandbox.create(
            self._cluster.cluster_id,
            self._binaries.path("devtool"),
            self.folder / "init.log",
            inside=self._cluster,
            init_arguments=arguments,
        )
        self._state.init = self._sandbox.init
        self._made.write()
        self._containerd = self._start_containerd()

    def _start_containerd(self) -> Process:
        plugins = machine.cni_folder()
        if plugins is None:
            raise UnsupportedMachine("needs the CNI plugins: install the package containernetworking-plugins")
        store = Path(self._state.slot) / str(self.number)
        store.mkdir(parents=True, exist_ok=True)
        config = self.folder / "containerd.toml"
        conf = self._cluster_folder / "cni" / "net.d"
        config.write_text(
            CONTAINERD_CONFIG.format(
                store=store / "containerd", run=CONTAINERD_ROOT, pause=images.PAUSE, plugins=plugins, conf=conf
            )
        )
        argv = [self._binaries.path("containerd"), f"--config={config}"]
        containerd = self._box.spawn(
            f"containerd of {self.name}", argv, self.folder / "containerd.log", path=str(self._binaries.folder)
        )
        containerd.wait_ready(self._containerd_answers, READY_SECONDS)
        return containerd

    def _containerd_answers(self) -> bool:
        socket = Path(f"/proc/{self._box.init.pid}/root{CONTAINERD_ROOT}/containerd.sock")
        if not socket.exists():
            return False
        with suppress(ClusterFailed):
            self._ctr("version")
            return True
        return False

    @property
    def _box(self) -> Sandbox:
        if self._sandbox is None:
            raise ClusterFailed(f"{self.name} was never booted")
        return self._sandbox

    def _ctr(self, *arguments: str) -> str:
        return self._box.run([self._binaries.path("ctr"), "-n", "k8s.io", *arguments])

    def container_ids(self) -> list[str]:
        """Ids of the node's containers, whatever their state, with the pause container of every pod."""
        return self._ctr("containers", "ls", "-q").split()

    def _forget_containers(self) -> None:
        """Remove the containers of the cluster that had this store before: a kubelet would take them for its own."""
        self._ctr("containers", "rm", *self.container_ids())
        snapshots = [line.split() for line in self._ctr("snapshots", "ls").splitlines()[1:]]
        with suppress(ClusterFailed):  # whatever is still referred to stays; the rest is garbage-collected
            self._ctr("snapshots", "rm", *(entry[0] for entry in snapshots if entry and entry[-1] == "Active"))
        socket = Path(f"/proc/{self._box.init.pid}/root{CONTAINERD_ROOT}/containerd.sock")
        assert self._containerd is not None
        self._containerd.stop(signal.SIGKILL)
        socket.unlink(missing_ok=True)
        self._containerd = self._start_containerd()

    def start_kubelet(self) -> None:
        """The kubelet, and the fake GPUs where there are any; returns without waiting for Ready."""
        config = self.folder / "kubelet.json"
        config.write_text(json.dumps(self._kubelet_configuration(), indent=1) + "\n")
        flags = {
            "config": config,
            "kubeconfig": self.folder / "kubelet.kubeconfig",
            "root-dir": KUBELET_ROOT,
            "hostname-override": self.name,
            "node-ip": network.node_address(self.number),
            "v": 2,
        }
        argv = [self._binaries.path("kubelet"), *(f"--{name}={value}" for name, value in flags.items())]
        self._kubelet = self._box.spawn(f"kubelet of {self.name}", argv, self.folder / "kubelet.log")
        self._state.kubelet = self._kubelet.inner
        self._made.write()
        if self._spec.gpus_per_node:
            self._start_gpus()

    def _start_gpus(self) -> None:
        registry = f"{KUBELET_ROOT}/plugins_registry"
        (self.folder / "kubelet/plugins_registry").mkdir(exist_ok=True)
        argv = [self._binaries.path("fake-gpu-plugin"), f"-registry={registry}", f"-resource={GPU_RESOURCE}"]
        argv += [f"-count={self._spec.gpus_per_node}", f"-unhealthy={self.folder / 'unhealthy-gpus'}"]
        self._box.spawn(f"GPU plugin of {self.name}", argv, self.folder / "gpu-plugin.log")

    def write_credentials(self, authority: Authority) -> None:
        """The kubelet's kubeconfig."""
        client = authority.client(self.name, f"system:node:{self.name}", "system:nodes")
        authority.kubeconfig(self.folder / "kubelet.kubeconfig", IN_CLUSTER_SERVER, client)

    def _kubelet_configuration(self) -> dict[str, object]:
        resolver = self.folder / "resolv.conf"
        resolver.write_text("")
        authority = self._cluster_folder / "pki" / "ca.crt"
        address = network.node_address(self.number)
        never = {f"{part}.{what}": "0%" for part in ("nodefs", "imagefs") for what in ("available", "inodesFree")}
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": f"unix://{CONTAINERD_ROOT}/containerd.sock",
            "address": address,
            "healthzBindAddress": address,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(authority)},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": "/" + cgroups.name(self._cluster.cluster_id, self.number),
            "failCgroupV1": False,
            "enforceNodeAllocatable": ["pods"],
            "clusterDNS": [network.CONTROL_PLANE_ADDRESS],
            "clusterDomain": network.CLUSTER_DOMAIN,
            "resolvConf": str(resolver),
            "volumePluginDir": f"{KUBELET_ROOT}/volume-plugins",
            "failSwapOn": False,
            "oomScoreAdj": 0,
            # The machine's disk is not ours to judge: a full one must not evict a test's pods.
            "evictionHard": never,
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "kubeAPIQPS": 500,
            "kubeAPIBurst": 500,
            "eventRecordQPS": 100,
            "nodeStatusUpdateFrequency": "2s",
            "nodeLeaseDurationSeconds": 6,
        }

    # --- state ---

    def _object(self) -> dict[str, object]:
        return self._api.object(f"/api/v1/nodes/{self.name}") or {}

    def _heartbeat(self) -> object:
        lease = self._api.object(f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{self.name}")
        return lease["spec"].get("renewTime") if lease else None

    def ready(self) -> bool:
        """Whether the node is Ready and takes pods."""
        node = self._object()
        status, spec = node.get("status", {}), node.get("spec", {})
        assert isinstance(status, dict)
        assert isinstance(spec, dict)
        conditions = status.get("conditions", [])
        ready = any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)
        return ready and not spec.get("taints")

    def wait_ready(self) -> None:
        """Wait for ``ready`` after ``start_kubelet``."""
        if self._kubelet is None:
            raise ClusterFailed(f"the kubelet of {self.name} was never started")
        self._kubelet.wait_ready(self.ready, READY_SECONDS)

    # --- images ---

    def load_image(self, archive: Path) -> bool:
        """Import an image into the node's store, unless that very image is there already. True where it was not."""
        image = images.identify(archive)
        with self._import:
            record = Path(self._state.slot) / str(self.number) / "images.json"
            known: dict[str, str] = json.loads(record.read_text()) if record.exists() else {}
            held = set(self._ctr("images", "ls", "-q").split())
            if image.names and all(known.get(name) == image.config and name in held for name in image.names):
                return False
            error = self._import_archive(archive)
            while (left_over := images.left_over_snapshot(error)) and left_over.is_relative_to(self._state.slot):
                shutil.rmtree(left_over)
                error = self._import_archive(archive)
            if error:
                raise ClusterFailed(f"{self.name} could not import {archive}: {error[-1000:]}")
            known |= dict.fromkeys(image.names, image.config)
            scratch = record.with_suffix(".new")
            scratch.write_text(json.dumps(known, indent=1) + "\n")
            scratch.rename(record)
            return True

    def _import_archive(self, archive: Path) -> str:
        """Import it; return what went wrong, or nothing."""
        # --local: unpacked by the client, a fifth faster than through the transfer service.
        argv = self._box.command([self._binaries.path("ctr"), "-n", "k8s.io", "images", "import", "--local", "-"])
        with archive.open("rb") as content:
            done = subprocess.run(argv, stdin=content, capture_output=True, text=True, check=False)
        return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""

    def pod_processes(self, pod_uid: str) -> list[int]:
        """Numbers of a pod's processes on this node."""
        return cgroups.pod_processes(self._cluster.cluster_id, self.number, pod_uid)
