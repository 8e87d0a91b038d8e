"""A real Kubernetes cluster on one Linux machine, without Docker, for this project's tests and its demo.

One small Go module (``hyper/``) links Kubernetes, etcd, containerd, helm and a DNS server; this package builds it once
per machine, boots the control plane alone or with N real nodes in seconds, and removes it without a trace.

A cluster is one process tree in PID, mount and network namespaces of its own (``sandbox.py``), and a node is such a
tree inside it. Whatever kills the first process of the tree, the kernel then ends the rest and takes their mounts and
network with them; nothing of the machine's own network is touched and any number of clusters run side by side.

The runtime is containerd 2.x built from the same module: it is what users run (Debian 12 ships 1.6), and beside
Kubernetes, with which it shares most of its dependencies, it costs the build about a minute. runc and the CNI plugins
come from the distribution.
"""

from devcluster.cluster import Cluster
from devcluster.errors import ClusterFailed, CommandFailed, UnsupportedMachine
from devcluster.spec import ClusterSpec

__all__ = ["Cluster", "ClusterFailed", "ClusterSpec", "CommandFailed", "UnsupportedMachine"]
