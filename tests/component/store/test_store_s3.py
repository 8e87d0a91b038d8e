"""The S3 client against a real store: large files in parts, and every refusal in words that help."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import StoragePlan
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.files import copy_hashed, fetch_model
from tunesmith_store.store import NotFound, S3Store

MB = 1 << 20


@pytest.fixture
def connect(object_store, monkeypatch):
    def make(credentials=object_store.credentials, endpoint=object_store.endpoint_url):
        for name, value in credentials.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
        return S3Store(StoragePlan(endpoint_url=endpoint))

    return make


@pytest.fixture
def large(tmp_path):
    """70 MB, which travel in three parts, the last of which is not full."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(70 * MB + 5))
    return path


def test_a_large_file_survives_the_way_up_and_down(connect, bucket, large, tmp_path, object_store):
    store = connect()
    store.upload(large, f"{bucket}/folder/large")
    assert store.head(f"{bucket}/folder/large").size == 70 * MB + 5
    assert store.head(f"{bucket}/folder/large").tag.endswith("-3"), "it went up in parts"
    store.download(f"{bucket}/folder/large", tmp_path / "deep" / "back")
    assert (
        hashlib.sha256((tmp_path / "deep" / "back").read_bytes()).digest()
        == hashlib.sha256(large.read_bytes()).digest()
    )


def test_a_file_is_hashed_on_its_way_and_a_broken_connection_is_no_end(connect, bucket, large, tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith_store.files.RETRY_PAUSES", (0, 0))
    store, breaks = connect(), [1, 0, 2, 0, 0, 0, 0]
    store.upload(large, f"{bucket}/large")
    whole = store.get_range

    def unsteady(uri, start, size):
        if breaks[start >> 24]:
            breaks[start >> 24] -= 1
            raise Retryable("the connection broke")
        return whole(uri, start, size)

    monkeypatch.setattr(store, "get_range", unsteady)
    size = large.stat().st_size
    expected = hashlib.sha256(large.read_bytes()).hexdigest()
    assert copy_hashed(store, f"{bucket}/large", size, tmp_path / "new" / "back") == expected
    assert (tmp_path / "new" / "back").read_bytes() == large.read_bytes()
    breaks[3] = 3
    with pytest.raises(Retryable, match="the connection broke"):
        copy_hashed(store, f"{bucket}/large", size, tmp_path / "back")
    with pytest.raises(NotFound):
        copy_hashed(store, f"{bucket}/nothing", size, tmp_path / "back")
    # less than there should be is found out by its digest
    breaks[3] = 0
    large.write_bytes(large.read_bytes()[: 32 * MB])
    store.upload(large, f"{bucket}/large")
    assert copy_hashed(store, f"{bucket}/large", size, tmp_path / "back") != expected
    assert (tmp_path / "back").stat().st_size == 32 * MB


def test_several_threads_share_one_store(connect, bucket, tmp_path):
    store = connect()

    def round_trip(number):
        path = tmp_path / f"{number}"
        path.write_bytes(bytes([number]) * MB)
        store.upload(path, f"{bucket}/{number}")
        store.download(f"{bucket}/{number}", tmp_path / f"back-{number}")
        return (tmp_path / f"back-{number}").read_bytes() == path.read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(16)))
    assert len(store.list(bucket)) == 16


def test_small_objects_appear_whole_and_go(connect, bucket):
    store = connect()
    store.put_bytes(f"{bucket}/a/b", b"12345")
    assert store.get_bytes(f"{bucket}/a/b") == b"12345"
    assert store.get_range(f"{bucket}/a/b", 3, 9) == b"45"
    assert [info.uri for info in store.list(f"{bucket}/a")] == [f"{bucket}/a/b"]
    assert store.list(f"{bucket}/another") == []
    store.delete(f"{bucket}/a/b")
    store.delete(f"{bucket}/a/b")
    assert store.list(bucket) == []


def test_markers_of_folders_are_no_files(connect, bucket, object_store, tmp_path):
    store, client, name = connect(), object_store.client(), bucket.removeprefix("s3://")
    for key in ("m/", "m/sub/", "m/other_$folder$"):
        client.put_object(Bucket=name, Key=key, Body=b"")
    client.put_object(Bucket=name, Key="marked", Body=b"", ContentType="application/x-directory; charset=UTF-8")
    store.put_bytes(f"{bucket}/m/config.json", b"{}")
    assert [info.uri for info in store.list(f"{bucket}/m")] == [f"{bucket}/m/config.json"]
    folder = fetch_model(store, f"{bucket}/m", tmp_path / "model")
    assert {path.name for path in folder.iterdir() if path.name[0] != "."} == {"config.json"}
    with pytest.raises(NotFound):
        store.head(f"{bucket}/marked")
    assert store.list(f"{bucket}/m/other") == []


def test_keys_may_have_spaces_umlauts_and_marks(connect, bucket, tmp_path):
    store, folder = connect(), f"{bucket}/Größe (neu)/50 % #1?+&"
    store.put_bytes(f"{folder}/config.json", b"{}")
    assert [info.uri for info in store.list(folder)] == [f"{folder}/config.json"]
    store.download(f"{folder}/config.json", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == store.get_range(f"{folder}/config.json", 0, 2) == b"{}"


@pytest.mark.parametrize("ask", ["head", "get_bytes", "download"])
def test_what_is_not_there_is_not_found(connect, bucket, tmp_path, ask):
    arguments = (tmp_path / "x",) if ask == "download" else ()
    with pytest.raises(NotFound, match="nowhere"):
        getattr(connect(), ask)(f"{bucket}/nowhere", *arguments)


@pytest.mark.parametrize("size", [10, 70 * MB])
def test_a_refused_upload_names_the_secret(connect, bucket, object_store, tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with pytest.raises(UserError, match=r"spec\.storage\.secretRef") as caught:
        connect(object_store.read_only).upload(path, f"{bucket}/file")
    assert (caught.value.reason, caught.value.exit_code) == (Reason.STORAGE_UNWRITABLE, ExitCode.STORAGE_DENIED)


def test_a_missing_bucket_is_named(connect, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"1")
    with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist"):
        connect().upload(path, "s3://no-such-bucket/file")


def test_a_store_that_is_not_there_is_worth_another_try(connect, tmp_path):
    with pytest.raises(Retryable, match=r"spec\.storage\.endpointURL") as caught:
        connect(endpoint="http://127.0.0.1:9").get_bytes("s3://b/x")
    assert caught.value.reason is Reason.STORAGE_UNREACHABLE
    assert "http://127.0.0.1:9" in caught.value.message
