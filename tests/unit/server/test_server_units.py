"""The server's parts that need no model: threads, the readiness gate, the artefact's law on a local store."""

import json
import urllib.error
import urllib.request

import pytest

from tunesmith_api import keys
from tunesmith_api.artifacts import files_digest
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE, fetch_artifact, find_artifact, publish_artifact
from tunesmith_server.environment import cpu_threads, read_plan
from tunesmith_server.footprint import CACHE_MOST, prompt_cache_bytes
from tunesmith_server.health import HealthServer
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.volumes import VolumeStore


def serving_plan(**changes) -> ServingPlan:
    values = {
        "name": "m", "namespace": "n", "uid": "u", "revision": "m-r1", "model_uri": "pvc://models/m", "quantization": "Q8_0",
        "engine": "LlamaCpp", "context_length": 256, "parallel_requests": 2, "artifact_uri": "pvc://models/m/quantized/q8_0",
    }  # fmt: skip
    return ServingPlan(**{**values, **changes})


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "models").mkdir(parents=True)
    return VolumeStore(tmp_path / "volumes")


@pytest.fixture
def published(store, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / MODEL_FILE).write_bytes(b"GGUF" * 100)
    return publish_artifact(store, serving_plan(), folder, "base", {})


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


def test_a_published_artefact_is_found_again_only_for_the_same_model_and_method(store, published):
    assert published.digest == files_digest(published.files)
    assert find_artifact(store, serving_plan(), "base") == published
    assert find_artifact(store, serving_plan(), "other model") is None
    assert find_artifact(store, serving_plan(quantization=QuantizationMethod.NONE), "base") is None


def test_without_its_manifest_an_artefact_does_not_exist(store, published, tmp_path):
    store.delete(f"{serving_plan().artifact_uri}/{keys.MODEL_MANIFEST}")
    assert find_artifact(store, serving_plan(), "base") is None
    with pytest.raises(UserError, match="manifest is missing"):
        fetch_artifact(store, serving_plan(), tmp_path / "got")


def test_a_truncated_artefact_is_made_again(store, published):
    store.put_bytes(f"{serving_plan().artifact_uri}/{MODEL_FILE}", b"GGUF")
    assert find_artifact(store, serving_plan(), "base") is None


def test_a_damaged_artefact_is_never_served(store, published, tmp_path):
    store.put_bytes(f"{serving_plan().artifact_uri}/{MODEL_FILE}", b"XXXX" * 100)
    with pytest.raises(Retryable, match="damaged") as caught:
        fetch_artifact(store, serving_plan(), tmp_path / "got")
    assert caught.value.reason == Reason.MODEL_INVALID
