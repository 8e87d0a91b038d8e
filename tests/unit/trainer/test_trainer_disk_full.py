"""A full disk ends a job at once, with what helps; one that will not take the model is found before training."""

import errno
import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from support.plans import dataset, training_plan
from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1.finetunejob import SaveMode
from tunesmith_store.errors import UserError, is_disk_full
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.group import driver, preflight

BASE = "pvc://b"
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


def test_libraries_tell_a_full_disk_in_their_own_errors():
    assert is_disk_full(NO_SPACE)
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert is_disk_full(
        ValueError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')
    )
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(UserError(Reason.DISK_FULL, "No space left on device: told already"))


def test_in_a_training_process_it_is_no_bug(tmp_path):
    from tunesmith_trainer.group import worker

    run = SimpleNamespace(pod=SimpleNamespace(scratch=tmp_path))
    with (
        pytest.raises(UserError, match=f"no room left on the pod's disk, in {tmp_path}") as found,
        worker._in_words(run),
    ):
        raise NO_SPACE
    assert found.value.reason is Reason.DISK_FULL
    with pytest.raises(OSError, match="Permission"), worker._in_words(run):
        raise OSError(errno.EACCES, "Permission denied")


def test_in_the_driver_it_ends_the_job_and_is_not_tried_again(tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text(training_plan().to_json())
    (tmp_path / "model").mkdir()
    for name, value in {
        keys.ENV_POD_IP: "127.0.0.1", keys.ENV_WORKER_INDEX: "0", keys.ENV_SCRATCH: str(tmp_path),
        keys.ENV_PLAN: str(tmp_path / "plan.json"), keys.ENV_PROGRESS_PORT: "9",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["driver"])

    def run(*_):
        raise NO_SPACE

    monkeypatch.setattr(driver, "_run", run)
    assert driver.main() == ExitCode.INVALID_INPUT
    (result,) = tmp_path.glob("result*")
    report = TerminationReport.from_json(result.read_bytes())
    assert report.reason is Reason.DISK_FULL
    assert "ephemeral storage" in report.message
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("save", ["Merged", "Adapter"])
def test_a_volume_that_is_too_small_for_the_model_is_found_before_training(tmp_path, monkeypatch, save):
    (tmp_path / "b").mkdir()
    monkeypatch.setenv(keys.ENV_VOLUMES, str(tmp_path))
    store = VolumeStore()
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name, content in {
        "model/config.json": b'{"model_type": "llama"}', "model/model.safetensors": b"x" * 5000,
        "model/tokenizer.json": b"{}", "train.jsonl": json.dumps(row).encode(),
    }.items():  # fmt: skip
        store.put_bytes(f"{BASE}/{name}", content)
    plan = training_plan(BASE, dataset=dataset(f"{BASE}/train.jsonl"), method="LoRA", save=save)
    free = {"bytes": 5000}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=10**9, free=free["bytes"]))
    preflight.check(plan, store, tmp_path / "scratch", lambda *_: None)
    free["bytes"] = 4999
    digest = preflight.check(
        plan.model_copy(update={"save": SaveMode.ADAPTER}), store, tmp_path / "scratch", lambda *_: None
    )
    if save == "Adapter":
        preflight.check(plan, store, tmp_path / "scratch", lambda *_: None)
        return
    with pytest.raises(UserError, match=r"spec\.output\.uri: the model takes .* pvc://b/tuned has .* left") as found:
        preflight.check(plan, store, tmp_path / "scratch", lambda *_: None)
    assert found.value.reason is Reason.DISK_FULL
    # its own model has taken the room: there is nothing to do
    manifest = ModelManifest(
        digest="d", base_uri="", plan_digest=digest, created_time="", output_form=plan.output_form, files=()
    )
    store.put_bytes(f"{BASE}/tuned/{keys.MODEL_MANIFEST}", manifest.to_json().encode())
    preflight.check(plan, store, tmp_path / "scratch", lambda *_: None)
