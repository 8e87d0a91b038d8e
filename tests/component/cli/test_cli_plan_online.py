"""`tunesmith plan --online`: a model's sizes from a real S3 store, where only headers can be read."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith_api.keys import ExitCode

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "manifests/samples/finetunejob.yaml"
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000,
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {"model.embed_tokens.weight": [1000, 64], "model.layers.0.self_attn.q_proj.weight": [64, 64]}


def write_model(folder):
    """A model's config.json, and of its weights what the file begins with: there are no numbers that could be read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header = json.dumps(
        {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in SHAPES.items()}
    )
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return folder


@pytest.fixture
def plan(object_store, bucket):
    def run(*arguments):
        where = (
            "--set",
            f"spec.model.uri={bucket}/model",
            "--set",
            f"spec.storage.endpointURL={object_store.endpoint_url}",
        )
        command = [
            sys.executable,
            "-m",
            "tunesmith_cli",
            "plan",
            "-f",
            str(SAMPLE),
            *where,
            "--online",
            "-o",
            "json",
            *arguments,
        ]
        environment = {**os.environ, **object_store.environment()}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)

    return run


def test_sizes_are_read_from_the_store_without_the_weights(plan, object_store, bucket, tmp_path):
    object_store.put_folder(write_model(tmp_path / "model"), f"{bucket}/model")
    done = plan()
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert (model["parameters"], model["fromHeaders"]) == (1000 * 64 + 64 * 64, True)


def test_what_is_wrong_with_a_model_is_said(plan, object_store, bucket, tmp_path):
    done = plan()
    assert done.returncode == ExitCode.INVALID_INPUT
    assert done.stderr.startswith("error: spec.model.uri: no files below")
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no header")
    object_store.put_folder(folder, f"{bucket}/model")
    done = plan()
    assert done.returncode == ExitCode.INVALID_INPUT
    assert "model.safetensors: it is no safetensors file" in done.stderr
    assert done.stdout == ""
