"""One pod's Ray node: how it is started, whether it is up, and what else its processes need. Used by `supervisor`.

The variables are about starting fast on few cores, and about noticing losses soon.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.pod.environment import PodEnvironment
from tunesmith_trainer.pod.processes import Children
from tunesmith_trainer.pod.ray_start import NodeSettings

__all__ = ["RayNode", "child_environment", "own_gpu"]

OBJECT_STORE_BYTES = 80_000_000  # Ray's least; nothing big goes through it
SIOCGIFADDR = 0x8915
# what Ray Train's worker imports, and our end of it
PRELOADED = ("ray.train.v2._internal.execution.worker_group.worker", "tunesmith_trainer.group.handover")


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
        "RAY_prestart_worker_first_driver": "0",
        # one Ray process per CPU slot starts with Ray, imports what it will need, and is kept until Ray Train wants it
        "RAY_enable_worker_prestart": "1",
        "RAY_preload_python_modules": ",".join(PRELOADED),
        "RAY_idle_worker_killing_time_threshold_ms": "86400000",
        # nobody collects them
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        # what Ray does all the time it does on the cores that train: a question to each worker costs 4 ms of CPU
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_raylet_report_resources_period_milliseconds": "500",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # Ray would kill a training process at 95 % of the pod's memory and then retry it for ever
        "RAY_memory_monitor_refresh_ms": "0",
        # a pod that is gone is noticed after about 5 s, one that doesn't answer after about 30
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "5000",
        "RAY_health_check_failure_threshold": "5",
    }
    if pod.ip.startswith("127."):
        # Ray takes any loopback address for the machine's own, unless it is told to stay on this machine
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if interface := _interface_of(pod.ip):
        variables["GLOO_SOCKET_IFNAME"] = interface
        variables["NCCL_SOCKET_IFNAME"] = f"={interface}"
    return {**os.environ, **variables}


def own_gpu(number: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that leaves training process `number` the one GPU that is its own.

    Before it starts: CUDA reads it once, and an import may be enough for that.
    """
    name = "CUDA_VISIBLE_DEVICES"
    visible = environment[name].split(",") if environment.get(name) else None
    return {name: visible[number].strip() if visible else str(number)}


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


class RayNode:
    """Ray's processes in this pod. Made and started once; to restart, kill all children and make a new one."""

    def __init__(self, pod: PodEnvironment, plan: TrainingPlan, children: Children) -> None:
        """Begin to import Ray: that needs no head, and takes longer than what comes after it."""
        self.pod, self.children = pod, children
        self.address = ""
        """Of the head's GCS, "ip:port"; empty until it is known."""
        self._watched: list[int] = []
        settings = NodeSettings(
            ip=pod.ip,
            gcs_port=pod.gcs_port if pod.is_head else 0,
            # one CPU slot for each training process, whatever the number of cores
            cpus=pod.processes,
            gpus=pod.processes if plan.gpus_per_worker else 0,
            object_store_bytes=OBJECT_STORE_BYTES,
        )
        read, self._address_pipe = os.pipe()
        self._starter = children.spawn(
            [sys.executable, "-m", "tunesmith_trainer.pod.ray_start", settings.to_json()],
            child_environment(pod),
            pod.scratch / "ray-start.log",
            read,
        )
        os.close(read)

    def start(self, address: str) -> None:
        """Begin to start, as the head at this address or joining it there; `is_up` says when that is done."""
        self.address = address
        with contextlib.suppress(BrokenPipeError):  # it has ended: `is_lost` says so
            os.write(self._address_pipe, f"{address}\n".encode())
        os.close(self._address_pipe)

    def is_up(self) -> bool:
        """Whether Ray has started here. Remembers its processes, so that `is_lost` can watch them."""
        if self._watched:
            return True
        if not self.address or self.children.exit_code(self._starter) != 0:
            return False
        names = ("gcs_server", "raylet") if self.pod.is_head else ("raylet",)
        found = [self.children.named(name) for name in names]
        self._watched = [pid for pid in found if pid is not None]
        return bool(self._watched)

    def is_lost(self) -> bool:
        """Whether starting failed or one of Ray's processes has ended."""
        if self._watched:
            return not all(self.children.is_alive(pid) for pid in self._watched)
        return self.children.exit_code(self._starter) not in (None, 0)

    def log_tail(self) -> str:
        """Return the end of what starting Ray said."""
        log = Path(self.pod.scratch / "ray-start.log")
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:]) if log.exists() else ""
