"""A classifier from its folder to its answers: the quantize Job, the artefact, the server, in both number formats."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import assets
from assets import tiny
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import EvaluationPlan, ServingPlan, StoragePlan
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import fetch_artifact
from tunesmith_server.builder import ArtifactBuilder
from tunesmith_server.engines.transformers import TransformersEngine
from tunesmith_server.quantize import evaluate, quantize
from tunesmith_store.errors import UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_store.weights import stored_tensors

TEXTS = ["good", "a very bad film, and far too long", "neither one thing nor the other"]
NAMES = {0: "negative", 1: "neutral", 2: "positive"}


def tiny_bert(folder: Path, dtype=torch.float32) -> Path:
    tokenizer = tiny.byte_tokenizer()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id, id2label=NAMES,
        label2id={name: number for number, name in NAMES.items()},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits_of(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return np.array([model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in TEXTS])


def post(base, path, body):
    request = urllib.request.Request(base + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def scores(answers):
    return np.array([[{it["label"]: it["score"] for it in one}[name] for name in NAMES.values()] for one in answers])


def plan(**changes) -> ServingPlan:
    values = {
        "name": "m", "namespace": "n", "uid": "u", "revision": "m-r1", "model_uri": "pvc://models/m", "quantization": "None",
        "engine": "Transformers", "context_length": 256, "parallel_requests": 2, "artifact_uri": "pvc://models/m/quantized",
    }  # fmt: skip
    return ServingPlan(**{**values, **changes})


def test_a_classifier_goes_from_its_folder_to_its_answers(object_store, bucket, tmp_path):
    folder = tiny_bert(tmp_path / "bert", torch.bfloat16)
    uri = f"{bucket}/bert"
    object_store.put_folder(folder, uri)
    storage = StoragePlan(endpoint_url=object_store.endpoint_url)
    path = tmp_path / "plan.json"
    path.write_text(plan(model_uri=uri, artifact_uri=f"{uri}/quantized", storage=storage).to_json())
    environment = {
        **os.environ, **object_store.credentials.environment(), "PYTHONPATH": os.pathsep.join(sys.path), keys.ENV_PLAN: str(path),
        keys.ENV_SCRATCH: str(tmp_path / "scratch"), keys.ENV_TERMINATION_LOG: str(tmp_path / "termination"), keys.ENV_CPU_LIMIT: "1000",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith_server.quantize"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    report = TerminationReport.from_json((tmp_path / "termination").read_text())
    assert (done.returncode, report.reason) == (0, Reason.QUANTIZED), done.stdout
    assert report.model.bits_per_weight == pytest.approx(16, rel=0.3), "bf16 stays bf16; the tokenizer is in the sum"
    environment |= {keys.ENV_SCRATCH: str(tmp_path / "server")}
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen([sys.executable, "-m", "tunesmith_server"], env=environment, stdout=log, stderr=log)
    try:
        wait_ready(server, log)
        base = f"http://127.0.0.1:{keys.PORT_SERVER}"
        found = post(base, "/classify", {"model": "m", "inputs": TEXTS, "raw_scores": True})
        np.testing.assert_allclose(scores(found), logits_of(folder), atol=0.05)
    finally:
        server.kill()
        server.wait()


def wait_ready(server, log):
    health = f"http://127.0.0.1:{keys.PORT_HEALTH}{keys.PATH_HEALTH}"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        log.seek(0)
        assert server.poll() is None, log.read()
        try:
            if urllib.request.urlopen(health, timeout=2).status == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("not ready")


@pytest.fixture
def volumes(tmp_path):
    (tmp_path / "volumes/models").mkdir(parents=True)
    return VolumeStore(tmp_path / "volumes")


def quantized(asked, store, scratch):
    return quantize(asked, store, ArtifactBuilder(asked, store, scratch))


def put(store, folder, uri):
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload(path, f"{uri}/{path.relative_to(folder)}")


def serve(folder, **changes):
    return TransformersEngine(plan(**changes), folder, threads=1, host="127.0.0.1", port=0)


def test_eight_bits_keep_a_classifiers_answers_and_come_out_the_same_each_time(volumes, tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    put(volumes, folder, "pvc://models/m")
    first = plan(quantization="Int8")
    made = quantized(first, volumes, tmp_path / "one")
    again = quantized(
        first.model_copy(update={"artifact_uri": "pvc://models/other", "revision": "m-r2"}), volumes, tmp_path / "two"
    )
    assert made.digest == again.digest
    assert "model.onnx" in {entry.path for entry in made.files}
    assert made.tensor_types["INT8"] >= 11
    fetched = fetch_artifact(volumes, first, tmp_path / "fetched")
    answers = [
        scores(post(serve(it).url, "/classify", {"inputs": TEXTS, "raw_scores": True}))
        for it in (fetched, tmp_path / "one/artifacts/Int8")
    ]
    np.testing.assert_array_equal(answers[0], answers[1])
    expected = logits_of(folder)
    assert (answers[0].argmax(1) == expected.argmax(1)).all()
    np.testing.assert_allclose(answers[0], expected, atol=0.1 * np.abs(expected).max())


def test_eight_bits_keep_an_encoders_vectors(volumes, tmp_path):
    put(volumes, assets.minilm(), "pvc://models/m")
    made = quantized(plan(quantization="Int8"), volumes, tmp_path / "one")
    assert made.bits_per_weight < 13
    exact, small = (serve(it) for it in (assets.minilm(), tmp_path / "one/artifacts/Int8"))
    vectors = [
        np.array([it["embedding"] for it in post(engine.url, "/v1/embeddings", {"input": TEXTS})["data"]])
        for engine in (exact, small)
    ]
    cosines = (vectors[0] * vectors[1]).sum(1)
    assert cosines.mean() > 0.99
    assert cosines.min() > 0.985


@pytest.mark.parametrize("method", ["Int8", "Int8Dynamic", "NF4"])
def test_a_language_model_in_fewer_bits_comes_out_the_same_each_time_and_answers_from_its_files(
    method, volumes, tmp_path
):
    put(volumes, tiny.llama(tmp_path / "llama"), "pvc://models/m")
    first = plan(quantization=method)
    made = quantized(first, volumes, tmp_path / "one")
    other = first.model_copy(update={"artifact_uri": "pvc://models/other", "revision": "m-r2"})
    assert quantized(other, volumes, tmp_path / "two").digest == made.digest
    fetched = fetch_artifact(volumes, first, tmp_path / "fetched")
    body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}
    answers = [
        post(serve(it).url, "/v1/completions", body)["choices"][0]["text"]
        for it in (fetched, tmp_path / "two/artifacts" / method)
    ]
    assert answers[0] == answers[1]
    in_memory = in_format(tmp_path / "llama", method)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(fetched, dtype=torch.float32, device_map="cpu")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(in_memory(ids).logits, reloaded(ids).logits)


def in_format(folder, method):
    """The model as its library makes it from the exact weights, never saved."""
    from tunesmith_server.quantizers.torch_files import _CONFIGS

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=_CONFIGS[QuantizationMethod(method)](), dtype=torch.float32, device_map="cpu"
    )


@pytest.mark.parametrize(
    ("engine", "method", "words"),
    [("LlamaCpp", "Q8_0", "set spec.engine.type: Transformers"), ("Transformers", "NF4", "quantization.method: None")],
)
def test_a_model_of_another_kind_is_refused_with_the_setting_that_helps(volumes, tmp_path, engine, method, words):
    put(volumes, assets.minilm(), "pvc://models/m")
    with pytest.raises(UserError, match=words):
        quantized(plan(engine=engine, quantization=method), volumes, tmp_path / "one")


def compared(asked, store, scratch):
    builder = ArtifactBuilder(asked, store, scratch)
    return evaluate(asked, store, builder, quantize(asked, store, builder), scratch)


def test_a_classifier_in_eight_bits_is_compared_with_itself_as_served(volumes, tmp_path):
    folder = tiny_bert(tmp_path / "bert")
    put(volumes, folder, "pvc://models/m")
    logits = logits_of(folder)
    # the first is right by name, the second by number, the third wrong
    labels = [NAMES[int(logits[0].argmax())], int(logits[1].argmax()), NAMES[int(logits[2].argmin())]]
    rows = "".join(json.dumps({"text": text, "label": it}) + "\n" for text, it in zip(TEXTS, labels, strict=True))
    found = compared(plan(quantization="Int8", evaluation=EvaluationPlan(inline=rows)), volumes, tmp_path / "one")
    assert (found.examples, found.metric, found.baseline.accuracy_percent) == (3, "ExactMatch", "66.67")
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    right = [chances[0].max(), chances[1].max(), chances[2].min()]
    assert float(found.baseline.perplexity) == pytest.approx(np.exp(-np.log(right).mean()), rel=0.01)
    assert float(found.quantized.perplexity) == pytest.approx(float(found.baseline.perplexity), rel=0.3)
    assert found.quantized.size_bytes < found.baseline.size_bytes
    assert float(found.quantized.tokens_per_second) > 0
    other = json.dumps({"text": "a", "label": "nobody's"}) + "\n"
    with pytest.raises(UserError, match='has the class "nobody\'s", the model those of'):
        compared(plan(evaluation=EvaluationPlan(inline=other)), volumes, tmp_path / "two")


def test_a_language_model_is_asked_through_the_chat_path_and_how_likely_the_references_are(volumes, tmp_path):
    folder = tiny.llama(tmp_path / "llama", template=tiny.CHATML)
    put(volumes, folder, "pvc://models/m")
    question, answer = {"role": "user", "content": "Yes?"}, {"role": "assistant", "content": "no"}
    asked = plan(evaluation=EvaluationPlan(inline=json.dumps({"messages": [question, answer]}) + "\n"))
    found = compared(asked, volumes, tmp_path / "one")
    assert found.agreement_percent.value == "100.00"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt + "no", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logprobs = model(ids).logits[0, -3:-1].log_softmax(-1)
    loss = -(logprobs[0, ids[0, -2]] + logprobs[1, ids[0, -1]]) / 2
    assert float(found.baseline.perplexity) == pytest.approx(float(loss.exp()), rel=1e-3)


@pytest.mark.parametrize(("method", "dtype"), [("Int8", None), ("NF4", "U8")])
def test_ignored_modules_of_a_language_model_keep_their_format(method, dtype, volumes, tmp_path):
    put(volumes, tiny.llama(tmp_path / "llama"), "pvc://models/m")
    made = quantized(
        plan(quantization=method, ignore=("*.mlp.*", "model.layers.1.self_attn.q_proj")), volumes, tmp_path / "one"
    )
    assert len(made.ignored) == 7
    stored = {it.name: it.dtype for it in stored_tensors(tmp_path / "one/artifacts" / method)}
    kept = [it for it in made.ignored if stored.get(f"{it}.weight") == "F32"]
    assert kept == list(made.ignored)
    assert stored.get("lm_head.weight") == "F32", "left as it is without being named, too"
    assert stored.get("model.layers.0.self_attn.q_proj.weight") == dtype
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "one/artifacts" / method, dtype=torch.float32, device_map="cpu"
    )
    with torch.inference_mode():
        assert torch.isfinite(reloaded(torch.arange(20)[None]).logits).all()


def test_ignored_modules_of_a_classifier_keep_their_format(volumes, tmp_path):
    put(volumes, tiny_bert(tmp_path / "bert"), "pvc://models/m")
    usual = quantized(plan(quantization="Int8"), volumes, tmp_path / "one")
    ignoring = plan(quantization="Int8", ignore=("classifier", "bert.encoder.layer.0.*"), revision="m-r2")
    made = quantized(ignoring, volumes, tmp_path / "two")
    assert made.tensor_types["INT8"] < usual.tensor_types["INT8"] - 5
    with pytest.raises(UserError, match="matches no module of the model"):
        quantized(plan(quantization="Int8", ignore=("lm_head",), revision="m-r3"), volumes, tmp_path / "three")


@pytest.mark.parametrize("folder", [tiny.llava, tiny.smolvlm])
def test_a_model_that_reads_images_is_refused_before_it_would_answer_blind(folder, volumes, tmp_path):
    put(volumes, folder(tmp_path / "model"), "pvc://models/m")
    with pytest.raises(UserError, match="reads images beside text, and no engine serves such a model"):
        quantized(plan(engine="LlamaCpp", quantization="Q8_0"), volumes, tmp_path / "one")
