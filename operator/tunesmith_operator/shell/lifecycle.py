"""Puts the operator together, starts it, proves that it lives, and stops it."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import kopf
import kubernetes.client
import kubernetes.config

from tunesmith_api import __version__
from tunesmith_operator.adapters.errors import ClusterError
from tunesmith_operator.adapters.events import EventRecorder
from tunesmith_operator.adapters.kube import KubernetesCluster, client_configuration
from tunesmith_operator.adapters.metrics import Metrics
from tunesmith_operator.adapters.progress import ProgressClient
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kinds import KINDS
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.engine.controller import Controller
from tunesmith_operator.engine.pacing import RequestPace
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.recent import RecentWrites
from tunesmith_operator.engine.store import Indexes, Store
from tunesmith_operator.engine.workqueue import WorkQueue
from tunesmith_operator.shell.environment import InvalidEnvironment, config_from
from tunesmith_operator.shell.logs import setup_logging
from tunesmith_operator.shell.watches import WATCHED, configure, indexes_of, register

__all__ = ["main"]

log = logging.getLogger("tunesmith")
STARTUP_SECONDS = 120.0


class Operator:
    """One running operator: the object graph, and what ends with it."""

    def __init__(self, config: Config, configuration: kubernetes.client.Configuration) -> None:
        self.config = config
        self.metrics = Metrics()
        self.cluster = KubernetesCluster(configuration, config.workers, self.metrics.count_request)
        self.queue: WorkQueue[Key] = WorkQueue()
        self.progress = ProgressClient(on_poll=self.metrics.count_poll)
        self.controller: Controller | None = None
        self._started = time.monotonic()
        self._stop_metrics: Callable[[], None] = lambda: None

    async def wait_for_kinds(self) -> None:
        """Return once the API server serves every kind."""
        while True:
            try:
                resources = [kind.resource for kind in KINDS]
                missing = [it.plural for it in resources if not await self.cluster.serves(it)]
            except ClusterError as error:
                log.warning("%s; trying again", error)
            else:
                if not missing:
                    return
                log.warning("the cluster doesn't know %s: install the CRDs (crds/ or the chart)", ", ".join(missing))
            await asyncio.sleep(3.0)

    def start(self, indexes: Indexes) -> None:
        """Start to work on what the watches deliver."""
        now = functools.partial(datetime.now, UTC)
        poller = Poller(self.progress.fetch, now, self.config.poll_interval_seconds)
        self.controller = Controller(
            store=Store(indexes, RecentWrites(time.monotonic), poller.sample),
            cluster=self.cluster,
            recorder=EventRecorder(self.cluster, socket.gethostname()),
            queue=self.queue,
            pace=RequestPace(self.config.qps, self.config.burst, self.metrics.token_seconds.observe),
            poller=poller,
            metrics=self.metrics,
            config=self.config,
            now=now,
        )
        self.controller.start()
        self.metrics.watch(lambda: len(self.queue), lambda: len(poller))
        if self.config.metrics_port:
            self._stop_metrics = self.metrics.serve(self.config.metrics_port)

    def check(self) -> dict[str, Any]:
        """Prove that the queue is worked on and every watch is alive.

        Raises:
            Exception: it isn't; the kubelet then restarts the pod.
        """
        if self.controller is None:
            return {"starting": True}
        self.controller.check()
        watches = sum(task.get_name().startswith("watcher for ") and not task.done() for task in asyncio.all_tasks())
        wanted = len(WATCHED) * max(1, len(self.config.namespaces))
        if watches < wanted and time.monotonic() - self._started > STARTUP_SECONDS:
            raise RuntimeError(f"{watches} of {wanted} watches are alive")
        return {"watches": watches, "queue": len(self.queue)}

    async def stop(self) -> None:
        """Finish what is under way and let go of everything."""
        if self.controller is not None:
            await self.controller.stop()
        await self.progress.close()
        self.cluster.close()
        self._stop_metrics()


def _login(configuration: kubernetes.client.Configuration) -> kopf.ConnectionInfo:
    header = configuration.get_api_key_with_prefix("BearerToken") or ""
    scheme, _, token = header.rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        username=configuration.username or None,
        password=configuration.password or None,
        scheme=scheme or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
    )


def _wire(operator: Operator) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()
    register(registry, operator.queue)

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return _login(client_configuration())

    @kopf.on.startup(registry=registry)
    async def startup(settings: kopf.OperatorSettings, **found: Any) -> None:
        configure(settings)
        await operator.wait_for_kinds()
        operator.start(indexes_of(found))

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await operator.stop()

    @kopf.on.probe(id="operator", errors=kopf.ErrorsMode.PERMANENT, registry=registry)
    async def probe(**_: Any) -> dict[str, Any]:
        return operator.check()

    return registry


async def _run(config: Config, configuration: kubernetes.client.Configuration) -> None:
    operator = Operator(config, configuration)
    await kopf.operator(
        registry=_wire(operator),
        standalone=True,
        clusterwide=not config.namespaces,
        namespaces=config.namespaces,
        liveness_endpoint=f"http://0.0.0.0:{config.health_port}/healthz",
    )


def main() -> int:
    """Run until SIGTERM; return the exit code."""
    try:
        config = config_from(os.environ)
        setup_logging(config.log_level, config.log_format)
        configuration = client_configuration()
    except InvalidEnvironment as error:
        sys.stderr.write(f"tunesmith-operator: {error}\n")
        return 2
    except kubernetes.config.ConfigException as error:
        sys.stderr.write(f"tunesmith-operator: no cluster to log in to: {error}. Set KUBECONFIG, or run it in a pod.\n")
        return 2
    log.info("Tunesmith %s watches %s", __version__, ", ".join(config.namespaces) or "all namespaces")
    asyncio.run(_run(config, configuration))
    log.info("stopped")
    return 0
