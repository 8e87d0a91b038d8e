"""LoRA adapters between operator and pods: what is converted, and which a server has.

The operator writes an `AdapterSet` into a ConfigMap that server pods have mounted; they look at it as long as they run.
So adapters come and go without a restart.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith_api.model import Contract

__all__ = ["AdapterPlan", "AdapterSet", "ServedAdapter"]


class AdapterPlan(Contract):
    """What the Job that converts one adapter needs to know, beside the plan of the revision that it is for."""

    name: str
    uri: str
    digest: str = Field(default="", description="The adapter must have it; empty: whichever it has.")
    base_digest: str = Field(description="Digest of the model that it must be an adapter of.")


class ServedAdapter(Contract):
    """An adapter that servers load: its artefact, and the name that clients ask for."""

    name: str
    key: str = Field(description="Names the adapter's source and the model that it was converted for.")
    uri: str
    digest: str
    source_digest: str = ""


class AdapterSet(Contract):
    """`adapters.json` in the ConfigMap of a revision's adapters."""

    schema_version: Literal[1] = 1
    adapters: tuple[ServedAdapter, ...] = ()
