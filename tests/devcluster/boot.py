"""Boots one cluster: what can run side by side does. Called by ``Cluster.start`` only."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from devcluster import addons, controlplane, images, network, nodes, sandbox
from devcluster.binaries import Binaries
from devcluster.controlplane import IN_CLUSTER_SERVER, Api, ControlPlane, Credentials
from devcluster.nodes import Node
from devcluster.progress import Progress
from devcluster.sandbox import Process, Sandbox
from devcluster.state import NodeState, State


@dataclass
class Booted:
    """A cluster that is up."""

    sandbox: Sandbox
    api: Api
    nodes: list[Node]
    server: Process | None
    """The API server; None where another process started it."""
    lifeline: int | None
    """Write end of the pipe whose closing ends the cluster; None for a kept one."""


def boot(made: State, binaries: Binaries, progress: Progress) -> Booted:
    """Start everything and wait until pods can be made (or, without nodes, until the API is whole).

    Raises: ``ClusterFailed``. The caller removes what was begun.
    """
    folder, spec = made.folder, made.spec
    (folder / "logs").mkdir()
    box, lifeline = _make_box(made, binaries)
    network.set_up(box, spec.nodes)
    credentials = controlplane.credentials(folder / "pki")
    plane = ControlPlane(box, binaries, folder, spec, credentials)
    made.api_port, server = plane.start_api()
    made.write()
    server_outside = f"https://127.0.0.1:{made.api_port}"
    credentials.authority.kubeconfig(folder / "kubeconfig", server_outside, credentials.admin)
    progress("etcd and kube-apiserver are starting")
    api = Api(made.api_port, folder / "pki")
    members = [Node(box, binaries, made, api, entry) for entry in made.nodes]
    with ThreadPoolExecutor(max_workers=max(1, len(members))) as pool:
        if members:
            network.write_cni(folder / "cni")
        archives = images.built_in(Path(binaries.path("devtool")), binaries.folder)
        prepared = [pool.submit(_prepare, node, credentials, archives, progress) for node in members]
        plane.finish(api, server, progress)
        for future in prepared:
            future.result()
    if members:
        _join(box, binaries, folder, credentials, members, progress)
    made.ready = True
    made.write()
    return Booted(box, api, members, server, lifeline)


def _make_box(made: State, binaries: Binaries) -> tuple[Sandbox, int | None]:
    descriptors: list[int] = []
    arguments: list[str] = []
    lifeline: int | None = None
    if not made.spec.keep:
        watched, lifeline = os.pipe()
        descriptors.append(watched)
        arguments = [f"-watch-fd={watched}"]
    if made.spec.nodes:
        slot = nodes.lease_slot()
        descriptors.append(slot.descriptor)
        made.nodes = [NodeState(number, str(slot.folder)) for number in range(1, made.spec.nodes + 1)]
    try:
        box = sandbox.create(
            made.id,
            binaries.path("devtool"),
            made.folder / "logs/init.log",
            init_arguments=arguments,
            fds=descriptors,
        )
    finally:
        for descriptor in descriptors:  # the box's first process has its own copies
            os.close(descriptor)
    made.init = box.init
    made.write()
    return box, lifeline


def _prepare(node: Node, credentials: Credentials, archives: Sequence[Path], progress: Progress) -> None:
    node.prepare(archives)
    node.write_credentials(credentials.authority)
    progress(f"containerd of {node.name} is ready")


def _join(
    box: Sandbox,
    binaries: Binaries,
    folder: Path,
    credentials: Credentials,
    members: Sequence[Node],
    progress: Progress,
) -> None:
    credentials.authority.kubeconfig(folder / "dns.kubeconfig", IN_CLUSTER_SERVER, credentials.admin)
    for node in members:
        node.start_kubelet()
    proxy = addons.start_proxy(box, binaries, folder, credentials.authority)
    dns = addons.start_dns(box, binaries, folder)
    for node in members:
        node.wait_ready()
        progress(f"{node.name} is Ready")
    addons.wait_ready(box, proxy, dns)
    progress("Services and DNS work")
