"""One store for all schemes; each opened when it is needed."""

import pytest

from tunesmith_api.keys import Reason
from tunesmith_api.plan import StoragePlan
from tunesmith_store import router
from tunesmith_store.errors import UserError
from tunesmith_store.hub import HubStore
from tunesmith_store.store import S3Store
from tunesmith_store.volumes import VolumeStore


def test_a_uri_goes_to_the_store_of_its_scheme():
    store = router.open_store(StoragePlan(), "http://mirror")
    assert isinstance(store.at("s3://b/x"), S3Store)
    assert isinstance(store.at("pvc://c/x"), VolumeStore)
    assert isinstance(store.at("hf://o/n"), HubStore)
    assert store.at("s3://b/x") is store.at("s3://other/y")


def test_an_unknown_scheme_names_the_known_ones():
    with pytest.raises(UserError, match=r"gs://b/x: it must begin with one of s3://, pvc://, hf://") as caught:
        router.open_store(StoragePlan()).get_bytes("gs://b/x")
    assert caught.value.reason is Reason.INVALID_SPEC


def test_every_call_is_passed_on(tmp_path):
    (tmp_path / "b").mkdir()
    opened = []
    store = router.RoutedStore({"x": lambda: opened.append(1) or VolumeStore(tmp_path)})
    assert opened == []
    store.put_bytes("x://b/one", b"1234")
    store.upload(tmp_path / "b" / "one", "x://b/two")
    assert store.get_range("x://b/two", 1, 2) == b"23"
    store.download("x://b/two", tmp_path / "three")
    assert store.head("x://b/two").size == 4
    store.delete("x://b/one")
    assert [info.uri for info in store.list("x://b")] == ["x://b/two"]
    assert store.get_bytes("x://b/two") == (tmp_path / "three").read_bytes() == b"1234"
    assert opened == [1]
