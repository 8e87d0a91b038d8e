"""Which artefact a revision gets: named by its source, made once, kept whatever becomes of the source."""

import errno

import pytest

from support.hubserver import running_hub
from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest, files_digest
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import CalibrationPlan, ServingPlan
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1.quantization import QuantizationMethod as Method
from tunesmith_server import builder
from tunesmith_server.artifact import MODEL_FILE, fetch_artifact
from tunesmith_server.builder import ArtifactBuilder
from tunesmith_server.quantize import main, quantize
from tunesmith_server.quantizers.base import PLAIN, Made
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import entry_of_bytes
from tunesmith_store.router import store_of
from tunesmith_store.volumes import VolumeStore

MODEL = "pvc://models/m"


class Copying:
    """A family whose files are the weights and the method's name. Counts how often it was called."""

    made: list[str]

    def __init__(self, source, scratch, threads):
        self._source = source

    def make(self, method, folder, options=PLAIN):
        self.made.append(method.value)
        (folder / MODEL_FILE).write_bytes((self._source / "model.safetensors").read_bytes() + method.value.encode())
        return Made(weights=4, tensor_types={"Q8_0": 2}, fallbacks={"Q6_K → Q8_0": 1}, tools={"copier": "1"})


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(Copying, "made", [], raising=False)
    monkeypatch.setattr(builder, "quantizer_of", lambda engine, method: Copying)
    return Copying.made


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes/models").mkdir(parents=True)
    store = VolumeStore(tmp_path / "volumes")
    store.put_bytes(f"{MODEL}/config.json", b"{}")
    store.put_bytes(f"{MODEL}/model.safetensors", b"old")
    return store


def plan(revision: str = "m-r1", **changes) -> ServingPlan:
    values = {
        "name": "m", "namespace": "n", "uid": "u", "revision": revision, "model_uri": MODEL, "quantization": "Q8_0",
        "engine": "LlamaCpp", "context_length": 256, "parallel_requests": 2, "artifact_uri": f"{MODEL}/quantized",
    }  # fmt: skip
    return ServingPlan(**{**values, **changes})


def quantized(wanted: ServingPlan, store, scratch) -> ModelManifest:
    return quantize(wanted, store, ArtifactBuilder(wanted, store, scratch))


@pytest.fixture
def served(store, tmp_path):
    def bytes_of(wanted: ServingPlan) -> bytes:
        return fetch_artifact(store, wanted, tmp_path / f"pod-{wanted.revision}").read_bytes()

    return bytes_of


def publish(store, content: bytes) -> str:
    """A model of ours in place of what is there; returns its digest."""
    store.put_bytes(f"{MODEL}/model.safetensors", content)
    files = (entry_of_bytes("config.json", b"{}"), entry_of_bytes("model.safetensors", content))
    manifest = ModelManifest(digest=files_digest(files), base_uri="x", created_time="now", files=files)
    store.put_bytes(f"{MODEL}/{keys.MODEL_MANIFEST}", manifest.to_json().encode())
    return manifest.digest


def test_a_model_that_changes_under_its_uri_gets_another_artefact(store, served, made, tmp_path):
    first = quantized(plan(), store, tmp_path / "1")
    store.put_bytes(f"{MODEL}/model.safetensors", b"newer")
    second = quantized(plan("m-r2"), store, tmp_path / "2")
    assert (served(plan()), served(plan("m-r2"))) == (b"oldQ8_0", b"newerQ8_0")
    assert first.base_digest != second.base_digest
    assert quantized(plan(), store, tmp_path / "3") == first  # its Job runs again
    assert served(plan()) == b"oldQ8_0"
    assert made == ["Q8_0", "Q8_0"]


def test_a_damaged_manifest_of_the_source_is_named_with_what_to_do(store, made, tmp_path):
    store.put_bytes(f"{MODEL}/{keys.MODEL_MANIFEST}", b"{}")
    with pytest.raises(
        UserError, match=rf"{MODEL}/{keys.MODEL_MANIFEST} can't be read .* remove it or restore"
    ) as caught:
        quantized(plan(), store, tmp_path / "1")
    assert caught.value.reason is Reason.MODEL_INVALID
    assert made == []


def test_the_same_model_and_method_are_quantized_once(store, served, made, tmp_path):
    first = quantized(plan(), store, tmp_path / "1")
    assert quantized(plan("m-r2"), store, tmp_path / "2") == first
    assert quantized(plan(uid="another deployment"), store, tmp_path / "3") == first
    assert made == ["Q8_0"]
    assert not (tmp_path / "3/model").exists()
    quantized(plan("m-r3", quantization="Q4_0"), store, tmp_path / "4")
    assert served(plan("m-r3", quantization="Q4_0")) == b"oldQ4_0"


