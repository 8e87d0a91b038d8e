"""The network of one cluster, all of it inside its own namespace, and so the same addresses in every cluster.

Nodes share the namespace and have an address each on one virtual link; pods of all nodes hang on one bridge. There is
no route out: a pod reaches other pods, Services and ``HOST_ADDRESS``, where a test's own servers can listen.
"""

import json
from pathlib import Path

from devcluster.sandbox import Sandbox

CONTROL_PLANE_ADDRESS = "10.200.0.1"
HOST_ADDRESS = "10.200.0.250"
NODE_ADDRESSES = "10.200.0.{}"
FIRST_NODE = 11
SERVICE_CIDR = "10.96.0.0/16"
APISERVER_SERVICE = "10.96.0.1"
POD_CIDR = "10.244.0.0/16"
API_PORT = 6443
CLUSTER_DOMAIN = "cluster.local"
LINK = "node0"

# Only what the API server, the kubelets and the pods use; IPv6 is left alone.
FORWARDING = "echo 1 > /proc/sys/net/ipv4/ip_forward"
BRIDGED = "[ ! -e {0} ] || echo 1 > {0}".format("/proc/sys/net/bridge/bridge-nf-call-iptables")


def node_address(number: int) -> str:
    """Address of node 1, 2, …"""
    return NODE_ADDRESSES.format(FIRST_NODE + number - 1)


def set_up(sandbox: Sandbox, nodes: int) -> None:
    """Links, addresses and forwarding of a new namespace."""
    addresses = [CONTROL_PLANE_ADDRESS, HOST_ADDRESS, *(node_address(number) for number in range(1, nodes + 1))]
    commands = [
        "link set lo up",
        f"link add {LINK} type veth peer name {LINK}-peer",
        f"link set {LINK}-peer up",
        f"link set {LINK} up",
        *(f"addr add {address}/24 dev {LINK}" for address in addresses),
        f"route add {SERVICE_CIDR} dev {LINK}",
    ]
    sandbox.run(["ip", "-batch", "-"], stdin="\n".join(commands) + "\n")
    sandbox.run(["sh", "-c", f"{FORWARDING}; {BRIDGED}"])


def write_cni(folder: Path) -> Path:
    """The CNI configuration that all nodes share; addresses are leased in the same folder. Returns its folder."""
    configuration = folder / "net.d"
    configuration.mkdir(parents=True)
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(folder / "leases"),
            "ranges": [[{"subnet": POD_CIDR}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    conflist = {"cniVersion": "1.0.0", "name": "devcluster", "plugins": plugins}
    (configuration / "10-bridge.conflist").write_text(json.dumps(conflist, indent=1) + "\n")
    return configuration
