"""The Hub as a store, against a server that speaks its API."""

import pytest

from support.hubserver import TOKEN, running_hub
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import fetch_model
from tunesmith_store.hub import HubStore, parse_hub_uri
from tunesmith_store.store import NotFound

MODEL = {"config.json": b"{}", "model.safetensors": b"0123456789", "onnx/model.onnx": b"x", "tokenizer.json": b"{}"}


@pytest.fixture
def hub(monkeypatch):
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tunesmith_store.hub.PAUSES", (0.0, 0.0))
    with running_hub() as server:
        yield server


def test_files_are_listed_read_in_part_and_downloaded(hub, tmp_path):
    hub.model("o/n").push(MODEL)
    store = HubStore(hub.url)
    assert [info.uri for info in store.list("hf://o/n")] == [f"hf://o/n/{name}" for name in sorted(MODEL)]
    assert [info.uri for info in store.list("hf://o/n/onnx")] == ["hf://o/n/onnx/model.onnx"]
    assert store.list("hf://o/n/nothing") == []
    assert store.head("hf://o/n/model.safetensors").size == 10
    assert store.get_bytes("hf://o/n/config.json") == b"{}"
    assert store.get_range("hf://o/n/model.safetensors", 2, 3) == b"234"
    store.download("hf://o/n/model.safetensors", tmp_path / "deep" / "weights")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["weights"]
    assert (tmp_path / "deep" / "weights").read_bytes() == MODEL["model.safetensors"]


def test_what_is_no_file_is_not_found(hub):
    hub.model("o/n").push(MODEL)
    store = HubStore(hub.url)
    for uri in ("hf://o/n", "hf://o/n/none", "hf://o/n/onnx"):
        with pytest.raises(NotFound):
            store.head(uri)
    with pytest.raises(NotFound):
        store.get_bytes("hf://o/n/none")


def test_a_branch_is_read_at_one_commit_however_it_moves(hub):
    hub.model("o/n").push({"x": b"old"})
    store = HubStore(hub.url)
    assert store.get_bytes("hf://o/n/x") == b"old"
    hub.model("o/n").push({"x": b"new"})
    assert store.get_bytes("hf://o/n/x") == b"old"
    assert HubStore(hub.url).get_bytes("hf://o/n/x") == b"new"


def test_a_revision_belongs_to_its_repository_only(hub):
    for name in ("o/n", "o/m"):
        hub.model(name).push({"x": b"main"})
        hub.model(name).push({"x": b"dev"}, "dev")
    store = HubStore(hub.url, {"hf://o/n": "dev", "s3://b/model": "ignored", "hf://o/other": None})
    assert store.get_bytes("hf://o/n/x") == b"dev"
    assert store.get_bytes("hf://o/m/x") == b"main"
    assert store.commit("hf://o/m", "dev") == hub.model("o/m").branches["dev"]


def test_a_whole_model_is_fetched_without_what_training_does_not_read(hub, tmp_path):
    hub.model("o/n").push(MODEL | {"pytorch_model.bin": b"x"})
    folder = fetch_model(HubStore(hub.url), "hf://o/n", tmp_path / "model")
    names = {path.name for path in folder.iterdir() if path.name[0] != "."}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_model_that_begins_at_random_is_fetched_without_its_weights(hub, tmp_path):
    hub.model("o/n").push(MODEL)
    folder = fetch_model(HubStore(hub.url), "hf://o/n", tmp_path / "model", weights=False)
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("uri", "revision", "reason", "words"),
    [
        ("hf://o/none", None, Reason.MODEL_NOT_FOUND, "no such repository, or it is private"),
        ("hf://datasets/o/none", None, Reason.DATASET_NOT_FOUND, "no such repository"),
        ("hf://o/private", None, Reason.MODEL_NOT_FOUND, "spec.huggingFace.secretRef"),
        ("hf://o/n", "v9", Reason.MODEL_NOT_FOUND, "no revision 'v9'; correct spec.model.revision"),
        ("hf://datasets/o/d", "v9", Reason.DATASET_NOT_FOUND, "the data set's revision"),
        ("hf://o/gated", None, Reason.MODEL_NOT_FOUND, "gated: accept its conditions"),
        ("hf://o/..", None, Reason.MODEL_NOT_FOUND, "no repository of that name"),
    ],
)
def test_what_the_user_can_correct_is_said(hub, uri, revision, reason, words):
    hub.model("o/n").push(MODEL)
    hub.dataset("o/d").push({"x": b""})
    for name in ("private", "gated"):
        repo = hub.model(f"o/{name}")
        repo.push(MODEL)
        setattr(repo, name, True)
    with pytest.raises(UserError) as caught:
        HubStore(hub.url, {uri: revision}).get_bytes(f"{uri}/config.json")
    assert caught.value.reason is reason
    assert words in caught.value.message


def test_a_token_opens_private_repositories_and_a_wrong_one_is_named(hub, monkeypatch):
    hub.model("o/private").push(MODEL)
    hub.model("o/private").private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert HubStore(hub.url).get_bytes("hf://o/private/config.json") == b"{}"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"refuses to show it \(401\): check the HF_TOKEN") as caught:
        HubStore(hub.url).get_bytes("hf://o/private/config.json")
    assert caught.value.exit_code is ExitCode.STORAGE_DENIED


def test_a_busy_hub_is_asked_again_and_then_the_job_is_tried_again(hub):
    hub.model("o/n").push(MODEL)
    hub.failing = 2
    assert HubStore(hub.url).get_bytes("hf://o/n/config.json") == b"{}"
    hub.failing = 100
    with pytest.raises(Retryable, match="answered 503") as busy:
        HubStore(hub.url).list("hf://o/n")
    assert busy.value.reason is Reason.STORAGE_UNREACHABLE


def test_no_answer_at_all_can_be_tried_again(hub):
    with pytest.raises(Retryable, match=r"spec\.huggingFace\.endpointURL") as unreachable:
        HubStore("http://127.0.0.1:9").list("hf://o/n")
    assert unreachable.value.reason is Reason.STORAGE_UNREACHABLE


def test_it_can_not_be_written(hub, tmp_path):
    store = HubStore(hub.url)
    for write in (
        lambda: store.put_bytes("hf://o/n/x", b""),
        lambda: store.upload(tmp_path, "hf://o/n/x"),
        lambda: store.delete("hf://o/n/x"),
    ):
        with pytest.raises(UserError, match="can't be written to"):
            write()
    assert hub.requests == []


def test_uris_of_the_hub():
    assert parse_hub_uri("hf://o/n/a/b.txt").path == "a/b.txt"
    assert (parse_hub_uri("hf://gpt2").repo, parse_hub_uri("hf://gpt2").base) == ("gpt2", "hf://gpt2")
    assert parse_hub_uri("hf://datasets/squad").base == "hf://datasets/squad"
    assert parse_hub_uri("hf://datasets/o/n").base == "hf://datasets/o/n"
    assert parse_hub_uri("hf://datasets/o/n/").kind == "dataset"
