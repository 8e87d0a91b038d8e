"""An object read like a file, a block at a time."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith_store.ranged import open_object
from tunesmith_store.store import NotFound
from tunesmith_store.volumes import VolumeStore

CONTENT = bytes(range(256)) * 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    (root / "b").mkdir()
    (root / "b" / "x").write_bytes(CONTENT)
    (root / "b" / "empty").write_bytes(b"")
    return VolumeStore(root)


moves = st.lists(
    st.tuples(
        st.sampled_from(["read", "set", "current", "end", "line"]), st.integers(min_value=0, max_value=len(CONTENT) + 9)
    ),
    max_size=12,
)


@settings(deadline=None)
@given(block=st.integers(min_value=1, max_value=2000), moves=moves)
def test_any_reading_and_seeking_gives_what_a_file_gives(store, block, moves):
    expected = io.BytesIO(CONTENT)
    with open_object(store, "pvc://b/x", block) as file:
        for what, number in moves:
            if what == "read":
                assert file.read(number) == expected.read(number)
            elif what == "line":
                assert file.readline() == expected.readline()
            elif what == "set":
                assert file.seek(number) == expected.seek(number)
            elif what == "current":
                assert file.seek(number, io.SEEK_CUR) == expected.seek(number, io.SEEK_CUR)
            else:
                number = min(number, len(CONTENT))
                assert file.seek(-number, io.SEEK_END) == expected.seek(-number, io.SEEK_END)
        assert file.read() == expected.read()


def test_no_more_is_asked_for_than_the_block_that_is_read(store, monkeypatch):
    asked = []
    original = store.get_range
    monkeypatch.setattr(store, "get_range", lambda *call: asked.append(call[1:]) or original(*call))
    with open_object(store, "pvc://b/x", 100) as file:
        file.read(10)
    assert asked == [(0, 100)]


def test_an_empty_object_and_none(store):
    with open_object(store, "pvc://b/empty") as file:
        assert file.read() == b""
    with pytest.raises(NotFound):
        open_object(store, "pvc://b/none")
