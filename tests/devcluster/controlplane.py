"""Boots etcd, the API server, the controller manager and the scheduler inside a cluster's sandbox."""

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster import audit, network
from devcluster.binaries import Binaries
from devcluster.pki import Authority, Pair
from devcluster.progress import Progress
from devcluster.sandbox import Process, Sandbox
from devcluster.spec import ClusterSpec

ETCD = "http://127.0.0.1:2379"
IN_CLUSTER_SERVER = f"https://{network.CONTROL_PLANE_ADDRESS}:{network.API_PORT}"
SCHEDULER_HEALTH = "https://127.0.0.1:10259/readyz"
READY_SECONDS = 120.0
AUDIT_LOG_MIB = 100_000
SERVING_NAMES = ["localhost", *(f"kubernetes{suffix}" for suffix in ("", ".default", ".default.svc"))]
SERVING_NAMES.append(f"kubernetes.default.svc.{network.CLUSTER_DOMAIN}")


@dataclass(frozen=True)
class Credentials:
    """Certificates and kubeconfigs of the control plane."""

    authority: Authority
    apiserver: Pair
    kubelet_client: Pair
    service_accounts: Pair
    admin: Pair


class Api:
    """Reads as the cluster's administrator, from outside its network."""

    def __init__(self, port: int, certificates: Path) -> None:
        self._base = f"https://127.0.0.1:{port}"
        self._tls = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
        self._tls.load_cert_chain(certificates / "admin.crt", certificates / "admin.key")

    def open(self, path: str, accept: str = "application/json", seconds: float = 5) -> Any:
        """The answer to a GET, to be closed; ``OSError`` where there is none, ``HTTPError`` where it is another than 2xx."""
        request = urllib.request.Request(self._base + path, headers={"Accept": accept})
        return urllib.request.urlopen(request, context=self._tls, timeout=seconds)

    def text(self, path: str) -> str | None:
        """The body of a GET that succeeded, else None."""
        try:
            with self.open(path, "*/*") as answer:
                body: bytes = answer.read()
                return body.decode()
        except (OSError, urllib.error.URLError):
            return None

    def object(self, path: str) -> dict[str, Any] | None:
        """The same, as JSON."""
        body = self.text(path)
        return json.loads(body) if body is not None else None


