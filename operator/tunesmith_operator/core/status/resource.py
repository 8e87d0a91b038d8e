"""What every custom resource has, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from tunesmith_api.v1alpha1 import Condition, ObjectMeta

__all__ = ["CustomResource", "Status"]


class Status(Protocol):
    """What the operator reports of a custom resource; the API types are pydantic models that provide it."""

    @property
    def conditions(self) -> list[Condition]:
        """What holds and what doesn't, by type."""

    @property
    def observed_generation(self) -> int:
        """The generation whose children were all applied."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self:
        """Read it as the API server delivers it."""

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """The same with some fields changed."""

    def model_dump(self, *, mode: str, by_alias: bool, exclude_none: bool) -> dict[str, Any]:
        """The fields as plain data."""


class CustomResource(Protocol):
    """One object of a registered kind."""

    @property
    def metadata(self) -> ObjectMeta:
        """Its name, uid, generation and so on."""

    @property
    def status(self) -> Status:
        """What was last reported of it."""
