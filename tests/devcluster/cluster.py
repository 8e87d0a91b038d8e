"""The package's public face: start, use, find again and remove a cluster."""

import contextlib
import datetime
import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import kubernetes

from devcluster import audit, binaries, machine, network, paths, progress, reaper, state
from devcluster.binaries import Binaries
from devcluster.boot import Booted, boot
from devcluster.controlplane import READY_SECONDS, Api
from devcluster.errors import ClusterFailed, CommandFailed
from devcluster.nodes import Node
from devcluster.processes import command_line
from devcluster.progress import Progress
from devcluster.reader import Reader
from devcluster.sandbox import MARK, Sandbox
from devcluster.spec import ClusterSpec
from devcluster.state import State

_serial = itertools.count(1)


class PodProcess(NamedTuple):
    """One process of a pod, numbered as the machine sees it: ``os.kill`` works on it."""

    pid: int
    command_line: str


class Cluster:
    """A running cluster. Made by ``start`` or ``attach``; a context manager that stops it."""

    def __init__(self, made: State, programs: Binaries, up: Booted) -> None:
        self._state, self._binaries, self._up = made, programs, up
        self._reader = Reader(up.api)

    # --- life ---

    @classmethod
    def start(cls, spec: ClusterSpec, report: Progress | None = None) -> "Cluster":
        """Boot a cluster and wait until it is ready; first removes what dead owners left behind.

        A kept cluster is found again by its name, so a second one of that name is refused; any others may share one.

        Raises: ``UnsupportedMachine`` where this machine cannot (what is missing, what to do), ``ClusterFailed``
        where a part did not come up.
        """
        report = report or progress.to_stderr()
        machine.ensure(spec.nodes, report)
        programs = binaries.ensure(report)
        for identifier in reaper.reap():
            report(f"removed what was left of cluster {identifier}")
        identifier = spec.name if spec.keep else f"{spec.name}-{os.getpid()}-{next(_serial)}"
        try:
            made = state.create(identifier, spec)
        except FileExistsError:
            raise ClusterFailed(
                f"cluster {identifier} is up already: `python -m devcluster down --name {identifier}` removes it"
            ) from None
        made.binaries = str(programs.folder)
        try:
            return cls(made, programs, boot(made, programs, report))
        except BaseException:
            reaper.remove_cluster(identifier)
            raise

    @classmethod
    def attach(cls, name: str) -> "Cluster":
        """A cluster that was started with ``keep`` and is still up; ``LookupError`` where there is none."""
        made = state.read(paths.clusters() / name)
        if made is None or not made.running or not made.ready or made.init is None:
            raise LookupError(f"no cluster named {name} is up: `python -m devcluster up --name {name}` starts one")
        programs = Binaries(Path(made.binaries))
        sandbox = Sandbox(made.id, made.init)
        api = Api(made.api_port, made.folder / "pki")
        members = [Node(sandbox, programs, made, api, entry) for entry in made.nodes]
        return cls(made, programs, Booted(sandbox, api, members, None, None))

    def stop(self) -> None:
        """Remove the cluster without a trace; a second call does nothing."""
        if self._up.lifeline is not None:
            os.close(self._up.lifeline)
            self._up = replace(self._up, lifeline=None)
        with contextlib.suppress(ClusterFailed):
            self._up.sandbox.destroy()
        reaper.remove_cluster(self._state.id)

    def restart_api_server(self) -> None:
        """Kill the API server and start it anew: it has forgotten what happened, and old watches have expired."""
        server = self._up.server
        if server is None:
            raise LookupError("the API server was started by another process")
        server.stop(signal.SIGKILL)
        again = self._up.sandbox.spawn(server.name, server.argv, server.log)
        self._up = replace(self._up, server=again)
        again.wait_ready(lambda: self._up.api.text("/readyz") == "ok", READY_SECONDS)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- use ---

    @property
    def id(self) -> str:
        """Unique among the running clusters of this machine."""
        return self._state.id

    @property
    def spec(self) -> ClusterSpec:
        """What it was asked to be."""
        return self._state.spec

    @property
    def folder(self) -> Path:
        """The cluster's folder, with the programs' logs in ``logs`` and ``node*``; removed with the cluster."""
        return self._state.folder

    @property
    def programs(self) -> Binaries:
        """The programs that the cluster runs: kubectl and helm among them."""
        return self._binaries

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig, for the machine's own network."""
        return self.folder / "kubeconfig"

    @property
    def host_ip(self) -> str:
        """Address on which a server started with ``run_in_network`` can listen so that pods reach it."""
        return network.HOST_ADDRESS

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run kubectl as the administrator and return its output; ``CommandFailed`` where it fails and ``check``."""
        return self._run([self._binaries.path("kubectl"), *arguments], stdin, check)

    def get(self, kind: str, name: str, namespace: str = "") -> dict[str, Any]:
        """An object, of a kind as kubectl knows it; an empty dict where there is none."""
        return self._reader.get(kind, name, namespace)

    def get_all(self, kind: str, namespace: str = "", selector: str = "") -> list[dict[str, Any]]:
        """The objects of a kind; in all namespaces where none is named."""
        return self._reader.get_all(kind, namespace, selector)

    def helm(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """The same for helm, with a configuration and cache of the cluster's own."""
        return self._run([self._binaries.path("helm"), *arguments], stdin, check)

    def _run(self, argv: Sequence[str], stdin: str | None, check: bool) -> str:
        homes = {f"HELM_{kind}_HOME": str(self.folder / "helm" / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA")}
        environment = os.environ | homes | {"KUBECONFIG": str(self.kubeconfig)}
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, env=environment)
        if check and done.returncode:
            raise CommandFailed([Path(argv[0]).name, *argv[1:]], done.returncode, done.stdout, done.stderr)
        return done.stdout

    def api_client(self) -> kubernetes.client.ApiClient:
        """A client of the official library, as the administrator. The caller closes it."""
        return kubernetes.config.new_client_from_config(config_file=str(self.kubeconfig))

    def exec_pod(self, namespace: str, pod: str, *argv: str, container: str | None = None) -> str:
        """Run a command in a pod's container and return its output."""
        chosen = ["-c", container] if container else []
        return self.kubectl("exec", "-n", namespace, pod, *chosen, "--", *argv)

    def pod_pids(self, namespace: str, pod: str) -> list[PodProcess]:
        """The processes of a pod's containers, without the pause container."""
        found = self._up.api.object(f"/api/v1/namespaces/{namespace}/pods/{pod}")
        if found is None:
            raise LookupError(f"no pod {namespace}/{pod}")
        node = found["spec"].get("nodeName")
        if node is None:
            return []
        pids = self.node(int(node.removeprefix("node"))).pod_processes(found["metadata"]["uid"])
        processes = [PodProcess(pid, command_line(pid)) for pid in pids]
        return [process for process in processes if process.command_line not in ("", "/devtool pause")]

    def node(self, number: int) -> Node:
        """Node 1, 2, …"""
        if not 1 <= number <= len(self._up.nodes):
            raise LookupError(f"no node {number}: the cluster has {len(self._up.nodes)}")
        return self._up.nodes[number - 1]

    def load_image(self, archive: Path) -> None:
        """Import a docker or OCI archive into every node, at once; a node that holds that image already is skipped."""
        if not self._up.nodes:
            raise ClusterFailed("a control plane alone holds no images: start the cluster with nodes")
        with ThreadPoolExecutor(max_workers=len(self._up.nodes)) as pool:
            list(pool.map(lambda node: node.load_image(Path(archive)), self._up.nodes))

    def run_in_network(self, argv: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """``subprocess.Popen`` in the cluster's network; the process is killed when the cluster is removed.

        It listens on ``host_ip`` to be reached by pods; ``forward`` makes it reachable from the machine.
        """
        environment = dict(options.pop("env", None) or os.environ) | {MARK: self.id}
        options.setdefault("start_new_session", True)
        return subprocess.Popen(self._up.sandbox.command(argv, mount=False), env=environment, **options)

    def forward(self, target: str, port: int = 0) -> int:
        """Expose HOST:PORT of the cluster's network (a Service's address too) on 127.0.0.1; returns the port there."""
        log = self.folder / "logs/relay.log"
        return self._up.sandbox.forward(self._binaries.path("devtool"), target, log, port)[0]

    def audit_events(self, since: datetime.datetime | None = None) -> Iterator[dict[str, Any]]:
        """Requests that the API server has answered, as audit events of level Metadata, oldest first."""
        if not self.spec.audit:
            raise ClusterFailed("the cluster keeps no audit log: start it with ClusterSpec(audit=True)")
        return audit.events(self.folder / "audit.log", since)
