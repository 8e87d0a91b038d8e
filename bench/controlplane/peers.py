"""The operators people use today, run through the same life: `--peer kubeflow`, `--peer kuberay`.

They are built once, from their Go modules, into the cache folder. Their settings are upstream's defaults (KubeRay 100 requests a second, Kubeflow Trainer 20, JobSet 500); webhooks are off.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.controlplane.figures import Settings, created, plain, until_pods
from bench.controlplane.load import create_all
from bench.controlplane.measure import writes
from bench.controlplane.observer import condition
from bench.controlplane.stage import NAMESPACE, Program, Stage, opened
from bench.runs import Figures, say
from devcluster import binaries, paths

__all__ = ["PEERS", "measured"]

JSON = dict[str, object]
MAINS = Path(__file__).parent / "mains"
IMAGE = "localhost/trainer:test"
RESOURCES = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}


@dataclass(frozen=True)
class Built:
    """A program that is made from a Go module."""

    name: str
    module: str
    version: str
    crds: str
    """Folder of its CRDs in the module."""
    package: str = "."
    """What is compiled, unless `mains` holds a main for it."""

    def ensure(self) -> tuple[Path, Path]:
        """The program and the folder of its CRDs; built on first use (two minutes each on two cores)."""
        main = MAINS / f"{self.name}.go"
        source = main.read_bytes() if main.exists() else b""
        key = hashlib.sha256(f"{self.module} {self.version} {self.package}".encode() + source).hexdigest()[:12]
        folder = paths.cache() / "peers" / f"{self.name}-{self.version}-{key}"
        with paths.locked(paths.cache() / "peers" / "build.lock"):
            if not folder.is_dir():
                self._build(folder, main)
        return folder / self.name, folder / "crds"

    def _build(self, folder: Path, main: Path) -> None:
        go = binaries.find_go(say).go
        say(f"building {self.module} {self.version}")
        environment = binaries.go_environment()
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
            found = subprocess.run(
                [go, "mod", "download", "-json", f"{self.module}@{self.version}"],
                cwd=scratch, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if found.returncode:
                raise RuntimeError(
                    f"{self.module} {self.version} can't be fetched: {found.stdout[-1000:]}{found.stderr[-1000:]}"
                )
            source, made = Path(scratch) / "source", Path(scratch) / "made"
            shutil.copytree(json.loads(found.stdout)["Dir"], source, copy_function=shutil.copyfile)
            for path in source.rglob("*"):
                path.chmod(0o755 if path.is_dir() else 0o644)
            package = self.package
            if main.exists():
                package = "./cmd/bench"
                (source / "cmd/bench").mkdir(parents=True)
                shutil.copyfile(main, source / "cmd/bench/main.go")
            argv = [
                go,
                "build",
                "-trimpath",
                "-buildvcs=false",
                "-mod=readonly",
                "-ldflags=-s -w",
                "-o",
                str(made / self.name),
                package,
            ]
            done = subprocess.run(argv, cwd=source, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{self.module} {self.version} can't be built: {done.stderr[-3000:]}")
            shutil.copytree(source / self.crds, made / "crds")
            made.rename(folder)


JOBSET = Built("jobset", "sigs.k8s.io/jobset", "v0.8.2", "config/components/crd/bases")
TRAINER = Built("trainer", "github.com/kubeflow/trainer/v2", "v2.0.0", "manifests/base/crds")
KUBERAY = Built("kuberay", "github.com/ray-project/kuberay/ray-operator", "v1.6.0", "config/crd/bases")


@dataclass(frozen=True)
class Peer:
    """What is started, what is asked of it, and how its end looks."""

    programs: dict[Built, list[str]]
    """With their arguments."""
    job: Callable[[str], JSON]
    watched: str
    ended: Callable[[JSON], bool]
    pods: int
    """Of a job, when it runs."""
    makes: str
    """What its last object of a job is that comes before the pods run: `jobs`, or `pods` where it makes them itself."""
    setup: tuple[JSON, ...] = ()


def _container(name: str, *command: str) -> JSON:
    return {"name": name, "image": IMAGE, "command": list(command) or ["train"], "resources": RESOURCES}


def _runtime() -> JSON:
    # what JobSet's defaulting webhook would add is written out
    pod = {"restartPolicy": "Never", "containers": [_container("node")]}
    spec = {"completionMode": "Indexed", "template": {"spec": pod}}
    job = {
        "name": "node",
        "template": {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}, "spec": spec},
    }
    jobset = {
        "replicatedJobs": [job], "successPolicy": {"operator": "All"}, "startupPolicy": {"startupPolicyOrder": "AnyOrder"},
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
    }  # fmt: skip
    policy = {"numNodes": 2, "torch": {"numProcPerNode": "auto"}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "ClusterTrainingRuntime", "metadata": {"name": "bench"},
        "spec": {"mlPolicy": policy, "template": {"spec": jobset}},
    }  # fmt: skip


def _train_job(name: str) -> JSON:
    spec = {"runtimeRef": {"name": "bench"}, "trainer": {"numNodes": 2}}
    meta = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": meta, "spec": spec}


def _ray_job(name: str) -> JSON:
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [_container("ray-head")]}}}
    workers = {
        "groupName": "workers", "replicas": 2, "minReplicas": 2, "maxReplicas": 2, "rayStartParams": {},
        "template": {"spec": {"containers": [_container("ray-worker")]}},
    }  # fmt: skip
    spec = {
        "entrypoint": "python train.py", "jobId": name, "shutdownAfterJobFinishes": True,
        "rayClusterSpec": {"rayVersion": "2.52.0", "headGroupSpec": head, "workerGroupSpecs": [workers]},
    }  # fmt: skip
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": spec,
    }


def _ray_ended(body: JSON) -> bool:
    status = body.get("status") or {}
    return status.get("jobDeploymentStatus") == "Complete"  # type: ignore[attr-defined]


PEERS = {
    "kubeflow": Peer(
        {JOBSET: [], TRAINER: []}, _train_job, f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs",
        lambda body: condition(body, "Complete").get("status") == "True", 2, "jobs", (_runtime(),),
    ),
    # without a cluster's DNS it reaches the heads by the API server's proxy, which costs it reads only
    "kuberay": Peer(
        {KUBERAY: ["--enable-leader-election=false", "--use-kubernetes-proxy=true", "--metrics-addr=0", "--health-probe-bind-address=0"]},
        _ray_job, f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs", _ray_ended, 4, "pods",
    ),
}  # fmt: skip


def _start(stage: Stage, peer: Peer) -> list[Program]:
    programs = []
    for built, arguments in peer.programs.items():
        program, crds = built.ensure()
        for crd in sorted(crds.glob("*.*_*.yaml")):
            stage.cluster.kubectl("apply", "--server-side", "-f", str(crd))
        stage.cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
        kubeconfig = str(stage.kubeconfig(built.name))
        programs.append(stage.program(built.name, [str(program), *arguments], KUBECONFIG=kubeconfig))
    for body in peer.setup:
        stage.cluster.kubectl("apply", "--server-side", "-f", "-", stdin=json.dumps(body))
    time.sleep(3)
    return programs


def run(name: str, count: int, settings: Settings) -> Figures:
    """`writes_per_job`, `created_seconds` until the last Job (pod) was created; `rss_mib`, `cpu_seconds` of its programs together."""
    peer = PEERS[name]
    for built in peer.programs:
        built.ensure()
    with opened() as stage:
        stage.simulator.order(run_seconds=-1)
        programs = _start(stage, peer)

        def marks(body: JSON) -> Iterator[str]:
            yield "there"
            if peer.ended(body):
                yield "good"

        observer = stage.observer({peer.watched: marks})
        stage.audit.skip()
        names = [f"job-{number:05d}" for number in range(count)]
        begun, _ = create_all(stage.kubeconfig("load", inside=False), [[peer.job(it)] for it in names], settings.qps)
        requests = until_pods(stage, peer.pods * count, 60.0 + count)
        last = created(requests, peer.makes) - begun
        stage.simulator.order(finish_per_second=settings.qps / 4)
        observer.wait("good", set(names), 120.0 + count, say)
        time.sleep(5)
        requests += stage.audit.read()
        found = [writes(requests, it.name).total() for it in programs]
        used = [it.usage() for it in programs]
        return {
            "writes_per_job": sum(found) / count,
            "created_seconds": last,
            "rss_mib": sum(it.peak_mib for it in used),
            "cpu_seconds": sum(it.cpu_seconds for it in used),
        }


def measured(name: str, counts: list[int], settings: Settings) -> Figures:
    """The peer's figures by count; `create_vs_plain` is against the last Job of a plain client that makes four objects for each."""
    figures: Figures = {}
    for count in counts:
        say(f"{count} jobs through {name}")
        found = run(name, count, settings)
        found["create_vs_plain"] = found["created_seconds"] / plain(count, False, settings)["jobs_seconds"]
        figures |= {f"{name}_{key}_{count}": value for key, value in found.items()}
    return figures
