"""How a new revision takes over: `spec.rollout` of a ModelDeployment."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from tunesmith_api.model import DnsLabel, NonNegative, SpecModel, cel

__all__ = ["Analysis", "CanaryStep", "Rollout", "RolloutStrategy"]


class RolloutStrategy(StrEnum):
    """How requests move from the old revision to the new one."""

    BLUE_GREEN = "BlueGreen"
    ROLLING_UPDATE = "RollingUpdate"
    CANARY = "Canary"


class CanaryStep(SpecModel):
    """A share of the requests that the new revision gets for a while."""

    weight: int = Field(
        ge=1, le=99, description="Percent of the requests that the new revision is to get; replicas are counted for it."
    )
    pause_seconds: Annotated[int, Field(ge=0, le=604_800)] | None = Field(
        default=None,
        description="How long the step lasts, once its replicas answer. Leave it out to wait for `promote`.",
    )


class Analysis(SpecModel):
    """When a new revision is taken back, by what its own servers and pods say. Nothing is asked of the first one."""

    max_error_percent: NonNegative | None = Field(
        default=None,
        description="Most of its requests, in percent, that may be answered with a status of 500 or above.",
        json_schema_extra={"x-kubernetes-validations": [cel("self < 100.0", "maxErrorPercent must be below 100")]},
    )
    max_latency_p95_seconds: NonNegative | None = Field(
        default=None,
        alias="maxLatencyP95Seconds",
        description="Longest time, in seconds, that 95 % of its requests may take.",
        json_schema_extra={"x-kubernetes-validations": [cel("self > 0.0", "maxLatencyP95Seconds must be above 0")]},
    )
    max_restarts: Annotated[int, Field(ge=0, le=1000)] | None = Field(
        default=None, description="How often its containers, all together, may restart."
    )
    min_requests: int = Field(
        default=20,
        ge=1,
        le=1_000_000,
        description="Requests below which error rate and latency are not judged, which status then says.",
    )
    after_switch_seconds: int = Field(
        default=0,
        ge=0,
        le=86_400,
        description="How long the new revision is judged once it gets all requests, before the old one is given up.",
    )


class Rollout(SpecModel):
    """How a new revision takes over. The old one serves until the new one has proven itself."""

    strategy: RolloutStrategy = Field(
        default=RolloutStrategy.BLUE_GREEN,
        description="BlueGreen: all requests at once, when every replica of the new revision answers. RollingUpdate: the "
        "old replicas go as new ones come up. Canary: by `steps`.",
    )
    steps: Annotated[list[CanaryStep], Field(max_length=20, json_schema_extra={"x-kubernetes-list-type": "atomic"})] = (
        Field(default_factory=list, description="What Canary goes through before the new revision gets all requests.")
    )
    analysis: Analysis = Field(default_factory=Analysis, description="When a new revision is taken back by itself.")
    promote: DnsLabel | None = Field(
        default=None,
        description="Name of a revision whose steps are not waited for any longer; of no meaning for any other.",
    )
    abort: DnsLabel | None = Field(
        default=None,
        description="Name of a revision that is taken back where it is still on its way; of no meaning for any other.",
    )
    rollback_to: DnsLabel | None = Field(
        default=None,
        description="Name of an earlier revision, of revisionHistoryLimit, that is served anew, as it was made, whatever "
        "the spec says of model, engine and pods meanwhile. Take it out to go on with the spec.",
    )
    progress_deadline_seconds: int = Field(
        default=600,
        ge=10,
        le=86_400,
        description="How long a new revision may take to become available before it is given up.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "(has(self.strategy) && self.strategy == 'Canary') == (has(self.steps) && self.steps.size() > 0)",
                    "strategy Canary needs steps, and no other takes any: for example steps: [{weight: 10, pauseSeconds: 60}]",
                ),
                cel(
                    "!has(self.promote) || !has(self.abort) || self.promote != self.abort",
                    "rollout.promote and rollout.abort name the same revision: take one of them out",
                ),
            ]
        },
    )
