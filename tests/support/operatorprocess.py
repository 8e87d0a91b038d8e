"""The operator as a process of its own, against a test's cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from devcluster import Cluster

AGENTS = ("tunesmith-operator/", "kopf/")
WRITES = ("create", "update", "patch", "delete", "deletecollection")


def free_port() -> int:
    """A TCP port that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class OperatorProcess:
    """`python -m tunesmith_operator` with a kubeconfig."""

    def __init__(self, cluster: Cluster, log: Path, **environment: str) -> None:
        self._cluster, self._log, self._environment = cluster, log, environment
        self.health_port = free_port()
        self.start()

    def start(self) -> None:
        """Start it and wait until it is at work."""
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {
            "PYTHONPATH": f"{root / 'crds'}:{root / 'operator'}",
            "KUBECONFIG": str(self._cluster.kubeconfig),
            "TUNESMITH_TRAINER_IMAGE": "localhost/trainer:test",
            "TUNESMITH_LOG_FORMAT": "text",
            "TUNESMITH_HEALTH_PORT": str(self.health_port),
            "TUNESMITH_METRICS_PORT": "0",
            "TUNESMITH_POLL_INTERVAL_SECONDS": "2",
            "TUNESMITH_RETIRE_DELAY_SECONDS": "2",
            **self._environment,
        }
        with self._log.open("a") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith_operator"], env=environment, stdout=sink, stderr=sink
            )
        deadline = time.monotonic() + 30
        while not self.health().startswith("{"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the operator doesn't start:\n{self.log()}")
            time.sleep(0.1)

    def health(self) -> str:
        """What /healthz answers, or the error."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.health_port}/healthz", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError as error:
            return str(error)

    def log(self) -> str:
        """The end of its log."""
        return self._log.read_text()[-8000:]

    def kill(self) -> None:
        """SIGKILL: no chance to clean up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def writes(self, since: object = None, namespace: str | None = None) -> list[str]:
        """Its writes, as the API server's audit log has them: verb, resource and name."""
        found = []
        for event in self._cluster.audit_events(since):
            target = event.get("objectRef", {})
            if (
                event["verb"] in WRITES
                and event.get("userAgent", "").startswith(AGENTS)
                and namespace in (None, target.get("namespace"))
            ):
                parts = [
                    event["verb"],
                    target.get("resource", ""),
                    target.get("subresource", ""),
                    target.get("name", ""),
                ]
                found.append(" ".join(part for part in parts if part))
        return found
