"""Paths where URIs stand: what they become, that the trainer's store finds the files, and what is refused."""

from pathlib import Path

import pytest

from support.make import merged
from tunesmith_cli.errors import Refused
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_cli.local_paths import LocalPaths
from tunesmith_cli.refusals import refusals
from tunesmith_store.volumes import VolumeStore

SAMPLE = Path(__file__).resolve().parents[3] / "manifests/samples/finetunejob.yaml"


def manifest(**uris):
    fields = {"model": "s3://m/x", "train": "s3://d/t", "checkpoint": "s3://c/x", "output": "s3://o/x", **uris}
    return {
        "spec": {
            "model": {"uri": fields["model"]}, "dataset": {"train": {"uri": fields["train"]}},
            "checkpoint": {"uri": fields["checkpoint"]}, "output": {"uri": fields["output"]},
        }
    }  # fmt: skip


def localized(base, paths=None, **uris):
    document, paths = manifest(**uris), paths or LocalPaths()
    paths.localize(document, Path(base))
    return document["spec"], paths


@pytest.mark.parametrize(
    ("written", "uri"),
    [
        ("./data/train.jsonl", "pvc://local/home/me/jobs/data/train.jsonl"),
        ("data/train.jsonl", "pvc://local/home/me/jobs/data/train.jsonl"),
        ("../data", "pvc://local/home/me/data"),
        ("/data/./x/../train.jsonl", "pvc://local/data/train.jsonl"),
        ("file:///data/train.jsonl", "pvc://local/data/train.jsonl"),
        ("s3://data/train.jsonl", "s3://data/train.jsonl"),
        ("hf://owner/name", "hf://owner/name"),
        ("s3:/data/typo", "s3:/data/typo"),
    ],
)
def test_a_path_becomes_a_uri_and_a_uri_stays_one(written, uri):
    spec, _ = localized("/home/me/jobs", train=written)
    assert spec["dataset"]["train"]["uri"] == uri


def test_the_home_folder_is_known(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    spec, _ = localized("/", model="~/models/base")
    assert spec["model"]["uri"] == "pvc://local/home/me/models/base"


@pytest.mark.parametrize("folder", ["plain", "with space", "ünïcode", "quote'and=plus+", "percent%20", "a#b", "-dash"])
def test_the_trainers_store_reads_and_writes_there_whatever_the_folder_is_called(tmp_path, folder):
    home = tmp_path / folder
    (home / "data").mkdir(parents=True)
    (home / "data" / "train.jsonl").write_text("rows")
    spec, paths = localized(home, train="./data/train.jsonl", output="./out", model="./data")
    paths.link(tmp_path / "volumes")
    store = VolumeStore(tmp_path / "volumes")
    assert store.get_bytes(spec["dataset"]["train"]["uri"]) == b"rows"
    assert [Path(info.uri).name for info in store.list(spec["model"]["uri"])] == ["train.jsonl"]
    store.put_bytes(f"{spec['output']['uri']}/config.json", b"{}")
    assert (home / "out" / "config.json").read_bytes() == b"{}"
    assert paths.path_of(spec["output"]["uri"]) == home / "out"
    assert paths.shown(f"saved to {spec['output']['uri']}/x.") == f"saved to {home}/out/x."
    places = {"dataset": {"train": spec["dataset"]["train"]}, "output": spec["output"]}
    assert refusals(merged(parsed(SAMPLE.read_text())[0], {"spec": places})) == []


def test_the_same_path_gives_the_same_uri_in_the_next_run(tmp_path):
    first, _ = localized(tmp_path, output="./my models/out")
    second, _ = localized(tmp_path / "elsewhere", output="../my models/out")
    assert first["output"] == second["output"]


def test_a_folder_to_write_to_may_have_any_name_and_is_made(tmp_path):
    spec, paths = localized(tmp_path, output="./tuned model")
    paths.link(tmp_path / "volumes")
    VolumeStore(tmp_path / "volumes").put_bytes(f"{spec['output']['uri']}/a", b"1")
    assert (tmp_path / "tuned model" / "a").exists()


def test_a_name_with_a_line_break_is_refused_with_the_way_out():
    with pytest.raises(Refused, match=r"spec\.dataset\.train\.uri: .*my\\ndata\.jsonl.*rename it"):
        localized("/", train="my\ndata.jsonl")


def test_a_path_that_is_too_long_for_a_uri_is_refused():
    with pytest.raises(Refused, match=r"spec\.output\.uri: .* longer than 512"):
        localized("/", output="x" * 600)


def test_a_claim_of_the_cluster_needs_a_folder_here(tmp_path):
    spec, paths = localized(tmp_path, model="pvc://models/base")
    (line,) = paths.faults({"spec": spec})
    assert line == (
        "spec.model.uri: pvc://models/base is in a cluster's volume; where is that here? --volume models=FOLDER"
    )
    (tmp_path / "m" / "base").mkdir(parents=True)
    spec, paths = localized(tmp_path, LocalPaths([f"models={tmp_path / 'm'}"]), model="pvc://models/base")
    assert list(paths.faults({"spec": spec})) == []
    paths.link(tmp_path / "volumes")
    assert (tmp_path / "volumes" / "models").resolve() == tmp_path / "m"
    assert paths.shown("pvc://models/base") == "pvc://models/base", "as the user calls it"


@pytest.mark.parametrize("volume", ["models", "Models=/", "local=/", "a b=/", "models=/nowhere/at/all"])
def test_a_volume_that_is_none_is_refused(volume):
    with pytest.raises(Refused, match=r"--volume"):
        LocalPaths([volume])


def test_longer_claims_are_not_taken_for_the_machines_own():
    assert LocalPaths().shown("pvc://local/a pvc://local-b/c pvc://locals/d") == "/a pvc://local-b/c pvc://locals/d"
