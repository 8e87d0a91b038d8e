"""Fixtures of the end-to-end tests: one testbed per session, one namespace per test."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import pytest

import assets
from devcluster import Cluster
from images import UnsupportedMachine, build_images
from testbed.bed import Testbed
from testbed.jobs import BASE_MODEL


def say(line: str) -> None:
    print(f"testbed: {line}", flush=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the images before the first test that needs them: minutes, the first time, that no test's time limit should count."""
    needed = any("testbed" in getattr(item, "fixturenames", ()) for item in session.items)
    if not needed or session.config.option.collectonly:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with contextlib.suppress(UnsupportedMachine), capture.global_and_fixture_disabled():  # the fixture says why
        build_images(say)


@contextlib.contextmanager
def fresh_namespace(testbed: Testbed) -> Iterator[str]:
    """A restricted namespace with the store's Secret, removed with its pods."""
    name = f"ml-{uuid.uuid4().hex[:6]}"
    testbed.create_namespace(name)
    yield name
    testbed.cluster.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")
    testbed.cluster.kubectl("wait", "--for=delete", "pod", "--all", "-n", name, "--timeout=90s", check=False)


@pytest.fixture(scope="session")
def testbed(cluster: Cluster) -> Testbed:
    """Two nodes, the store, the operator installed by Helm."""
    try:
        return Testbed.install(cluster, say)
    except UnsupportedMachine as reason:
        pytest.skip(str(reason))


@pytest.fixture
def user_namespace(testbed: Testbed) -> Iterator[str]:
    """A namespace for one test."""
    with fresh_namespace(testbed) as name:
        yield name


@pytest.fixture(scope="session")
def tweets(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base model and labelled tweets in the store; returns the training file's URI."""
    testbed.store.put_folder(assets.smollm2(), BASE_MODEL)
    data = assets.tweets(tmp_path_factory.mktemp("tweets"), train=96, eval_per_class=4, seed=1)
    testbed.store.put_file(data.eval, "s3://data/tweets/eval.jsonl")
    return testbed.store.put_file(data.train, "s3://data/tweets/train.jsonl")
