"""A control plane with simulated nodes, and processes with identities of their own: what every measurement stands on.

Operators and the simulator run in the cluster's network, each as a ServiceAccount: the audit log then says who asked for what,
whatever a client calls itself, and nobody is exempt from the API server's fairness.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.controlplane.measure import AuditLog, Usage, counter, scraped, usage
from bench.controlplane.observer import Marks, Observer
from bench.runs import say
from devcluster import Cluster, ClusterSpec
from devcluster.network import API_PORT, CONTROL_PLANE_ADDRESS, POD_CIDR

__all__ = ["OPERATOR", "Program", "Stage", "Tunesmith", "opened"]

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "bench"
OPERATOR = "tunesmith"
METRICS_PORT, HEALTH_PORT = 9090, 18080


class Program:
    """A process in the cluster's network."""

    def __init__(
        self, stage: Stage, name: str, argv: Sequence[str], environment: dict[str, str], **options: Any
    ) -> None:
        self.name, self.log = name, stage.folder / f"{name}.log"
        with self.log.open("ab") as sink:
            self.process = stage.cluster.run_in_network(
                argv,
                env=os.environ | environment,
                stderr=sink,
                **{"stdout": sink, "stdin": subprocess.DEVNULL} | options,
            )
        self._last = Usage(0, 0, 0)
        self.killed = False

    def usage(self) -> Usage:
        """What it has used; what it had used when last looked at, once it has ended."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            self._last = usage(self.process.pid)
        return self._last

    def alive(self) -> None:
        """Raises RuntimeError with the end of its log where it has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} has ended:\n{self.log.read_text()[-3000:]}")

    def kill(self, sig: int = signal.SIGKILL) -> Usage:
        """Look at it a last time and end it."""
        found, self.killed = self.usage(), True
        self.process.send_signal(sig)
        self.process.wait(timeout=60)
        return found


