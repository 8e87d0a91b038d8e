"""What is watched: one informer for each kind and namespace, with the selectors that the API server filters by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import kubernetes.client

from tunesmith_api import keys
from tunesmith_operator.adapters.watch import ApiServerSource, Selectors
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.resources import EVENT, Resource
from tunesmith_operator.engine.informer import Informer
from tunesmith_operator.engine.store import VIEWS, WATCHED, Store

__all__ = ["SELECTORS", "informers_of", "scopes_of", "source_of"]

_OURS: Final = Selectors(labels=f"{keys.LABEL_MANAGED_BY}={keys.MANAGED_BY}")
SELECTORS: Final[Mapping[Resource, Selectors]] = dict.fromkeys(VIEWS, _OURS) | {
    # the Job controller says in Events alone that it may not create pods
    EVENT: Selectors(fields="involvedObject.kind=Job,reason=FailedCreate")
}


def scopes_of(config: Config) -> tuple[str | None, ...]:
    """The namespaces that are watched; None stands for all."""
    return config.namespaces or (None,)


def source_of(
    configuration: kubernetes.client.Configuration, on_request: Callable[[str, str, str], None]
) -> ApiServerSource:
    """Where all informers list and watch."""
    return ApiServerSource(configuration, SELECTORS, on_request)


def informers_of(config: Config, source: ApiServerSource, store: Store) -> list[Informer]:
    """One for each kind in each scope."""
    return [Informer(source, store, resource, scope) for scope in scopes_of(config) for resource in WATCHED]
