"""The operator's settings, as the core and the engine see them. The shell reads them from the environment."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Config"]


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of one operator process."""

    trainer_image: str
    server_image: str
    vllm_image: str = ""
    """Image of the engine VLLM on CPU, and on GPU; empty where the operator was installed without."""
    vllm_gpu_image: str = ""
    activator_image: str = ""
    """Empty: the server's, which has it too."""
    image_pull_policy: str = "IfNotPresent"
    namespaces: tuple[str, ...] = ()
    operator_namespace: str = ""
    lease_name: str = ""
    """Lease in the operator's namespace that replicas agree by; empty where there is only ever one."""
    poll_interval_seconds: float = 3.0
    workers: int = 16
    qps: float = 20.0
    burst: int = 40
    heartbeat_stale_seconds: float = 120.0
    retire_delay_seconds: float = 10.0
    health_port: int = 8080
    metrics_port: int = 9090
    log_level: str = "INFO"
    log_format: str = "json"
