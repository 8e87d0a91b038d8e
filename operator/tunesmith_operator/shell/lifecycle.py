"""Puts the operator together, starts it, proves that it lives, and stops it.

Kopf runs the process: startup and cleanup, signals, the liveness endpoint, credentials. What happens in the cluster
comes from informers of our own (ADR 0015).
"""

from __future__ import annotations

import asyncio
import copy
import gc
import itertools
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable
from typing import Any

import kopf
import kubernetes.client
import kubernetes.config

from tunesmith_api import __version__
from tunesmith_operator.adapters.events import EventRecorder
from tunesmith_operator.adapters.kube import KubernetesCluster, client_configuration
from tunesmith_operator.adapters.lease import KubernetesLease
from tunesmith_operator.adapters.metrics import Metrics
from tunesmith_operator.adapters.progress import ProgressClient
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.engine.clock import SteadyClock
from tunesmith_operator.engine.controller import Controller, Stuck
from tunesmith_operator.engine.informer import SILENT_SECONDS
from tunesmith_operator.engine.leadership import Leadership, LeadershipLost
from tunesmith_operator.engine.pacing import RequestPace
from tunesmith_operator.engine.poller import Poller
from tunesmith_operator.engine.store import Store
from tunesmith_operator.engine.workqueue import WorkQueue
from tunesmith_operator.shell.environment import InvalidEnvironment, config_from
from tunesmith_operator.shell.logs import setup_logging
from tunesmith_operator.shell.watches import informers_of, scopes_of, source_of

__all__ = ["main"]

log = logging.getLogger("tunesmith")
LEASE_TIMEOUT = (2.0, 4.0)
"""Seconds to connect and to wait for an answer: a renewal is tried more than once before the Lease is given up."""


class Operator:
    """One running operator: the object graph, and what ends with it."""

    def __init__(self, config: Config, configuration: kubernetes.client.Configuration) -> None:
        self.config = config
        self.metrics = Metrics()
        self.leadership = self._claim(configuration)
        may_write = self.leadership.holds if self.leadership is not None else lambda: True
        self.cluster = KubernetesCluster(configuration, config.workers, self.metrics.count_request, allowed=may_write)
        self.source = source_of(configuration, self.metrics.count_request)
        self.queue: WorkQueue[Key] = WorkQueue()
        self.progress = ProgressClient(on_poll=self.metrics.count_poll)
        now = SteadyClock().now
        self.poller = Poller(self.progress.fetch, now, config.poll_interval_seconds, figures=self.progress.figures)
        self.store = Store(self.poller.sample, self.queue.add, scopes_of(config))
        self.controller = Controller(
            store=self.store,
            cluster=self.cluster,
            recorder=EventRecorder(self.cluster, socket.gethostname()),
            queue=self.queue,
            pace=RequestPace(config.qps, config.burst, self.metrics.token_seconds.observe, max(1, config.workers // 4)),
            poller=self.poller,
            metrics=self.metrics,
            config=config,
            now=now,
        )
        self.informers = informers_of(config, self.source, self.store)
        self.failed = False
        self._watching: list[asyncio.Task[None]] = []
        self._leading: asyncio.Task[None] | None = None
        self._stop_metrics: Callable[[], None] = lambda: None

    def _claim(self, configuration: kubernetes.client.Configuration) -> Leadership | None:
        if not self.config.lease_name:
            return None
        # connections of its own: however busy the others are, the Lease is renewed
        self._lease_cluster = KubernetesCluster(copy.copy(configuration), 1, timeout=LEASE_TIMEOUT)
        lease = KubernetesLease(self._lease_cluster, self.config.operator_namespace, self.config.lease_name)
        return Leadership(lease, f"{socket.gethostname()}_{secrets.token_hex(4)}")

    def start(self, end: Callable[[], None]) -> None:
        """Begin to lead, or to stand by. `end` is called where this process has to end."""
        self.metrics.watch(
            lambda: len(self.queue),
            lambda: len(self.poller),
            lambda: self.store.lost_watches() if self._watching else 0,
            lambda: bool(self._watching),
        )
        if self.config.metrics_port:
            self._stop_metrics = self.metrics.serve(self.config.metrics_port)
        self._leading = asyncio.create_task(self._lead(end), name="leadership")

    async def _lead(self, end: Callable[[], None]) -> None:
        """Watch, and work on what the watches deliver, as long as no other operator may."""
        try:
            if self.leadership is not None:
                await self.leadership.acquire()
            self._watching = [asyncio.create_task(it.run(), name=f"informer of {it}") for it in self.informers]
            self.controller.start()
            if self.leadership is not None:
                await self.leadership.keep()
        except LeadershipLost as error:
            log.error("no longer leading: %s; ending, to stand by anew", error)
            self.failed = True
            end()

    def check(self) -> dict[str, Any]:
        """Prove that the queue is worked on and that every informer listens, or asks for what it can't hear.

        Raises:
            Stuck: it isn't so; the kubelet then restarts the pod. An API server that is away is no reason.
        """
        if self._leading is not None and self._leading.done() and self.leadership is not None:
            raise Stuck("leadership has ended")
        if not self._watching:
            return {"standby": True}
        self.controller.check()
        for informer, task in zip(self.informers, self._watching, strict=True):
            if task.done():
                raise Stuck(f"the informer of {informer} has ended")
            if informer.silent_for() > SILENT_SECONDS:
                raise Stuck(f"the informer of {informer} has been silent for {informer.silent_for():.0f} s")
        return {"watches": len(self.informers), "lost": self.store.lost_watches(), "queue": len(self.queue)}

    async def stop(self) -> None:
        """Finish what is under way, let go of everything, and let another operator take over at once."""
        await self.controller.stop()
        tasks = [*self._watching, *([self._leading] if self._leading is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.leadership is not None:
            await self.leadership.release()
            self._lease_cluster.close()
        await self.progress.close()
        await self.source.close()
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


def _wire(operator: Operator, stop: asyncio.Event) -> kopf.OperatorRegistry:
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return _login(client_configuration())

    @kopf.on.startup(registry=registry)
    async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
        # kopf itself watches, posts and scans nothing; its one look at the API server's kinds may take its time
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.peering.standalone = True
        settings.networking.error_backoffs = itertools.repeat(10.0)
        settings.process.ultimate_exiting_timeout = 25
        operator.start(stop.set)

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await operator.stop()

    @kopf.on.probe(id="operator", errors=kopf.ErrorsMode.PERMANENT, registry=registry)
    async def probe(**_: Any) -> dict[str, Any]:
        return operator.check()

    return registry


async def _run(config: Config, configuration: kubernetes.client.Configuration) -> bool:
    """Run until SIGTERM or until leadership is lost; whether it ended well."""
    operator, stop = Operator(config, configuration), asyncio.Event()
    await kopf.operator(
        registry=_wire(operator, stop),
        standalone=True,
        clusterwide=True,
        liveness_endpoint=f"http://0.0.0.0:{config.health_port}/healthz",
        stop_flag=stop,
    )
    return not operator.failed


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
    # what is listed at a start stays: to look through it again and again for garbage made a start with twice as many
    # objects cost 2.3 times as much
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    log.info("Tunesmith %s watches %s", __version__, ", ".join(config.namespaces) or "all namespaces")
    ended_well = asyncio.run(_run(config, configuration))
    log.info("stopped")
    return 0 if ended_well else 1
