"""Environment → Config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from tunesmith_operator.core.config import Config

__all__ = ["InvalidEnvironment", "config_from"]

T = TypeVar("T")
_POLICIES = ("Always", "IfNotPresent", "Never")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_FORMATS = ("json", "text")


class InvalidEnvironment(Exception):
    """A variable is missing or makes no sense; the text says which and what is wanted."""


def config_from(environ: Mapping[str, str]) -> Config:
    """Read the settings.

    Raises:
        InvalidEnvironment: a variable is missing or invalid.
    """

    def text(name: str, default: str) -> str:
        return environ.get(f"TUNESMITH_{name}", "").strip() or default

    def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = text(name, default)
        if value not in allowed:
            raise InvalidEnvironment(f"TUNESMITH_{name} is {value!r}: use one of {', '.join(allowed)}")
        return value

    def number(name: str, default: T, kind: Callable[[str], T], least: float) -> T:
        value = text(name, str(default))
        try:
            parsed = kind(value)
        except ValueError:
            raise InvalidEnvironment(f"TUNESMITH_{name} is {value!r}: a number is wanted") from None
        if parsed < least:  # type: ignore[operator]
            raise InvalidEnvironment(f"TUNESMITH_{name} is {value}: at least {least:g} is wanted")
        return parsed

    trainer_image = text("TRAINER_IMAGE", "")
    if not trainer_image:
        raise InvalidEnvironment("TUNESMITH_TRAINER_IMAGE is not set: name the image that training pods run")
    operator_namespace, lease_name = text("OPERATOR_NAMESPACE", ""), text("LEASE_NAME", "")
    if lease_name and not operator_namespace:
        raise InvalidEnvironment("TUNESMITH_LEASE_NAME needs TUNESMITH_OPERATOR_NAMESPACE: where the Lease is")
    return Config(
        trainer_image=trainer_image,
        server_image=text("SERVER_IMAGE", trainer_image),
        vllm_image=text("VLLM_IMAGE", ""),
        vllm_gpu_image=text("VLLM_GPU_IMAGE", ""),
        activator_image=text("ACTIVATOR_IMAGE", ""),
        image_pull_policy=choice("IMAGE_PULL_POLICY", "IfNotPresent", _POLICIES),
        namespaces=tuple(name for part in text("NAMESPACES", "").split(",") if (name := part.strip())),
        operator_namespace=operator_namespace,
        lease_name=lease_name,
        poll_interval_seconds=number("POLL_INTERVAL_SECONDS", 3.0, float, 0.1),
        workers=number("WORKERS", 16, int, 1),
        qps=number("QPS", 20.0, float, 0.1),
        burst=number("BURST", 40, int, 1),
        heartbeat_stale_seconds=number("HEARTBEAT_STALE_SECONDS", 120.0, float, 1.0),
        retire_delay_seconds=number("RETIRE_DELAY_SECONDS", 10.0, float, 0.0),
        health_port=number("HEALTH_PORT", 8080, int, 1),
        metrics_port=number("METRICS_PORT", 9090, int, 0),
        log_level=choice("LOG_LEVEL", "INFO", _LEVELS),
        log_format=choice("LOG_FORMAT", "json", _FORMATS),
    )
