"""How many server pods a ModelDeployment has by itself: `spec.autoscaling`, and what came of it."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from tunesmith_api.model import SpecModel, StatusModel, cel
from tunesmith_api.v1alpha1.common import OptionalTime

__all__ = ["Autoscaling", "AutoscalingStatus"]


class Autoscaling(SpecModel):
    """The number of server pods follows the requests in flight: those that are answered and those that wait."""

    min_replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Fewest server pods. 0: none as long as nothing is asked; the next request waits until one answers.",
    )
    max_replicas: int = Field(ge=1, le=1000, description="Most server pods.")
    target_requests_in_flight: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None,
        description="Requests in flight for each server pod: with more, pods are added. Leave it out for engine.parallelRequests.",
    )
    scale_down_delay_seconds: int = Field(
        default=300,
        ge=0,
        le=3600,
        description="How long fewer pods must have been enough before some are taken away.",
    )
    idle_seconds: int = Field(
        default=600,
        ge=1,
        le=604_800,
        description="With minReplicas 0: how long nothing must have been asked before the last pods are taken away.",
    )
    hold_seconds: int = Field(
        default=300,
        ge=1,
        le=3600,
        description="With minReplicas 0: how long a request may wait for the first server pod; then it gets status 503 with Retry-After.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.minReplicas) || self.minReplicas <= self.maxReplicas",
                    "autoscaling.minReplicas is larger than autoscaling.maxReplicas: raise one or lower the other",
                ),
            ]
        },
    )


class AutoscalingStatus(StatusModel):
    """How many server pods autoscaling asks for, and why."""

    desired_replicas: int = Field(default=0, ge=0, description="Server pods asked for.")
    previous_replicas: int = Field(default=0, ge=0, description="Server pods asked for before lastScaleTime.")
    message: str = Field(default="", description="Why so many, as of lastScaleTime.")
    last_scale_time: OptionalTime = Field(default=None, description="When their number was last changed.")
