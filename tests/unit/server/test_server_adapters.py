"""Adapters by their files alone: what is read of them, what is refused and why, and how requests are put to the engine."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tunesmith_api import keys
from tunesmith_api.adapters import AdapterPlan, AdapterSet, ServedAdapter
from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.keys import Reason
from tunesmith_server.adapters.config import CONFIG, WEIGHTS, pairs_of, scale_of
from tunesmith_server.adapters.make import _fetched
from tunesmith_server.adapters.served import wanted_adapters
from tunesmith_server.front.completions import completion_call
from tunesmith_server.front.fields import Limits
from tunesmith_store.errors import UserError
from tunesmith_store.files import entries_below
from tunesmith_store.volumes import VolumeStore

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "bias": "none"}


def adapter(folder, config=GOOD, **tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    weights = tensors or {
        f"{MODULE}.lora_A.weight": np.ones((2, 6), np.float32),
        f"{MODULE}.lora_B.weight": np.ones((4, 2), np.float32),
    }
    save_file(weights, folder / WEIGHTS)
    return folder


def test_layers_ranks_and_scales_are_read(tmp_path):
    (pair,) = pairs_of(adapter(tmp_path))
    assert (pair.module, pair.rank, pair.inputs, pair.outputs) == ("model.layers.0.self_attn.q_proj", 2, 6, 4)
    assert pair.scale == 4


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 16}}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 16}}, 2.0),
    ],
)
def test_each_layer_has_pefts_own_scale(config, scale):
    assert scale_of("model.layers.0.self_attn.q_proj", 4, config) == scale


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"trainable_token_indices": [1]}, "embeddings"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"fan_in_fan_out": True}, "transposed"),
    ],
)
def test_what_an_engine_cannot_apply_is_refused_in_words(changes, word, tmp_path):
    with pytest.raises(UserError, match=word) as caught:
        pairs_of(adapter(tmp_path, GOOD | changes))
    assert caught.value.reason == Reason.ADAPTER_INVALID
    assert "erge it into the model" in caught.value.message


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        ({f"{MODULE}.lora_A.weight": (2, 6)}, "no two matrices"),
        ({f"{MODULE}.lora_A.weight": (2, 6), f"{MODULE}.lora_B.weight": (4, 3)}, "different ranks"),
        ({f"{MODULE}.lora_magnitude_vector.weight": (4,)}, "no part of a LoRA"),
        ({"base_model.model.model.embed_tokens.lora_A.weight": (2, 6), "base_model.model.model.embed_tokens.lora_B.weight": (4, 2)}, "adapts the embeddings"),
    ],
)  # fmt: skip
def test_weights_that_are_no_pairs_are_refused(tensors, word, tmp_path):
    with pytest.raises(UserError, match=word):
        pairs_of(adapter(tmp_path, **{name: np.ones(shape, np.float32) for name, shape in tensors.items()}))


@pytest.fixture
def volumes(tmp_path, monkeypatch):
    monkeypatch.setenv(keys.ENV_VOLUMES, str(tmp_path / "volumes"))
    return tmp_path / "volumes"


def fetch(tmp_path, digest="", bases=("b" * 64,)):
    plan = AdapterPlan(name="a", uri="pvc://claim/a", digest=digest, base_digest="b" * 64)
    return _fetched(VolumeStore(), plan, tmp_path / "fetched", set(bases))


def described(folder, base_digest: str) -> ModelManifest:
    files = entries_below(folder)
    manifest = ModelManifest(
        digest="d" * 64, base_uri="s3://models/base", base_digest=base_digest, created_time="now", files=files
    )
    (folder / keys.MODEL_MANIFEST).write_text(manifest.to_json())
    return manifest


@pytest.mark.parametrize("beside", ["", "adapter"])
def test_the_result_of_a_finetunejob_is_found_with_its_digest(beside, volumes, tmp_path):
    adapter(volumes / "claim/a" / beside)
    described(volumes / "claim/a", "b" * 64)
    assert fetch(tmp_path).digest == "d" * 64
    assert fetch(tmp_path, digest="d" * 64).digest == "d" * 64


def test_one_that_was_trained_on_another_model_is_refused(volumes, tmp_path):
    adapter(volumes / "claim/a")
    described(volumes / "claim/a", "c" * 64)
    with pytest.raises(UserError, match="was trained on s3://models/base") as caught:
        fetch(tmp_path)
    assert caught.value.reason == Reason.ADAPTER_INVALID
    assert fetch(tmp_path, bases=("b" * 64, "c" * 64)).digest == "d" * 64


def test_one_that_is_pinned_is_served_at_that_digest_only(volumes, tmp_path):
    adapter(volumes / "claim/a")
    known = fetch(tmp_path).digest
    assert fetch(tmp_path, digest=known).digest == known
    with pytest.raises(UserError, match="pins it"):
        fetch(tmp_path, digest="e" * 64)


def test_a_folder_without_an_adapter_says_what_is_missing(volumes, tmp_path):
    (volumes / "claim/a").mkdir(parents=True)
    (volumes / "claim/a/README.md").write_text("none")
    with pytest.raises(UserError, match=WEIGHTS):
        fetch(tmp_path)


def test_a_list_that_is_missing_or_of_another_version_says_nothing(tmp_path):
    environment = {keys.ENV_ADAPTERS: str(tmp_path)}
    assert wanted_adapters(environment) is None
    (tmp_path / keys.ADAPTERS_FILE).write_text('{"schemaVersion": 99}')
    assert wanted_adapters(environment) is None
    entry = ServedAdapter(name="a", key="k", uri="s3://models/a", digest="1")
    (tmp_path / keys.ADAPTERS_FILE).write_text(AdapterSet(adapters=(entry,)).to_json())
    assert wanted_adapters(environment) == (entry,)


def test_a_request_names_every_adapter_to_the_engine_whichever_it_wants():
    from tunesmith_server.engines.llama_cpp import _scales

    asked = {name: _scales(["a", "b"], name) for name in ("smol", "a", "b")}
    limits = Limits(("smol", "a", "b"), 64, asked=asked)

    def lora(model: str) -> list[float]:
        (body,) = completion_call({"model": model, "prompt": "x"}, limits).bodies
        return [it["scale"] for it in json.loads(body)["lora"]]

    assert (lora("smol"), lora("a"), lora("b")) == ([0, 0], [1, 0], [0, 1])
    assert _scales([], "smol") == {}
