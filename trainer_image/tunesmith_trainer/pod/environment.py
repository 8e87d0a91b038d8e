"""What a pod tells its processes by environment. Read once by every process of the trainer; standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.plan import TrainingPlan

__all__ = ["PodEnvironment"]


@dataclass(frozen=True)
class PodEnvironment:
    """One trainer pod, as seen from within."""

    index: int
    ip: str
    token: str
    scratch: Path
    plan_path: Path
    termination_log: Path
    cpu_millicores: int
    processes: int = 1
    """Training processes in this pod."""
    progress_port: int = keys.PORT_PROGRESS
    gcs_port: int = keys.PORT_RAY_GCS
    """Where Ray's head listens, if this is its pod."""

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> PodEnvironment:
        """Read the variables that the operator sets.

        Raises:
            KeyError: POD_IP or JOB_COMPLETION_INDEX is missing.
        """
        return cls(
            index=int(environ[keys.ENV_WORKER_INDEX]),
            ip=environ[keys.ENV_POD_IP],
            token=environ.get(keys.ENV_RAY_TOKEN, ""),
            scratch=Path(environ.get(keys.ENV_SCRATCH, keys.SCRATCH_DIRECTORY)),
            plan_path=Path(environ.get(keys.ENV_PLAN, f"{keys.PLAN_DIRECTORY}/{keys.PLAN_FILE}")),
            termination_log=Path(environ.get(keys.ENV_TERMINATION_LOG, keys.TERMINATION_LOG)),
            cpu_millicores=int(environ.get(keys.ENV_CPU_LIMIT) or 0),
            processes=int(environ.get(keys.ENV_PROCESSES) or 1),
            progress_port=int(environ.get(keys.ENV_PROGRESS_PORT) or keys.PORT_PROGRESS),
            gcs_port=int(environ.get(keys.ENV_RAY_PORT) or keys.PORT_RAY_GCS),
        )

    @property
    def is_head(self) -> bool:
        """Whether this pod runs Ray's head and the driver."""
        return self.index == 0

    @property
    def listen_ip(self) -> str:
        """Where progress is served: to all of the pod's network, but on a machine's own loopback to nobody else."""
        return self.ip if self.ip.startswith("127.") else ""

    def plan(self) -> TrainingPlan:
        """Read the mounted plan.

        Raises:
            OSError: it can't be read.
            pydantic.ValidationError: it is of another version of Tunesmith.
        """
        return TrainingPlan.from_json(self.plan_path.read_bytes())

    # Files in scratch by which the processes of one pod talk to each other.
    @property
    def stop_file(self) -> Path:
        """Exists once the pod has got SIGTERM."""
        return self.scratch / "stop"

    @property
    def ray_file(self) -> Path:
        """Holds Ray's address while Ray is up on this pod."""
        return self.scratch / "ray-address"

    @property
    def ranks_folder(self) -> Path:
        """One file per live training process of this pod, named by its pid."""
        return self.scratch / "ranks"

    @property
    def result_file(self) -> Path:
        """The driver's TerminationReport."""
        return self.scratch / "result.json"

    @property
    def retry_file(self) -> Path:
        """The TerminationReport of a driver that asks for another try: what it lacked."""
        return self.scratch / "retry.json"

    @property
    def interrupted_file(self) -> Path:
        """The CheckpointRef that was saved on SIGTERM; empty where there was nothing to save."""
        return self.scratch / "interrupted.json"

    @property
    def micro_batch_file(self) -> Path:
        """The micro-batch size that is small enough for this pod, where the plan's has turned out not to be."""
        return self.scratch / "micro-batch"

    def training_socket(self, number: int) -> Path:
        """Where training process `number` of this pod waits for its assignment."""
        return self.scratch / f"training-{number}.socket"

    def training_log(self, number: int) -> Path:
        """What that process prints."""
        return self.scratch / f"training-{number}.log"

    @property
    def threads(self) -> int:
        """Compute threads for one training process: its share of the CPU limit in whole cores, at least 1."""
        cores = self.cpu_millicores // 1000 if self.cpu_millicores else (os.cpu_count() or 1)
        return max(1, cores // self.processes)

    def name_of(self, rank: int) -> str:
        """Return what to call a rank that trains here: Ray Train numbers ranks, and the log is its pod's."""
        return f"rank {rank} (worker {self.index})"
