"""Installs the parts on a running cluster and says how to reach them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devcluster import Cluster
from images import Images, build_images
from objectstore import ObjectStore

ROOT = Path(__file__).resolve().parents[2]
OPERATOR_NAMESPACE = "tunesmith-system"
STORE_NAMESPACE = "storage"
STORE_PORT = 8333
STORE_ENDPOINT = f"http://s3.{STORE_NAMESPACE}.svc:{STORE_PORT}"
"""What manifests say; a Service without selector leads to the store."""
SECRET_NAME = "s3"
BUCKETS = ("models", "data", "checkpoints")

Log = Callable[[str], None]


@dataclass
class Testbed:
    """A cluster with everything installed."""

    __test__ = False  # the name looks like a test to pytest

    cluster: Cluster
    store: ObjectStore
    images: Images
    forwards: dict[str, int] = field(default_factory=dict)

    @classmethod
    def install(
        cls, cluster: Cluster, log: Log, store_folder: Path | None = None, images: Images | None = None
    ) -> Testbed:
        """Install store, images and operator; the image import and the store's start run side by side."""
        images = images or build_images(log)
        with ThreadPoolExecutor(2) as pool:
            importing = pool.submit(_load, cluster, images)
            store = start_store(cluster, store_folder or cluster.folder / "store")
            log("the S3 store is up")
            importing.result()
        log("images are in every node")
        bed = cls(cluster, store, images)
        bed.install_operator()
        log("the operator is ready")
        return bed

    def install_operator(self, *extra: str) -> None:
        """Install or upgrade the chart and wait until the operator is ready."""
        operator, trainer = self.images.operator.reference, self.images.trainer.reference
        self.cluster.helm(
            "upgrade", "--install", "tunesmith", str(ROOT / "charts" / "tunesmith"),
            "--namespace", OPERATOR_NAMESPACE, "--create-namespace",
            "--set-string", f"image.repository={operator.rpartition(':')[0]},image.tag={operator.rpartition(':')[2]}",
            "--set-string", f"trainerImage.repository={trainer.rpartition(':')[0]},trainerImage.tag={trainer.rpartition(':')[2]}",
            "--set", "pollIntervalSeconds=1", *extra,
        )  # fmt: skip
        self.cluster.kubectl(
            "rollout",
            "status",
            "deployment",
            "-n",
            OPERATOR_NAMESPACE,
            "-l",
            "app.kubernetes.io/instance=tunesmith",
            "--timeout=120s",
        )

    def create_namespace(self, name: str) -> None:
        """Make a namespace that enforces the restricted Pod Security Standard and holds the store's Secret."""
        namespace = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        }
        self.apply(namespace)
        self.apply_secret(name)

    def apply_secret(self, namespace: str, name: str = SECRET_NAME, read_only: bool = False) -> None:
        """Put the store's keys into a namespace."""
        credentials = self.store.read_only if read_only else self.store.credentials
        metadata = {"name": name, "namespace": namespace}
        self.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": credentials.environment()}
        )

    def apply(self, *objects: dict[str, Any]) -> None:
        """Apply objects as a user would."""
        document = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.cluster.kubectl("apply", "-f", "-", stdin=json.dumps(document))

    def get(self, kind: str, name: str, namespace: str) -> dict[str, Any]:
        """Return an object; an empty dict where there is none."""
        return self.cluster.get(kind, name, namespace)

    def list(self, kind: str, namespace: str, selector: str = "") -> list[dict[str, Any]]:
        """Return the objects of a kind."""
        return self.cluster.get_all(kind, namespace, selector)

    def wait_until(self, holds: Callable[[], Any], what: str, timeout: float, poll: float = 0.5) -> Any:
        """Poll until something true comes back, and return it.

        Raises:
            TimeoutError: it never did; the message says what was awaited.
        """
        deadline = time.monotonic() + timeout
        while True:
            if value := holds():
                return value
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout:.0f} s: {what}")
            time.sleep(poll)

    def url(self, namespace: str, service: str, port: int = 80) -> str:
        """Return a URL on this machine that leads to a Service."""
        target = f"{self.get('service', service, namespace)['spec']['clusterIP']}:{port}"
        if target not in self.forwards:
            self.forwards[target] = self.cluster.forward(target)
        return f"http://127.0.0.1:{self.forwards[target]}"


def _load(cluster: Cluster, images: Images) -> None:
    for image in dict.fromkeys((images.operator, images.trainer)):
        for archive in image.archives:
            cluster.load_image(archive)


def start_store(cluster: Cluster, folder: Path) -> ObjectStore:
    """Start SeaweedFS in the cluster's network and give it the name that manifests use."""

    def reach(ip: str, port: int) -> str:
        return f"http://127.0.0.1:{cluster.forward(f'{ip}:{port}')}"

    store = ObjectStore.start(
        folder, bind_ip=cluster.host_ip, popen=cluster.run_in_network, s3_port=STORE_PORT, reach=reach
    )
    for bucket in BUCKETS:
        store.ensure_bucket(bucket)
    metadata = {"name": "s3", "namespace": STORE_NAMESPACE}
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": STORE_NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"ports": [{"name": "s3", "port": STORE_PORT, "targetPort": STORE_PORT}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": "s3"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [cluster.host_ip]}],
            "ports": [{"name": "s3", "port": STORE_PORT}],
        },
    ]
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    return store
