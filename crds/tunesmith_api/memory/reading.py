"""What the command line asks of the store's code, a process of its own, and what that answers: a model's sizes."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tunesmith_api.memory.facts import ModelFacts
from tunesmith_api.memory.headers import StoredTensor
from tunesmith_api.model import Contract
from tunesmith_api.plan import StoragePlan

__all__ = ["ModelFiles", "SizesAnswer", "SizesRequest"]


class SizesRequest(Contract):
    """Which models to look at, and how to reach them. Credentials come by environment."""

    uris: dict[str, str]
    """Field of the spec → URI."""
    revisions: dict[str, str | None] = Field(default_factory=dict)
    """URI of a Hub model → commit, tag or branch."""
    storage: StoragePlan = Field(default_factory=StoragePlan)
    hub_endpoint_url: str | None = Field(default=None, alias="hubEndpointURL")


class ModelFiles(Contract):
    """A model's config.json, and the tensors that its files' headers name."""

    config: dict[str, Any]
    tensors: tuple[StoredTensor, ...]

    @property
    def facts(self) -> ModelFacts:
        """Its sizes."""
        return ModelFacts.of(self.config, self.tensors)


class SizesAnswer(Contract):
    """What was found. With a `problem`, nothing."""

    models: dict[str, ModelFiles] = Field(default_factory=dict)
    problem: str = ""
