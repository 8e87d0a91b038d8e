"""Can this machine run a cluster, and what does it lack? Called before anything else is done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from devcluster import paths
from devcluster.errors import UnsupportedMachine
from devcluster.progress import Progress

CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"), Path("/usr/libexec/cni"))
CNI_PLUGINS = ("bridge", "host-local", "loopback", "portmap")
# Folders that a node covers with empty ones (nodes.py): what it needs must not lie in them.
COVERED = (Path("/run"), Path("/var/run"), Path("/var/lib"), Path("/var/log"))
LONGEST_CACHE_PATH = 200

# Program → Debian package that brings it.
CONTROL_PLANE_TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2"}
NODE_TOOLS = {"runc": "runc", "nft": "nftables", "iptables": "iptables", "conntrack": "conntrack", "mount": "mount"}


def cni_folder() -> Path | None:
    """Where the CNI plugins are."""
    complete = (folder for folder in CNI_FOLDERS if all((folder / plugin).exists() for plugin in CNI_PLUGINS))
    return next(complete, None)


def missing_packages(nodes: int) -> list[str]:
    """Debian packages that a cluster with so many nodes still needs here."""
    tools = CONTROL_PLANE_TOOLS | (NODE_TOOLS if nodes else {})
    missing = {package for tool, package in tools.items() if shutil.which(tool) is None}
    if nodes and cni_folder() is None:
        missing.add("containernetworking-plugins")
    return sorted(missing)


def ensure(nodes: int, progress: Progress) -> None:
    """Install the packages that are missing, where apt-get can.

    Raises: ``UnsupportedMachine`` with what is missing and what to do.
    """
    if sys.platform != "linux":
        raise UnsupportedMachine(f"needs Linux: this is {sys.platform}. Use a Linux machine or virtual machine")
    if os.geteuid() != 0:
        raise UnsupportedMachine("needs root, for namespaces and cgroups: run the same command with sudo -E")
    _check_cache(nodes)
    missing = missing_packages(nodes)
    if missing and shutil.which("apt-get"):
        _install(missing, progress)
        missing = missing_packages(nodes)
    if missing:
        raise UnsupportedMachine(f"needs the Debian packages (or their like) {' '.join(missing)}: install them first")
    _check_namespaces()


def _check_cache(nodes: int) -> None:
    cache = paths.cache().resolve()
    covered = [folder for folder in COVERED if nodes and cache.is_relative_to(folder)]
    if covered:
        raise UnsupportedMachine(f"needs its cache outside {covered[0]}: set TUNESMITH_CACHE to another folder")
    if len(str(cache)) > LONGEST_CACHE_PATH:
        raise UnsupportedMachine(f"needs a cache with a shorter path than {cache}: set TUNESMITH_CACHE")


def _install(packages: list[str], progress: Progress) -> None:
    progress(f"installing {' '.join(packages)} with apt-get")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    with paths.locked(paths.cache() / "apt.lock"):
        for argv in (["apt-get", "update", "-qq"], install):
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnsupportedMachine(
                    f"needs {' '.join(packages)}, and `{' '.join(argv)}` failed: {done.stderr.strip()[-500:]}"
                )


def _check_namespaces() -> None:
    argv = ["unshare", "--net", "--mount", "--pid", "--fork", "true"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnsupportedMachine(
            f"needs to make namespaces, which `{' '.join(argv)}` could not ({done.stderr.strip()}): "
            "in a container, run it privileged (CAP_SYS_ADMIN)"
        )