class Simulator(Program):
    """`bench.controlplane.simulator` and its input."""

    def __init__(self, stage: Stage) -> None:
        argv = [sys.executable, "-m", "bench.controlplane.simulator", str(stage.kubeconfig("simulator"))]
        path = ":".join(str(ROOT / it) for it in ("crds", "operator", "tests", "."))
        super().__init__(
            stage, "simulator", argv, {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer("ready")

    def order(self, **changes: Any) -> None:
        """Change what pods do; see `simulator.Orders`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(changes) + "\n")
        self.process.stdin.flush()
        self._answer("done")

    def _answer(self, wanted: str) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != wanted:
            raise RuntimeError(f"the simulator doesn't answer:\n{self.log.read_text()[-3000:]}")


class Tunesmith(Program):
    """Our operator, of any checkout."""

    def __init__(self, stage: Stage, code: Path = ROOT, qps: float = 100.0, **settings: str) -> None:
        environment = {
            "PYTHONPATH": f"{code / 'crds'}:{code / 'operator'}",
            "KUBECONFIG": str(stage.kubeconfig(OPERATOR)),
            "TUNESMITH_TRAINER_IMAGE": "localhost/trainer:test",
            "TUNESMITH_OPERATOR_NAMESPACE": NAMESPACE,
            "TUNESMITH_HEALTH_PORT": str(HEALTH_PORT),
            "TUNESMITH_METRICS_PORT": str(METRICS_PORT),
            "TUNESMITH_LOG_LEVEL": "WARNING",
            "TUNESMITH_QPS": f"{qps:g}",
            "TUNESMITH_BURST": f"{qps:.0f}",
            **settings,
        }
        self._port = stage.port_of(METRICS_PORT)
        super().__init__(stage, OPERATOR, [sys.executable, "-m", "tunesmith_operator"], environment)
        self.begun = time.time()

    def metrics(self) -> dict[str, float]:
        """Its counters."""
        self.alive()
        return scraped(self._port)

    def reconciles(self) -> float:
        """How many it has done."""
        return counter(self.metrics(), "tunesmith_reconciles_total")

    def depth(self) -> float:
        """How many objects wait to be reconciled."""
        return self.metrics().get("tunesmith_queue_depth", float("inf"))

    def settle(self, seconds: float, quiet: float = 2.0) -> float:
        """Wait until it is at rest: the queue is empty, no reconcile ran and hardly any CPU was used for `quiet` seconds.

        Returns how long that took, without the quiet seconds.
        """
        begun, deadline = time.time(), time.monotonic() + seconds
        still: tuple[float, float, float] | None = None  # since when, reconciles, CPU
        while time.monotonic() < deadline:
            found = self.metrics()
            done, cpu = counter(found, "tunesmith_reconciles_total"), self.usage().cpu_seconds
            busy = not found or found.get("tunesmith_queue_depth", 1.0) > 0
            if busy or still is None or done != still[1] or cpu - still[2] > 0.03 * (time.time() - still[0]) + 0.05:
                still = None if busy else (time.time(), done, cpu)
            elif time.time() - still[0] >= quiet:
                return still[0] - begun
            time.sleep(0.25)
        raise RuntimeError(f"the operator is not at rest after {seconds:.0f} s: {self.metrics()}")


class Stage:
    """One control plane under measurement."""

    def __init__(self, cluster: Cluster, crds: Path = ROOT) -> None:
        self.cluster, self.namespace = cluster, NAMESPACE
        self.folder = cluster.folder / "bench"
        self.folder.mkdir()
        self.audit = AuditLog(cluster.folder / "audit.log")
        self._ports: dict[int, int] = {}
        self._programs: list[Program] = []
        self._observers: list[Observer] = []
        cluster.kubectl("create", "namespace", NAMESPACE)
        cluster.run_in_network(["ip", "route", "add", "local", POD_CIDR, "dev", "lo"]).wait()
        for plural in ("finetunejobs", "modeldeployments"):
            cluster.kubectl("apply", "-f", str(crds / f"crds/tunesmith.dev_{plural}.yaml"))
        self.simulator = Simulator(self)
        self._programs.append(self.simulator)

    def kubeconfig(self, name: str, inside: bool = True) -> Path:
        """Credentials of a ServiceAccount of that name that may do everything; made on first use."""
        path = self.folder / f"{name}-{'inside' if inside else 'outside'}.kubeconfig"
        if path.exists():
            return path
        run = self.cluster.kubectl
        if not run("-n", NAMESPACE, "get", "serviceaccount", name, "--ignore-not-found"):
            run("-n", NAMESPACE, "create", "serviceaccount", name)
            run(
                "create",
                "clusterrolebinding",
                f"bench-{name}",
                "--clusterrole=cluster-admin",
                f"--serviceaccount={NAMESPACE}:{name}",
            )
        token = run("-n", NAMESPACE, "create", "token", name, "--duration=24h").strip()
        config = json.loads(self.cluster.kubeconfig.read_text())
        config["users"][0]["user"] = {"token": token}
        config["contexts"][0]["context"]["namespace"] = NAMESPACE
        if inside:
            config["clusters"][0]["cluster"]["server"] = f"https://{CONTROL_PLANE_ADDRESS}:{API_PORT}"
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def port_of(self, port: int) -> int:
        """The machine's port that leads to that one of the cluster's network."""
        if port not in self._ports:
            self._ports[port] = self.cluster.forward(f"127.0.0.1:{port}")
        return self._ports[port]

    def operator(self, code: Path = ROOT, qps: float = 100.0, **settings: str) -> Tunesmith:
        """Start our operator and wait until it is at work."""
        started = Tunesmith(self, code, qps, **settings)
        self._programs.append(started)
        while not started.metrics():
            time.sleep(0.05)
        return started

    def program(self, name: str, argv: Sequence[str], **environment: str) -> Program:
        """Start a peer."""
        started = Program(self, name, argv, environment)
        self._programs.append(started)
        return started

    def observer(self, watched: dict[str, Marks]) -> Observer:
        """Watch objects of these paths from now on."""
        started = Observer(self.kubeconfig("observer", inside=False), watched)
        self._observers.append(started)
        return started

    def check(self) -> None:
        """Raises RuntimeError where a program has ended that nobody has killed."""
        for program in self._programs:
            if not program.killed:
                program.alive()

    def close(self) -> None:
        """End everything that was started here; the cluster is the caller's."""
        for observer in self._observers:
            observer.close()
        for program in reversed(self._programs):
            if program.process.poll() is None:
                program.kill()


@contextlib.contextmanager
def opened(crds: Path = ROOT) -> Iterator[Stage]:
    """A stage of its own, removed afterwards."""
    with Cluster.start(ClusterSpec(name="bench", nodes=0, audit=True, node_monitor_grace_seconds=40)) as cluster:
        stage = Stage(cluster, crds)
        try:
            yield stage
        except RuntimeError:
            for log in sorted(stage.folder.glob("*.log")):
                say(f"{log.name} ends:\n{log.read_text()[-2000:]}")
            raise
        finally:
            stage.close()
