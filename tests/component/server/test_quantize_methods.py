"""Every method on the real model: llama.cpp loads the file and answers, and equal sources give equal bytes."""

import hashlib
import json
import socket
import urllib.request

import pytest

import assets
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod as Method
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.calibration.importance import importance_of
from tunesmith_server.calibration.texts import Texts
from tunesmith_server.engines.llama_cpp import LlamaEngine
from tunesmith_server.quantizers import quantizer_of
from tunesmith_server.quantizers.base import Options
from tunesmith_server.quantizers.ggml import quantized
from tunesmith_server.quantizers.gguf_files import opened

PLAN = ServingPlan(
    name="smol", namespace="n", uid="u", revision="smol-r1", model_uri="s3://m/m", quantization="None", engine="LlamaCpp",
    context_length=128, parallel_requests=1, artifact_uri="s3://m/m/quantized",
)  # fmt: skip
LARGE = 99_840.0
"""About 1e5, which bfloat16 holds and float16 does not."""


def served(model):
    """A file that is served in this process: returns a function that asks it to go on with a text, or in a chat."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    engine = LlamaEngine(PLAN, model, threads=1, port=port)

    def ask(text: str, *, chat: bool = False, **more) -> dict:
        prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body = {"model": "smol", "max_tokens": 12, "temperature": 0, **prompt, **more}
        request = urllib.request.Request(
            f"{engine.url}/v1/{'chat/completions' if chat else 'completions'}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["choices"][0]

    return ask


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        ("None", 16.1), ("Q8_0", 8.6), ("Q6_K", 8.2), ("Q5_K_M", 6.7), ("Q4_K_M", 6.3), ("Q4_0", 5.5), ("Q3_K_M", 5.6),
        ("Q2_K", 5.2),
    ],
)  # fmt: skip
def test_every_method_is_loaded_and_answers(smollm2, method, bits, tmp_path):
    made = smollm2.make(Method(method), tmp_path)
    path = tmp_path / MODEL_FILE
    assert path.stat().st_size * 8 / made.weights == pytest.approx(bits, abs=0.1)
    assert bool(made.fallbacks) is (method not in {"None", "Q8_0"}), "its 576 columns are no multiple of 256"
    ask = served(path)
    answers = ask("The capital of France is")["text"], ask("What is the capital of France?", chat=True)["message"]
    assert "Paris" in str(answers), "a model of this size, quantized, may miss one of the two"


def test_calibration_rounds_the_real_model_by_what_its_layers_read_and_leaves_alone_what_is_ignored(smollm2, tmp_path):
    said = (("user", "What is the capital of France?"), ("assistant", "The capital of France is Paris."))
    options = Options(("model.layers.0.*",), Texts((said, "Paris is the capital of France. " * 20)))
    made = smollm2.make(Method.Q4_0, tmp_path, options)
    facts = made.calibration
    assert (facts.rows, facts.tensors) == (2, 30 * 7), "all matrices of 30 layers, and not the output layer"
    assert facts.tokens > 150
    assert len(made.ignored) == 7
    assert made.tensor_types["BF16"] == 7
    assert made.tensor_types["Q4_1"] == 2, "layers 1 and 2; layer 0 is ignored"
    matrix = importance_of(assets.smollm2(), options.texts, tmp_path / "again.safetensors", 2)
    assert matrix.digest == facts.matrix_digest, "whatever the number of threads"
    exact = {it.name: it for it in smollm2._exact[1].tensors}
    read = {it.name: it for it in opened(tmp_path / MODEL_FILE).tensors}
    name, module = "blk.5.ffn_up.weight", "model.layers.5.mlp.up_proj"
    values = (exact[name].data.reshape(-1, 576, 2).view("<u2")[..., 0].astype("<u4") << 16).view("<f4")
    expected = quantized(values, int(read[name].tensor_type), matrix.columns[module])
    assert read[name].data.tobytes() == expected.tobytes()
    assert expected.tobytes() != quantized(values, int(read[name].tensor_type)).tobytes()
    assert "Paris" in served(tmp_path / MODEL_FILE)("What is the capital of France?", chat=True)["message"]["content"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model of few random weights: one of them is large, and four tokens end an answer."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.smollm2())
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = 1e5
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = [
        tokenizer.convert_tokens_to_ids(token)
        for token in ("<|im_end|>", "<|endoftext|>", "<gh_stars>", "<jupyter_text>")
    ]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    quantizer = quantizer_of(EngineType.LLAMA_CPP, Method.NONE)(folder, folder / "scratch", 1)
    return folder, quantizer, ends, tokenizer.convert_tokens_to_ids("<issue_start>")


def test_weights_beyond_float16_stay_as_they_are_and_every_end_token_ends(small, tmp_path):
    _, quantizer, ends, other = small
    quantizer.make(Method.NONE, tmp_path)
    (tensor,) = (it for it in opened(tmp_path / MODEL_FILE).tensors if it.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type.name == "BF16"
    weights = (tensor.data.view("<u2").astype("<u4") << 16).view("<f4")
    assert weights.max() == LARGE
    ask = served(tmp_path / MODEL_FILE)
    assert [ask("a", logit_bias={str(token): 100})["finish_reason"] for token in (*ends, other)] == [
        "stop", "stop", "stop", "stop", "length",
    ]  # fmt: skip


def test_quantizing_twice_gives_the_same_bytes(smollm2, tmp_path):
    contents = set()
    for threads in (1, 3):
        smollm2.threads = threads
        smollm2.make(Method.Q6_K, tmp_path)
        contents.add(hashlib.sha256((tmp_path / MODEL_FILE).read_bytes()).digest())
    assert len(contents) == 1
