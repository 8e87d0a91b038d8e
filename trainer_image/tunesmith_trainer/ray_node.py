"""One pod's Ray node: how it is started, whether it is up, and what else its processes need. Used by `supervisor`.

The flags and variables are about starting fast on few cores: `ray start` alone costs seconds of CPU for things that a
training pod has no use for.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.environment import PodEnvironment
from tunesmith_trainer.processes import Children

__all__ = ["RayNode", "child_environment"]

OBJECT_STORE_BYTES = 80_000_000  # Ray's least; nothing big goes through it
SIOCGIFADDR = 0x8915


def child_environment(pod: PodEnvironment) -> dict[str, str]:
    """Return the environment of Ray, the driver and the training processes of this pod."""
    scratch = str(pod.scratch)
    threads = str(pod.threads)
    variables = {
        "HOME": scratch,
        "TMPDIR": scratch,
        "RAY_TMPDIR": f"{scratch}/ray",
        "HF_HOME": f"{scratch}/hf",
        # everything comes from the object store
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        "RAY_AUTH_MODE": "token" if pod.token else "disabled",
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        # training processes run at nice +15 otherwise
        "RAY_worker_niceness": "0",
        # each of these is one more Python process that imports everything
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # Ray would kill a training process at 95 % of the pod's memory and then retry it for ever
        "RAY_memory_monitor_refresh_ms": "0",
        # a lost pod is noticed after about 10 s instead of 30
        "RAY_health_check_period_ms": "2000",
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "5",
    }
    if interface := _interface_of(pod.ip):
        variables["GLOO_SOCKET_IFNAME"] = interface
        variables["NCCL_SOCKET_IFNAME"] = f"={interface}"
    return {**os.environ, **variables}


def _interface_of(ip: str) -> str | None:
    """Return the network interface that holds an address: gloo would otherwise trust the hostname's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    return None


@dataclass
class RayNode:
    """Ray's processes in this pod. Start once; to restart, kill all children and make a new one."""

    pod: PodEnvironment
    plan: TrainingPlan
    children: Children
    address: str
    """Of the head's GCS, "ip:port"."""
    _starter: int | None = None
    _watched: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Begin to start; `is_up` says when that is done."""
        self._starter = self.children.spawn(
            self._command(), child_environment(self.pod), self.pod.scratch / "ray-start.log"
        )

    def _command(self) -> list[str]:
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start"),
            f"--node-ip-address={self.pod.ip}",
            *self._ports(),
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            # one CPU slot for each training process, whatever the number of cores
            f"--num-cpus={self.pod.processes}",
            f"--num-gpus={self.plan.gpus_per_worker * self.pod.processes}",
            "--disable-usage-stats",
            "--include-log-monitor=false",
        ]
        if self.pod.is_head:
            port = self.address.rpartition(":")[2]
            unused = ("--include-dashboard=false", "--no-monitor")
            return [*command, "--head", f"--port={port}", *unused]
        return [*command, f"--address={self.address}"]

    def _ports(self) -> list[str]:
        if self.pod.ray_port:
            return ["--min-worker-port=0", "--max-worker-port=0"]
        return [
            f"--node-manager-port={keys.PORT_RAY_NODE_MANAGER}",
            f"--object-manager-port={keys.PORT_RAY_OBJECT_MANAGER}",
            f"--runtime-env-agent-port={keys.PORT_RAY_RUNTIME_ENV_AGENT}",
            f"--dashboard-agent-grpc-port={keys.PORT_RAY_DASHBOARD_AGENT}",
            f"--metrics-export-port={keys.PORT_RAY_METRICS_EXPORT}",
            f"--min-worker-port={keys.PORT_RAY_WORKER_MIN}",
            f"--max-worker-port={keys.PORT_RAY_WORKER_MAX}",
        ]

    def is_up(self) -> bool:
        """Whether Ray has started here. Remembers its processes, so that `is_lost` can watch them."""
        if self._watched:
            return True
        if self._starter is None or self.children.exit_code(self._starter) != 0:
            return False
        names = ("gcs_server", "raylet") if self.pod.is_head else ("raylet",)
        found = [self.children.named(name) for name in names]
        self._watched = [pid for pid in found if pid is not None]
        return bool(self._watched)

    def is_lost(self) -> bool:
        """Whether starting failed or one of Ray's processes has ended."""
        if self._watched:
            return not all(self.children.is_alive(pid) for pid in self._watched)
        return self._starter is not None and self.children.exit_code(self._starter) not in (None, 0)

    def log_tail(self) -> str:
        """Return the end of what `ray start` said."""
        log = Path(self.pod.scratch / "ray-start.log")
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:]) if log.exists() else ""
