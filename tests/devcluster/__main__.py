"""``python -m devcluster``: a cluster by hand. Every command ends with what to do next."""

import argparse
import os
import sys

from devcluster import binaries, machine, paths, progress, reaper, state
from devcluster.cluster import Cluster
from devcluster.errors import ClusterFailed, UnsupportedMachine
from devcluster.spec import ClusterSpec

COMMAND = "python -m devcluster"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster and leave it up")
    up.add_argument("--nodes", type=int, default=2, help="0 is a control plane alone")
    up.add_argument("--gpus", type=int, default=0, help="fake nvidia.com/gpu devices per node")
    up.add_argument("--audit", action="store_true", help="keep an audit log")
    down = commands.add_parser("down", help="remove a cluster without a trace")
    for command in (up, down):
        command.add_argument("--name", default="dev")
    kubectl = commands.add_parser("kubectl", help="run kubectl against a cluster: kubectl --name dev -- get pods -A")
    kubectl.add_argument("--name", default="dev")
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER)
    commands.add_parser("status", help="list the clusters of this machine")
    commands.add_parser("build", help="build the programs that a cluster runs, where that has not been done")
    chosen = parser.parse_args(arguments)
    try:
        run = {"up": _up, "down": _down, "kubectl": _kubectl, "status": _status, "build": _build}[chosen.command]
        return run(chosen)
    except UnsupportedMachine as error:
        print(f"This machine cannot run a cluster: it {error}", file=sys.stderr)
        return 3
    except (ClusterFailed, LookupError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1


def _up(chosen: argparse.Namespace) -> int:
    spec = ClusterSpec(name=chosen.name, nodes=chosen.nodes, gpus_per_node=chosen.gpus, audit=chosen.audit, keep=True)
    cluster = Cluster.start(spec)
    print(f"Cluster {cluster.id} is up.\n  export KUBECONFIG={cluster.kubeconfig} PATH={cluster.programs.folder}:$PATH")
    print(f"  {COMMAND} kubectl --name {cluster.id} -- get pods -A\n  {COMMAND} down --name {cluster.id}")
    return 0


def _down(chosen: argparse.Namespace) -> int:
    existed = reaper.remove_cluster(chosen.name)
    print(f"Cluster {chosen.name} is gone." if existed else f"There is no cluster {chosen.name}.")
    return 0


def _kubectl(chosen: argparse.Namespace) -> int:
    cluster = Cluster.attach(chosen.name)
    program = cluster.programs.path("kubectl")
    arguments = chosen.arguments[1:] if chosen.arguments[:1] == ["--"] else chosen.arguments
    os.execve(program, ["kubectl", *arguments], os.environ | {"KUBECONFIG": str(cluster.kubeconfig)})


def _status(_: argparse.Namespace) -> int:
    folders = sorted(paths.clusters().iterdir()) if paths.clusters().is_dir() else []
    found = [made for folder in folders if (made := state.read(folder))]
    for made in found:
        alive = "up" if made.ready else "starting"
        condition = alive if made.running else "dead: the next start removes it"
        print(f"{made.id:24} {condition:10} nodes={made.spec.nodes} KUBECONFIG={made.folder}/kubeconfig")
    if not found:
        print(f"No cluster is up. `{COMMAND} up` starts one.")
    return 0


def _build(_: argparse.Namespace) -> int:
    report = progress.to_stderr()
    machine.ensure(1, report)
    programs = binaries.ensure(report)
    print(f"The programs are in {programs.folder}. `{COMMAND} up` starts a cluster.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