def test_the_manifest_says_what_the_method_came_to(store, made, tmp_path):
    manifest = quantized(plan(), store, tmp_path / "1")
    assert manifest.bits_per_weight == len(b"oldQ8_0") * 8 / 4
    assert (manifest.quantization, manifest.tensor_types, manifest.fallbacks, manifest.tools) == (
        "Q8_0", {"Q8_0": 2}, {"Q6_K → Q8_0": 1}, {"copier": "1"},
    )  # fmt: skip


def test_a_place_that_can_not_be_written_is_known_before_the_work(store, made, tmp_path, monkeypatch):
    def refuse(uri, data):
        raise UserError(Reason.STORAGE_UNWRITABLE, f"can't write {uri}")

    monkeypatch.setattr(store, "put_bytes", refuse)
    with pytest.raises(UserError, match="can't write pvc://models/m/quantized"):
        quantized(plan(), store, tmp_path / "1")
    assert made == []
    assert not (tmp_path / "1/model").exists()


def test_a_full_disk_is_no_crash(store, made, tmp_path, monkeypatch):
    path, told = tmp_path / "plan.json", tmp_path / "termination.json"
    path.write_text(plan().to_json())
    monkeypatch.setenv(keys.ENV_PLAN, str(path))
    monkeypatch.setenv(keys.ENV_SCRATCH, str(tmp_path / "scratch"))
    monkeypatch.setenv(keys.ENV_VOLUMES, str(tmp_path / "volumes"))
    monkeypatch.setenv(keys.ENV_TERMINATION_LOG, str(told))
    monkeypatch.setattr(Copying, "make", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    assert main() == ExitCode.STORAGE_DENIED
    report = TerminationReport.from_json(told.read_text())
    assert (report.reason, "room for the model three times" in report.message) == (Reason.DISK_FULL, True)


def test_a_pinned_digest_is_served_after_the_model_has_changed(store, served, made, tmp_path):
    old = publish(store, b"first")
    quantized(plan(model_digest=old), store, tmp_path / "1")
    publish(store, b"second")
    again = plan("m-r2", model_digest=old)
    quantized(again, store, tmp_path / "2")
    assert served(again) == b"firstQ8_0"
    with pytest.raises(UserError, match="is not the one that m-r3 is of") as caught:
        quantized(plan("m-r3", model_digest=old, quantization="Q4_0"), store, tmp_path / "3")
    assert caught.value.reason is Reason.MODEL_INVALID


def test_an_artefact_that_was_lost_is_made_again_of_the_same_model_only(store, served, made, tmp_path):
    quantized(plan(), store, tmp_path / "1")
    for info in store.list(f"{MODEL}/quantized"):
        if "/revisions/" not in info.uri:
            store.delete(info.uri)
    quantized(plan(), store, tmp_path / "2")
    assert served(plan()) == b"oldQ8_0"
    for info in store.list(f"{MODEL}/quantized"):
        if "/revisions/" not in info.uri:
            store.delete(info.uri)
    store.put_bytes(f"{MODEL}/model.safetensors", b"newer")
    with pytest.raises(UserError, match="is gone, and the model at pvc://models/m has changed since"):
        quantized(plan(), store, tmp_path / "3")


def test_a_model_of_the_hub_is_quantized_to_where_one_can_write(store, served, made, tmp_path, monkeypatch):
    monkeypatch.setenv(keys.ENV_VOLUMES, str(tmp_path / "volumes"))
    with running_hub() as hub:
        hub.model("o/n").push({"config.json": b"{}", "model.safetensors": b"main"})
        hub.model("o/n").push({"model.safetensors": b"dev"}, "dev")
        for number, revision in enumerate((None, "dev", "dev")):
            wanted = plan(
                f"m-r{number}", model_uri="hf://o/n", model_revision=revision, hub_endpoint_url=hub.url,
                artifact_uri="pvc://models/served",
            )  # fmt: skip
            quantized(wanted, store_of(wanted), tmp_path / str(number))
            assert served(wanted) == (revision or "main").encode() + b"Q8_0"
    assert made == ["Q8_0", "Q8_0"]


def test_a_model_that_changes_while_it_is_fetched_is_tried_again(store, made, tmp_path, monkeypatch):
    download = store.download

    def rewritten(uri, path):
        download(uri, path)
        store.put_bytes(f"{MODEL}/model.safetensors", b"half")

    monkeypatch.setattr(store, "download", rewritten)
    with pytest.raises(Retryable, match="is being rewritten"):
        quantized(plan(), store, tmp_path / "1")
    assert made == []


def test_a_comparison_has_both_files_at_hand_and_fetches_the_model_once(store, made, tmp_path, monkeypatch):
    fetched = []
    download = store.download
    monkeypatch.setattr(store, "download", lambda uri, path: (fetched.append(uri), download(uri, path))[1])
    shop = ArtifactBuilder(plan(), store, tmp_path / "1")
    artifact = shop.artifact(Method.Q8_0)
    assert (shop.local(Method.Q8_0).read_bytes(), shop.local(Method.NONE).read_bytes()) == (b"oldQ8_0", b"oldNone")
    assert sorted(fetched) == [f"{MODEL}/config.json", f"{MODEL}/model.safetensors"]
    assert made == ["Q8_0", "None"]
    assert [info.uri for info in store.list(f"{MODEL}/quantized") if MODEL_FILE in info.uri] == [
        f"{artifact.uri}/{MODEL_FILE}"
    ]
    later = ArtifactBuilder(plan(), store, tmp_path / "2")
    assert later.local(Method.Q8_0).read_bytes() == b"oldQ8_0"
    assert made == ["Q8_0", "None"], "it was there"


def test_calibration_rows_and_ignored_modules_make_artefacts_of_their_own(store, made, tmp_path):
    rows = "pvc://models/rows.jsonl"
    store.put_bytes(rows, b'{"text": "one"}\n{"text": "two"}\n')
    calibrated = {"calibration": CalibrationPlan(uri=rows), "quantization": "Q4_0"}
    wanted = [
        plan("m-r1", quantization="Q4_0"),
        plan("m-r2", **calibrated),
        plan("m-r3", **calibrated, ignore=("a.*",)),
    ]
    manifests = [quantized(it, store, tmp_path / it.revision) for it in wanted]
    assert made == ["Q4_0"] * 3
    assert len({it.variant for it in manifests}) == 3
    assert manifests[0].variant == "", "what was made before there were variants keeps its folder"
    quantized(plan("m-r4", **calibrated), store, tmp_path / "r4")
    assert made == ["Q4_0"] * 3, "it is there"
    store.put_bytes(rows, b'{"text": "three"}\n')
    changed = quantized(plan("m-r5", **calibrated), store, tmp_path / "r5")
    assert changed.variant not in {it.variant for it in manifests}


def test_an_artefact_of_other_rows_is_not_taken_for_the_plans_own(store, made, tmp_path, served):
    store.put_bytes("pvc://models/rows.jsonl", b'{"text": "one"}\n')
    first = plan(quantization="Q4_0")
    again = plan(quantization="Q4_0", calibration=CalibrationPlan(uri="pvc://models/rows.jsonl"))
    assert quantized(first, store, tmp_path / "a").variant == ""
    assert quantized(again, store, tmp_path / "b").variant != "", "one revision name, another plan"


def test_the_unquantized_model_beside_it_is_as_it_is(store, made, tmp_path):
    store.put_bytes("pvc://models/rows.jsonl", b'{"text": "one"}\n')
    wanted = plan(quantization="Q4_0", calibration=CalibrationPlan(uri="pvc://models/rows.jsonl"))
    builder_ = ArtifactBuilder(wanted, store, tmp_path / "scratch")
    assert builder_.artifact(Method.NONE).manifest.variant == ""


def test_what_is_compared_is_the_artefact_whatever_has_become_of_its_calibration_rows(store, made, tmp_path):
    rows = "pvc://models/rows.jsonl"
    store.put_bytes(rows, b'{"text": "one"}\n')
    wanted = plan(quantization="Q4_0", calibration=CalibrationPlan(uri=rows))
    manifest = quantized(wanted, store, tmp_path / "first")
    store.put_bytes(rows, b'{"text": "two"}\n')
    assert quantized(wanted, store, tmp_path / "again") == manifest
    ArtifactBuilder(wanted, store, tmp_path / "other").local(Method.Q4_0, manifest.variant)
    assert made == ["Q4_0"], "nothing is made anew to be compared"


def test_a_mounted_claim_is_served_from_where_it_lies_and_checked(store, tmp_path, made, monkeypatch):
    monkeypatch.setenv(keys.ENV_VOLUMES, str(tmp_path / "volumes"))
    quantized(plan(), store, tmp_path / "job")
    path = fetch_artifact(store, plan(), tmp_path / "pod")
    assert path.is_relative_to(tmp_path / "volumes/models/m/quantized")
    assert not (tmp_path / "pod").exists()
    path.write_bytes(b"old" + b"X" * (path.stat().st_size - 3))
    with pytest.raises(Retryable, match="damaged"):
        fetch_artifact(store, plan(), tmp_path / "pod")