def credentials(folder: Path) -> Credentials:
    """Make the cluster's certificates."""
    authority = Authority(folder)
    addresses = ["127.0.0.1", network.CONTROL_PLANE_ADDRESS, network.APISERVER_SERVICE]
    return Credentials(
        authority,
        authority.server("apiserver", "kube-apiserver", SERVING_NAMES, addresses),
        authority.client("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
        authority.signing_key("service-accounts"),
        authority.client("admin", "devcluster-admin", "system:masters"),
    )


def etcd_arguments(binaries: Binaries, folder: Path) -> list[str]:
    """A member that never waits for the disk: the cluster is thrown away anyway."""
    return [binaries.path("etcd"), f"-data-dir={folder / 'etcd'}", "-unsafe-no-fsync"]


def apiserver_arguments(binaries: Binaries, folder: Path, spec: ClusterSpec, made: Credentials) -> list[str]:
    """Upstream's defaults but for what a cluster of one machine, thrown away soon, needs otherwise."""
    flags = {
        "etcd-servers": ETCD,
        "bind-address": "0.0.0.0",
        "secure-port": network.API_PORT,
        "advertise-address": network.CONTROL_PLANE_ADDRESS,
        "service-cluster-ip-range": network.SERVICE_CIDR,
        "tls-cert-file": made.apiserver.certificate,
        "tls-private-key-file": made.apiserver.key,
        "client-ca-file": made.authority.certificate_file,
        "kubelet-client-certificate": made.kubelet_client.certificate,
        "kubelet-client-key": made.kubelet_client.key,
        "kubelet-preferred-address-types": "InternalIP",
        "service-account-issuer": f"https://kubernetes.default.svc.{network.CLUSTER_DOMAIN}",
        "service-account-key-file": made.service_accounts.certificate,
        "service-account-signing-key-file": made.service_accounts.key,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "default-not-ready-toleration-seconds": spec.eviction_seconds,
        "default-unreachable-toleration-seconds": spec.eviction_seconds,
        "allow-privileged": "true",
        "profiling": "false",
        "shutdown-delay-duration": "0s",
    }
    if spec.audit:
        flags["audit-policy-file"] = audit.write_policy(folder / "audit-policy.json")
        flags["audit-log-path"] = folder / "audit.log"
        # `audit.events` reads one file: a rotation, which comes at 100 MB by default, would lose what was before
        flags["audit-log-maxsize"] = AUDIT_LOG_MIB
    if spec.runtime_config:
        flags["runtime-config"] = spec.runtime_config
    return [binaries.path("kube-apiserver"), *_flags(flags), *spec.feature_gates_flag]


def controller_manager_arguments(binaries: Binaries, folder: Path, spec: ClusterSpec, made: Credentials) -> list[str]:
    """The default request rate would delay the ``default`` ServiceAccount, and so the first pod, by seconds."""
    kubeconfig = made.authority.kubeconfig(
        folder / "controller-manager.kubeconfig",
        IN_CLUSTER_SERVER,
        made.authority.client("controller-manager", "system:kube-controller-manager"),
    )
    authority = made.authority.pair_of_authority
    flags = {
        "kubeconfig": kubeconfig,
        "leader-elect": "false",
        "use-service-account-credentials": "true",
        "service-account-private-key-file": made.service_accounts.key,
        "root-ca-file": authority.certificate,
        "cluster-signing-cert-file": authority.certificate,
        "cluster-signing-key-file": authority.key,
        "allocate-node-cidrs": "false",
        "kube-api-qps": 500,
        "kube-api-burst": 500,
        "node-monitor-period": "1s",
        "node-monitor-grace-period": f"{spec.node_monitor_grace_seconds}s",
        "profiling": "false",
    }
    return [binaries.path("kube-controller-manager"), *_flags(flags), *spec.feature_gates_flag]


def scheduler_arguments(binaries: Binaries, folder: Path, spec: ClusterSpec, made: Credentials) -> list[str]:
    """The default scheduler, alone."""
    kubeconfig = made.authority.kubeconfig(
        folder / "scheduler.kubeconfig",
        IN_CLUSTER_SERVER,
        made.authority.client("scheduler", "system:kube-scheduler"),
    )
    flags = {
        "kubeconfig": kubeconfig,
        "leader-elect": "false",
        "kube-api-qps": 500,
        "kube-api-burst": 500,
        "profiling": "false",
    }
    return [binaries.path("kube-scheduler"), *_flags(flags), *spec.feature_gates_flag]


def _flags(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


class ControlPlane:
    """The four processes, in the order in which they can be ready."""

    def __init__(
        self, sandbox: Sandbox, binaries: Binaries, folder: Path, spec: ClusterSpec, made: Credentials
    ) -> None:
        self._sandbox, self._binaries, self._folder, self._spec, self._made = sandbox, binaries, folder, spec, made

    def start_api(self) -> tuple[int, Process]:
        """Start etcd and the API server. Returns the machine's port that leads to it, without waiting."""
        self._spawn("etcd", etcd_arguments(self._binaries, self._folder))
        server = self._spawn(
            "kube-apiserver", apiserver_arguments(self._binaries, self._folder, self._spec, self._made)
        )
        target = f"{network.CONTROL_PLANE_ADDRESS}:{network.API_PORT}"
        port, _ = self._sandbox.forward(self._binaries.path("devtool"), target, self._folder / "logs/relay.log")
        return port, server

    def finish(self, api: Api, server: Process, progress: Progress) -> None:
        """Wait for the API server, then start what needs it and wait until the first pod could be made."""
        server.wait_ready(lambda: api.text("/readyz") == "ok", READY_SECONDS)
        progress("kube-apiserver is ready")
        arguments = (self._binaries, self._folder, self._spec, self._made)
        manager = self._spawn("kube-controller-manager", controller_manager_arguments(*arguments))
        scheduler = self._spawn("kube-scheduler", scheduler_arguments(*arguments))
        account = "/api/v1/namespaces/default/serviceaccounts/default"
        manager.wait_ready(lambda: api.text(account) is not None, READY_SECONDS)
        progress("kube-controller-manager is ready")
        scheduler.wait_ready(self._scheduler_ready, READY_SECONDS)
        progress("kube-scheduler is ready")

    def _scheduler_ready(self) -> bool:
        return self._sandbox.call(lambda: _healthy(SCHEDULER_HEALTH))

    def _spawn(self, name: str, argv: list[str]) -> Process:
        return self._sandbox.spawn(name, argv, self._folder / "logs" / f"{name}.log")


def _healthy(url: str) -> bool:
    # A self-signed certificate that the scheduler made for itself.
    context = ssl._create_unverified_context()
    try:
        with urllib.request.urlopen(url, context=context, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
