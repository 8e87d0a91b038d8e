"""How a new revision takes over: `spec.rollout` of a ModelDeployment."""

from __future__ import annotations

from pydantic import Field

from tunesmith_api.model import SpecModel

__all__ = ["Rollout"]


class Rollout(SpecModel):
    """How a new revision takes over. The old one serves until the new one has proven itself."""

    progress_deadline_seconds: int = Field(
        default=600,
        ge=10,
        le=86_400,
        description="How long a new revision may take to become available before it is given up.",
    )
