"""A model's folder: what of it is fetched, and what is refused."""

import json
import struct

import pytest

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest, files_digest
from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_store.files import entry_of_bytes, fetch_model
from tunesmith_store.volumes import VolumeStore
from tunesmith_store.weights import stored_tensors

URI = "pvc://models/m"
SHARDS = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()}
CONFIG = {"config.json": b"{}", "tokenizer.json": b"{}"}


@pytest.fixture
def fetched(tmp_path):
    (tmp_path / "volumes/models").mkdir(parents=True)
    store = VolumeStore(tmp_path / "volumes")

    def fetch(files: dict[str, bytes], **options) -> set[str]:
        for name, data in files.items():
            store.put_bytes(f"{URI}/{name}", data)
        folder = fetch_model(store, URI, tmp_path / "fetched", **options)
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".complete"}

    return fetch


def test_only_the_weights_that_the_index_names_are_fetched(fetched):
    twice = {"consolidated.safetensors": b"12", "original/consolidated.00.pth": b"12", "m-q8_0.gguf": b"12"}
    assert fetched(CONFIG | SHARDS | INDEX | twice) == {*CONFIG, *SHARDS, *INDEX}


def test_one_file_of_weights_is_enough(fetched):
    twice = {"consolidated.safetensors": b"1", "pytorch_model.bin": b"1", "model_fp16.safetensors": b"1"}
    assert fetched(CONFIG | {"model.safetensors": b"1"} | twice) == {*CONFIG, "model.safetensors"}


def test_code_is_never_fetched(fetched):
    assert fetched(CONFIG | {"model.safetensors": b"1", "modeling_x.py": b"1"}) == {*CONFIG, "model.safetensors"}


@pytest.mark.parametrize("index", [b"{", b"[]", b'{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(fetched, index):
    with pytest.raises(UserError, match="is no index of weights"):
        fetched(CONFIG | SHARDS | {"model.safetensors.index.json": index})


def test_shards_that_are_missing_are_named(fetched):
    name = next(iter(SHARDS))
    with pytest.raises(UserError, match=f"names {name}, not there"):
        fetched(CONFIG | {next(reversed(SHARDS)): b"2"} | INDEX)


def test_an_adapter_beside_the_model_is_refused(fetched):
    adapter = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"1"}
    with pytest.raises(UserError, match=r"adapter_config\.json and adapter_model\.safetensors lie beside") as caught:
        fetched(CONFIG | {"model.safetensors": b"1"} | adapter, field="spec.source.uri")
    assert caught.value.reason is Reason.MODEL_INVALID
    assert caught.value.message.startswith("spec.source.uri pvc://models/m")


def test_what_an_earlier_run_left_beside_a_model_of_ours_counts_for_nothing(fetched):
    model = CONFIG | {"model.safetensors": b"new"}
    entries = tuple(entry_of_bytes(name, data) for name, data in model.items())
    manifest = ModelManifest(digest=files_digest(entries), base_uri="x", created_time="now", files=entries)
    left = SHARDS | INDEX | {"adapter_config.json": b"{}", keys.MODEL_MANIFEST: manifest.to_json().encode()}
    assert fetched(model | left) == set(model)


def test_headers_tell_name_format_and_shape(tmp_path):
    header = {"__metadata__": {}, "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    ((tensor),) = stored_tensors(tmp_path)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("w", "BF16", (2, 3))
