"""Mounted claims as a store: whole files or none, errors that say what to do."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import UserError
from tunesmith_store.store import NotFound
from tunesmith_store.volumes import PART, VolumeStore, loadable, volumes_root


@pytest.fixture
def root(tmp_path):
    (tmp_path / "volumes" / "data").mkdir(parents=True)
    return tmp_path / "volumes"


@pytest.fixture
def store(root):
    return VolumeStore(root)


def test_what_is_written_is_read_and_listed_below_its_folder_only(store, tmp_path):
    store.put_bytes("pvc://data/a/x.txt", b"one")
    store.put_bytes("pvc://data/a/sub/y.txt", b"two")
    store.put_bytes("pvc://data/ab.txt", b"three")
    assert [info.uri for info in store.list("pvc://data/a")] == ["pvc://data/a/sub/y.txt", "pvc://data/a/x.txt"]
    assert len(store.list("pvc://data")) == 3
    assert store.list("pvc://data/nothing") == store.list("pvc://data/ab.txt") == []
    assert store.get_bytes("pvc://data/a/x.txt") == b"one"
    assert store.get_range("pvc://data/ab.txt", 1, 3) == b"hre"
    assert store.head("pvc://data/a/x.txt").size == 3
    store.download("pvc://data/a/x.txt", tmp_path / "deep" / "x")
    assert (tmp_path / "deep" / "x").read_bytes() == b"one"
    store.upload(tmp_path / "deep" / "x", "pvc://data/b")
    assert store.get_bytes("pvc://data/b") == b"one"


def test_a_tag_changes_with_the_content(store):
    store.put_bytes("pvc://data/x", b"one")
    before = store.head("pvc://data/x").tag
    os.utime(store._path("pvc://data/x"), ns=(1, 1))
    assert store.head("pvc://data/x").tag != before


@pytest.mark.parametrize("uri", ["pvc://data/none", "pvc://data/folder", "pvc://data/folder/x/y"])
def test_what_is_no_file_is_not_found(store, uri):
    store.put_bytes("pvc://data/folder/x", b"")
    for ask in (store.head, store.get_bytes, lambda uri: store.get_range(uri, 0, 1)):
        with pytest.raises(NotFound):
            ask(uri)


def test_a_deleted_file_takes_its_empty_folders_along_but_nobody_elses(store, root):
    store.put_bytes("pvc://data/a/b/x", b"")
    store.put_bytes("pvc://data/a/y", b"")
    store.delete("pvc://data/a/b/x")
    store.delete("pvc://data/a/b/x")
    assert not (root / "data" / "a" / "b").exists()
    store.delete("pvc://data/a/y")
    assert list((root / "data").iterdir()) == []
    assert (root / "data").exists()


def test_a_file_that_is_being_written_is_not_there_yet(store, root):
    with store._written("pvc://data/x") as part:
        part.write_bytes(b"half")
        assert store.list("pvc://data") == []
        with pytest.raises(NotFound):
            store.head("pvc://data/x")
    assert store.get_bytes("pvc://data/x") == b"half"
    with pytest.raises(RuntimeError), store._written("pvc://data/y"):
        raise RuntimeError
    assert [path.name for path in (root / "data").iterdir()] == ["x"]
    assert not any(path.name.startswith(PART) for path in root.rglob("*"))


def test_writers_and_deleters_of_one_folder_do_not_fall_over_each_other(store):
    failed = []

    def work(name):
        try:
            for _ in range(50):
                store.put_bytes(f"pvc://data/same/{name}", b"x")
                store.delete(f"pvc://data/same/{name}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_claim_that_is_not_mounted_is_never_written_to_the_pods_own_disk(store, root):
    for ask in (store.list, store.head, lambda uri: store.put_bytes(uri, b"")):
        with pytest.raises(UserError, match="no volume 'other'") as caught:
            ask("pvc://other/x")
        assert caught.value.exit_code is ExitCode.STORAGE_DENIED
    assert not (root / "other").exists()


def test_a_path_can_not_leave_the_volume(store):
    with pytest.raises(UserError, match=r"'\.\.'"):
        store.get_bytes("pvc://data/../../etc/passwd")


def test_a_claim_may_be_a_link_to_a_folder_elsewhere(store, root, tmp_path):
    (tmp_path / "home").mkdir()
    (root / "local").symlink_to("/")
    uri = f"pvc://local{tmp_path}/home/x"
    store.put_bytes(uri, b"here")
    assert (tmp_path / "home" / "x").read_bytes() == b"here"
    assert [info.uri for info in store.list(f"pvc://local{tmp_path}/home")] == [uri]


def test_a_file_where_a_folder_has_to_be_is_named(store):
    store.put_bytes("pvc://data/x", b"")
    with pytest.raises(UserError, match="a file stands where a folder has to be") as caught:
        store.put_bytes("pvc://data/x/y", b"")
    assert caught.value.reason is Reason.STORAGE_UNWRITABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: takes rights away from another user")
def test_missing_rights_are_the_users_to_correct():
    program = (
        "import os, sys; from pathlib import Path; from tunesmith_store.volumes import VolumeStore\n"
        "from tunesmith_store.errors import UserError\n"
        "os.setuid(65534)\n"
        "try: VolumeStore(Path(sys.argv[1])).put_bytes('pvc://data/x', b'')\n"
        "except UserError as error: print(error.reason, int(error.exit_code), error.message)\n"
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "data").mkdir(mode=0o755)
        done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("StorageUnwritable 41 can't write pvc://data/x: Permission denied"), done
    assert "user 65534" in done.stdout


def test_the_folder_of_volumes_comes_from_the_environment(monkeypatch):
    assert str(volumes_root()) == keys.VOLUMES_DIRECTORY
    monkeypatch.setenv(keys.ENV_VOLUMES, "/somewhere")
    assert str(volumes_root()) == "/somewhere"


@pytest.mark.parametrize(
    ("uri", "name"), [("hf://owner/base", "owner/base"), ("s3://bucket/base", None), ("pvc://claim/base", None)]
)
def test_a_model_is_named_as_loaders_take_it_or_has_to_be_copied_first(uri, name, tmp_path, monkeypatch):
    (tmp_path / "claim" / "base").mkdir(parents=True)
    monkeypatch.setenv(keys.ENV_VOLUMES, str(tmp_path))
    assert loadable(uri) == name
