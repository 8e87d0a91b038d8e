"""Fixtures: one store per test session, one bucket per test. Loaded by `-p objectstore.pytest_plugin` or tests/conftest.py."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

import pytest

from objectstore.server import ObjectStore

__all__ = ["bucket", "object_store"]


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 store on this machine."""
    with ObjectStore.start(tmp_path_factory.mktemp("objectstore"), die_with_parent=True) as store:
        yield store


@pytest.fixture
def bucket(object_store: ObjectStore, request: pytest.FixtureRequest) -> str:
    """`s3://…` of a fresh bucket of this test's own."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40].strip("-")
    return object_store.ensure_bucket(f"{name}-{secrets.token_hex(3)}")
