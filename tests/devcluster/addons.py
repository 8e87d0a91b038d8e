"""What every cluster with nodes runs beside Kubernetes' core: kube-proxy for Services, and DNS for their names."""

import json
import urllib.request
from pathlib import Path

from devcluster import network
from devcluster.binaries import Binaries
from devcluster.controlplane import IN_CLUSTER_SERVER
from devcluster.pki import Authority
from devcluster.sandbox import Process, Sandbox

READY_SECONDS = 60.0
PROXY_HEALTH = "http://127.0.0.1:10256/healthz"
DNS_READY_PORT = 8181


def start_proxy(sandbox: Sandbox, binaries: Binaries, folder: Path, authority: Authority) -> Process:
    """One kube-proxy for all nodes, which share a network namespace."""
    client = authority.client("proxy", "system:kube-proxy")
    kubeconfig = authority.kubeconfig(folder / "proxy.kubeconfig", IN_CLUSTER_SERVER, client)
    configuration = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        # A pod that meets itself behind a Service needs its address translated; for that the proxy knows the pods of
        # its own node only, and here it serves all of them.
        "nftables": {"masqueradeAll": True, "minSyncPeriod": "100ms"},
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "clusterCIDR": network.POD_CIDR,
        "hostnameOverride": "node1",
        "oomScoreAdj": 0,
        # The connection table's size is the machine's, not ours.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }
    path = folder / "proxy.json"
    path.write_text(json.dumps(configuration, indent=1) + "\n")
    argv = [binaries.path("kube-proxy"), f"--config={path}"]
    return sandbox.spawn("kube-proxy", argv, folder / "logs/kube-proxy.log")


def start_dns(sandbox: Sandbox, binaries: Binaries, folder: Path) -> Process:
    """The DNS server that the kubelets write into every pod's resolver configuration."""
    argv = [
        binaries.path("cluster-dns"),
        f"-kubeconfig={folder / 'dns.kubeconfig'}",
        f"-listen={network.CONTROL_PLANE_ADDRESS}:53",
        f"-ready={network.CONTROL_PLANE_ADDRESS}:{DNS_READY_PORT}",
        f"-zone={network.CLUSTER_DOMAIN}.",
    ]
    return sandbox.spawn("cluster-dns", argv, folder / "logs/cluster-dns.log")


def wait_ready(sandbox: Sandbox, proxy: Process, dns: Process) -> None:
    """Wait until Services and names work."""
    dns_ready = f"http://{network.CONTROL_PLANE_ADDRESS}:{DNS_READY_PORT}/ready"
    proxy.wait_ready(lambda: sandbox.call(lambda: _answers(PROXY_HEALTH)), READY_SECONDS)
    dns.wait_ready(lambda: sandbox.call(lambda: _answers(dns_ready)), READY_SECONDS)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
