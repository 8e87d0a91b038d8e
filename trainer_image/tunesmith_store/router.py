"""One store for all URIs of a job: `s3://` goes to S3, `pvc://` to mounted volumes, `hf://` to the Hub.

The main programs of pods and the command line open it; everybody else is handed an `ObjectStore`.
"""

# ruff: noqa: D102 - the methods are documented once, on the protocol

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan, StoragePlan, TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_store.hub import HubStore
from tunesmith_store.store import ObjectInfo, ObjectStore, S3Store
from tunesmith_store.volumes import VolumeStore

__all__ = ["RoutedStore", "open_store", "store_of"]


class RoutedStore:
    """Hands each URI to the store of its scheme. A store is opened when it is first needed. Safe between threads."""

    def __init__(self, openers: Mapping[str, Callable[[], ObjectStore]]) -> None:
        """`openers` maps a scheme, without `://`, to what opens its store."""
        self._openers = openers
        self._stores: dict[str, ObjectStore] = {}
        self._lock = threading.Lock()

    def at(self, uri: str) -> ObjectStore:
        """Return the store of a URI.

        Raises:
            UserError: nobody knows its scheme.
        """
        scheme = uri.partition("://")[0]
        if scheme not in self._openers:
            known = ", ".join(f"{name}://" for name in self._openers)
            raise UserError(Reason.INVALID_SPEC, f"{uri}: it must begin with one of {known}")
        with self._lock:
            if scheme not in self._stores:
                self._stores[scheme] = self._openers[scheme]()
            return self._stores[scheme]

    def list(self, uri: str) -> list[ObjectInfo]:
        return self.at(uri).list(uri)

    def head(self, uri: str) -> ObjectInfo:
        return self.at(uri).head(uri)

    def get_bytes(self, uri: str) -> bytes:
        return self.at(uri).get_bytes(uri)

    def get_range(self, uri: str, start: int, size: int) -> bytes:
        return self.at(uri).get_range(uri, start, size)

    def download(self, uri: str, path: Path) -> None:
        self.at(uri).download(uri, path)

    def put_bytes(self, uri: str, data: bytes) -> None:
        self.at(uri).put_bytes(uri, data)

    def upload(self, path: Path, uri: str) -> None:
        self.at(uri).upload(path, uri)

    def delete(self, uri: str) -> None:
        self.at(uri).delete(uri)


def open_store(
    storage: StoragePlan, hub_endpoint: str | None = None, revisions: Mapping[str, str | None] | None = None
) -> RoutedStore:
    """Open the store behind all URIs of an object.

    Args:
        storage: how to reach S3; credentials come from the environment.
        hub_endpoint: a mirror of the Hub; None for the Hub itself.
        revisions: URI of a Hub repository → commit, tag or branch to read; those not named are read at `main`.
    """
    return RoutedStore(
        {
            "s3": lambda: S3Store(storage),
            "pvc": VolumeStore,
            "hf": lambda: HubStore(hub_endpoint, revisions),
        }
    )


def store_of(plan: TrainingPlan | ServingPlan) -> RoutedStore:
    """Open the store of a plan; its Hub model is read at the revision that the plan says."""
    return open_store(plan.storage, plan.hub_endpoint_url, {plan.model_uri: plan.model_revision})
