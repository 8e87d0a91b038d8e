"""The HTTP API that clients use: `spec.api` of a ModelDeployment."""

from __future__ import annotations

from pydantic import Field

from tunesmith_api.model import SpecModel
from tunesmith_api.v1alpha1.common import SecretRef

__all__ = ["Api"]


class Api(SpecModel):
    """Who may use a server, and how much of it one request may take."""

    keys_secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret whose every entry is an API key; clients send one as `Authorization: Bearer KEY`. Entries may be added and removed while servers run. Leave it out and no key is asked for.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Longest answer in tokens; a request for more is refused. Leave it out for what the context has left.",
    )
    request_timeout_seconds: int = Field(
        default=600,
        ge=1,
        le=86_400,
        description="How long a request may take, waiting included; then it is ended with status 504, and its place is free.",
    )
    max_body_bytes: int = Field(
        default=1_048_576, ge=1024, le=134_217_728, description="Largest body of a request; larger ones get status 413."
    )
    max_waiting_requests: int = Field(
        default=64,
        ge=0,
        le=4096,
        description="Requests that may wait in one replica beside those that it answers (engine.parallelRequests); more get status 429 with Retry-After.",
    )
    termination_grace_period_seconds: int = Field(
        default=60,
        ge=10,
        le=3600,
        description="How long a replica that is told to stop may take to finish the requests in flight.",
    )
