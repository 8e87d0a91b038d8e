"""The server's parts that need no model: threads, the readiness gate, the artefact's law on a local store."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest, files_digest
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.artifact import (
    MODEL_FILE,
    assign_artifact,
    fetch_artifact,
    find_artifact,
    folder_of,
    publish_artifact,
)
from tunesmith_server.environment import cpu_threads, read_plan
from tunesmith_server.footprint import CACHE_MOST, prompt_cache_bytes
from tunesmith_server.health import HealthServer
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import entries_below
from tunesmith_store.volumes import VolumeStore


def serving_plan(**changes) -> ServingPlan:
    values = {
        "name": "m", "namespace": "n", "uid": "u", "revision": "m-r1", "model_uri": "pvc://models/m", "quantization": "Q8_0",
        "engine": "LlamaCpp", "context_length": 256, "parallel_requests": 2, "artifact_uri": "pvc://models/m/quantized",
    }  # fmt: skip
    return ServingPlan(**{**values, **changes})


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "models").mkdir(parents=True)
    return VolumeStore(tmp_path / "volumes")


URI = folder_of(serving_plan(), "Q8_0", "state")


def made(tmp_path, content: bytes) -> tuple[Path, ModelManifest]:
    """An artefact on disk, and its manifest."""
    folder = tmp_path / f"made-{content[:4].decode()}"
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(content)
    files = entries_below(folder)
    manifest = ModelManifest(
        digest=files_digest(files), base_uri="pvc://models/m", created_time="2026-01-01T00:00:00+00:00", files=files
    )
    return folder, manifest


@pytest.fixture
def published(store, tmp_path):
    manifest = publish_artifact(store, URI, *made(tmp_path, b"GGUF" * 100))
    assign_artifact(store, serving_plan(), URI, manifest)
    return manifest


@pytest.mark.parametrize(("limit", "threads"), [("1000", 1), ("1900", 1), ("500", 1), ("", None), ("64000", None)])
def test_threads_never_exceed_the_limit_nor_the_cores(limit, threads, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    assert cpu_threads({keys.ENV_CPU_LIMIT: limit}) == (threads or 4)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("spare", "limit", "footprint", "expected"),
    [
        (2000 * MIB, 2048 * MIB, 433 * MIB, 2000 - 433 - 204.8),
        (500 * MIB, 512 * MIB, 300 * MIB, 500 - 300 - 96),
        (500 * MIB, 512 * MIB, 450 * MIB, 0),
        (400 * MIB, 512 * MIB, 900 * MIB, 0),
        (300 * MIB, 65_536 * MIB, 100 * MIB, 0),
        (65_000 * MIB, 65_536 * MIB, 433 * MIB, CACHE_MOST / MIB),
        (10_433 * MIB, 0, 433 * MIB, 2500),
        (100_000 * MIB, 0, 433 * MIB, CACHE_MOST / MIB),
        (300 * MIB, 0, 433 * MIB, 0),
    ],
)
def test_the_prompt_cache_takes_what_the_pod_has_left(spare, limit, footprint, expected):
    assert prompt_cache_bytes(spare, limit, footprint) == pytest.approx(expected * MIB, abs=1)


def test_a_plan_of_another_version_is_refused_by_field(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(serving_plan().to_json()), "future": 1}))
    with pytest.raises(UserError, match="future") as caught:
        read_plan({keys.ENV_PLAN: str(path)})
    assert caught.value.exit_code == ExitCode.INVALID_INPUT


def status_of(port: int) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{keys.PATH_HEALTH}") as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_ready_only_after_the_answer_and_until_the_stop():
    health = HealthServer(port=0)
    alive = True
    assert status_of(health.port) == (503, "starting")
    health.ready(lambda: alive)
    assert status_of(health.port) == (200, "ready")
    alive = False
    assert status_of(health.port)[0] == 503
    alive = True
    health.drain()
    assert status_of(health.port) == (503, "stopping")


def test_an_artefact_is_named_by_method_and_source():
    assert URI.startswith("pvc://models/m/quantized/q8_0-")
    others = [folder_of(serving_plan(), method, state) for method, state in (("Q8_0", "changed"), ("None", "state"))]
    assert len({URI, *others}) == 3


def test_a_published_artefact_is_found_again_and_never_overwritten(store, published, tmp_path):
    assert find_artifact(store, URI) == published
    assert publish_artifact(store, URI, *made(tmp_path, b"MORE" * 100)) == published
    assert store.get_bytes(f"{URI}/{MODEL_FILE}") == b"GGUF" * 100


def test_a_revision_goes_on_serving_what_it_was_made_with(store, published, tmp_path):
    newer = publish_artifact(store, other := f"{URI}-newer", *made(tmp_path, b"MORE" * 100))
    assign_artifact(store, serving_plan(revision="m-r2"), other, newer)
    assert fetch_artifact(store, serving_plan(), tmp_path / "1").read_bytes() == b"GGUF" * 100
    assert fetch_artifact(store, serving_plan(revision="m-r2"), tmp_path / "2").read_bytes() == b"MORE" * 100


def test_a_revision_without_an_artefact_of_its_own_is_not_served(store, published, tmp_path):
    with pytest.raises(UserError, match="m-r3 has no artefact"):
        fetch_artifact(store, serving_plan(revision="m-r3"), tmp_path / "got")


def test_an_artefact_that_was_put_in_place_of_another_is_not_served(store, published, tmp_path):
    _, other = made(tmp_path, b"MORE" * 100)
    store.put_bytes(f"{URI}/{keys.MODEL_MANIFEST}", other.to_json().encode())
    with pytest.raises(UserError, match="holds another artefact"):
        fetch_artifact(store, serving_plan(), tmp_path / "got")


def test_without_its_manifest_an_artefact_does_not_exist(store, published, tmp_path):
    store.delete(f"{URI}/{keys.MODEL_MANIFEST}")
    assert find_artifact(store, URI) is None
    with pytest.raises(UserError, match="manifest is missing"):
        fetch_artifact(store, serving_plan(), tmp_path / "got")


def test_a_truncated_artefact_is_made_again(store, published):
    store.put_bytes(f"{URI}/{MODEL_FILE}", b"GGUF")
    assert find_artifact(store, URI) is None


def test_a_damaged_artefact_is_never_served(store, published, tmp_path):
    store.put_bytes(f"{URI}/{MODEL_FILE}", b"XXXX" * 100)
    with pytest.raises(Retryable, match="damaged") as caught:
        fetch_artifact(store, serving_plan(), tmp_path / "got")
    assert caught.value.reason == Reason.MODEL_INVALID
