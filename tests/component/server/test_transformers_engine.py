"""The engine Transformers, with real models, held against transformers and onnxruntime themselves."""

import base64
import concurrent.futures
import json
import shutil
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import transformers

import assets
from assets import tiny
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.transformers import TransformersEngine
from tunesmith_store.errors import UserError

TEXTS = [
    "What a lovely day!",
    "The train is late again, and nobody says why. I have been standing here in the rain for an hour and I am cold.",
    "ok",
    "It is what it is; neither good nor bad, I suppose.",
    "Paris is the capital of France.",
    *(f"Number {number} of many texts that are nearly of the same length." for number in range(12)),
]
NAMES = {0: "negative", 1: "neutral", 2: "positive"}


def plan(**changes) -> ServingPlan:
    values = {
        "name": "m", "namespace": "n", "uid": "u", "revision": "m-r1", "model_uri": "s3://models/m", "quantization": "None",
        "engine": "Transformers", "context_length": 512, "parallel_requests": 4, "artifact_uri": "s3://models/m/quantized/none",
    }  # fmt: skip
    return ServingPlan(**{**values, **changes})


def serve(folder, **changes) -> TransformersEngine:
    engine = TransformersEngine(plan(**changes), folder, threads=1, host="127.0.0.1", port=0)
    assert engine.answers()
    assert engine.is_alive()
    return engine


def post(engine, path, body):
    request = urllib.request.Request(engine.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response), response.headers


def refusal(engine, path, body) -> tuple[int, dict]:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(engine, path, body)
    return caught.value.code, json.load(caught.value)["error"]


def classifier(folder, head="SequenceClassification", names=NAMES, **config):
    """MiniLM with a random head that tells the texts apart."""
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{head}")
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    model = auto.from_pretrained(assets.minilm(), **labels, **config)
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(assets.minilm()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("models") / "sentiment")


def logits_of(folder, texts, auto=transformers.AutoModelForSequenceClassification):
    model = auto.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [model(**tokenizer(text, return_tensors="pt")).logits[0].float().numpy() for text in texts]


@pytest.fixture(scope="module")
def sentiment_engine(sentiment):
    return serve(sentiment)


def scores_of(answer, names=NAMES):
    by_label = {it["label"]: it["score"] for it in answer}
    return np.array([by_label[name] for name in names.values()])


def test_a_classifier_answers_as_transformers_does_alone_or_in_a_batch(sentiment, sentiment_engine):
    expected = logits_of(sentiment, TEXTS)
    together, headers = post(sentiment_engine, "/classify", {"inputs": TEXTS, "raw_scores": True})
    assert headers["X-Truncated-Inputs"] == "0"
    for text, wanted, answer in zip(TEXTS, expected, together, strict=True):
        (alone,), _ = post(sentiment_engine, "/classify", {"inputs": text, "raw_scores": True})
        np.testing.assert_allclose(scores_of(answer), wanted, atol=2e-5)
        np.testing.assert_allclose(scores_of(alone), wanted, atol=2e-5)
    answers, _ = post(sentiment_engine, "/classify", {"inputs": TEXTS})
    pipeline = transformers.pipeline("text-classification", sentiment, top_k=None)
    for answer, wanted in zip(answers, pipeline(TEXTS), strict=True):
        assert [it["label"] for it in answer] == [it["label"] for it in wanted]
        assert [it["score"] for it in answer] == pytest.approx([it["score"] for it in wanted], abs=1e-5)


def test_requests_that_come_at_once_share_passes_and_each_gets_its_own_answer(sentiment, sentiment_engine):
    expected = logits_of(sentiment, TEXTS)
    before = sentiment_engine.served.batcher.passes
    many = TEXTS * 8
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        asked = [
            pool.submit(post, sentiment_engine, "/classify", {"inputs": text, "raw_scores": True}) for text in many
        ]
    for future, wanted in zip(asked, expected * 8, strict=True):
        np.testing.assert_allclose(scores_of(future.result()[0][0]), wanted, atol=2e-5)
    assert sentiment_engine.served.batcher.passes - before < len(many)


def test_what_is_cut_is_said_and_can_be_refused(sentiment_engine):
    long = "word " * 600
    answer, headers = post(sentiment_engine, "/classify", {"inputs": ["short", long]})
    assert (len(answer), headers["X-Truncated-Inputs"]) == (2, "1")
    code, error = refusal(sentiment_engine, "/classify", {"inputs": ["short", long], "truncate": False})
    assert (code, error["param"]) == (413, "inputs")
    assert "512 tokens" in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "inputs is missing"), ({"inputs": []}, "empty list"), ({"inputs": ""}, "empty text"), ({"inputs": 7}, "not int"),
        ({"inputs": ["a"] * 1001}, "at most 1000"), ({"inputs": "a", "raw_scores": "yes"}, "true or false"), ([], "JSON object"),
    ],
)  # fmt: skip
def test_a_request_that_means_nothing_is_refused_in_words(sentiment_engine, body, words):
    code, error = refusal(sentiment_engine, "/classify", body)
    assert code in (400, 413)
    assert words in error["message"]


def test_several_classes_each_get_a_probability_of_their_own_and_a_number_stays_one(tmp_path):
    many = serve(classifier(tmp_path / "many", problem_type="multi_label_classification"))
    (answer,), _ = post(many, "/classify", {"inputs": TEXTS[0]})
    logits = logits_of(tmp_path / "many", TEXTS[:1])[0]
    np.testing.assert_allclose(scores_of(answer), 1 / (1 + np.exp(-logits)), atol=1e-5)
    one = {0: "stars"}
    number = serve(classifier(tmp_path / "one", names=one, problem_type="regression"))
    (answer,), _ = post(number, "/classify", {"inputs": TEXTS[0]})
    np.testing.assert_allclose(scores_of(answer, one), logits_of(tmp_path / "one", TEXTS[:1])[0], atol=1e-5)


def test_a_pair_of_texts_is_read_as_the_tokenizer_joins_it(sentiment, sentiment_engine):
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    (answer,), _ = post(sentiment_engine, "/classify", {"inputs": [pair], "raw_scores": True})
    tokenizer = transformers.AutoTokenizer.from_pretrained(sentiment)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(sentiment).eval()
    with torch.inference_mode():
        wanted = model(**tokenizer(TEXTS[0], TEXTS[1], return_tensors="pt")).logits[0].numpy()
    np.testing.assert_allclose(scores_of(answer), wanted, atol=2e-5)


def test_words_become_spans_as_in_transformers_pipeline(tmp_path):
    names = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
    folder = classifier(tmp_path / "names", "TokenClassification", names)
    engine = serve(folder)
    answers, _ = post(engine, "/classify", {"inputs": TEXTS})
    pipeline = transformers.pipeline("token-classification", folder, aggregation_strategy="first")
    assert sum(map(len, answers)) > 20
    for text, answer, wanted in zip(TEXTS, answers, pipeline(TEXTS), strict=True):
        assert [(it["entity_group"], it["start"], it["end"]) for it in answer] == [
            (it["entity_group"], it["start"], it["end"]) for it in wanted
        ]
        assert all(it["word"] == text[it["start"] : it["end"]] for it in answer)
        assert [it["score"] for it in answer] == pytest.approx([float(it["score"]) for it in wanted], abs=1e-4)
    assert refusal(engine, "/classify", {"inputs": {"text": "a", "text_pair": "b"}})[0] == 400


def test_images_are_classified(tmp_path):
    folder = tiny.vit(tmp_path / "vit")
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog"}
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, id2label=names, num_labels=2)
    model.save_pretrained(folder)
    engine = serve(folder)
    _, body = engine.served.sample
    (answer,), _ = post(engine, "/classify", {**body, "raw_scores": True})
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = np.full((32, 32, 3), 128, np.uint8)
    with torch.inference_mode():
        wanted = model.eval()(**processor(images=image, return_tensors="pt")).logits[0].numpy()
    np.testing.assert_allclose(scores_of(answer, names), wanted, atol=1e-4)
    assert "no image" in refusal(engine, "/classify", {"inputs": "Zm9v"})[1]["message"]


@pytest.fixture(scope="module")
def expected_vectors():
    """What the model's card says: the mean of the last hidden states, of length 1."""
    model = transformers.AutoModel.from_pretrained(assets.minilm()).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.minilm())
    vectors = []
    with torch.inference_mode():
        for text in TEXTS:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    return np.array(vectors)


def test_embeddings_are_those_of_the_model_in_both_encodings(expected_vectors):
    engine = serve(assets.minilm())
    answer, _ = post(engine, "/v1/embeddings", {"model": "m", "input": TEXTS})
    vectors = np.array([it["embedding"] for it in answer["data"]])
    cosines = (vectors * expected_vectors).sum(1)
    assert cosines.min() > 0.9999
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert answer["usage"]["prompt_tokens"] > len(TEXTS)
    packed, _ = post(engine, "/v1/embeddings", {"input": TEXTS[0], "encoding_format": "base64"})
    values = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(values, vectors[0], atol=1e-6)
    assert refusal(engine, "/v1/embeddings", {"input": TEXTS[0], "dimensions": 8})[1]["param"] == "dimensions"
    _, headers = post(engine, "/v1/embeddings", {"input": "word " * 400})
    assert headers["X-Truncated-Inputs"] == "1"  # max_seq_length of sentence_bert_config.json is 256


def test_the_openai_client_reads_the_embeddings(expected_vectors):
    from openai import OpenAI

    client = OpenAI(base_url=f"{serve(assets.minilm()).url}/v1", api_key="none", max_retries=0)
    found = client.embeddings.create(model="m", input=TEXTS)  # it asks for base64 by itself
    vectors = np.array([it.embedding for it in found.data])
    assert (vectors * expected_vectors).sum(1).min() > 0.9999


def test_a_part_that_would_make_other_vectors_is_refused(tmp_path):
    folder = shutil.copytree(assets.minilm(), tmp_path / "dense")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="Dense"):
        serve(folder)


@pytest.mark.parametrize(
    ("architecture", "words"), [("T5ForConditionalGeneration", "can't be served"), ("LlamaModel", "can't be served")]
)
def test_what_nobody_can_answer_with_is_named(tmp_path, architecture, words):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": [architecture], "model_type": architecture[:-5].lower()})
    )
    with pytest.raises(UserError, match=words):
        serve(tmp_path)


@pytest.fixture(scope="module")
def writer():
    return serve(assets.smollm2())


def ask(engine, text, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **more}
    return post(engine, "/v1/chat/completions", body)[0]


def test_text_is_that_of_transformers_generate(writer):
    answer = ask(writer, "What is the capital of France?")
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.smollm2())
    model = transformers.AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    with torch.inference_mode():
        wanted = model.generate(**ids, max_new_tokens=8, do_sample=False)[0][ids["input_ids"].shape[1] :]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(wanted, skip_special_tokens=True)
    assert "Paris" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]


def test_an_answer_ends_at_the_end_token_at_the_length_and_at_a_stop_text(writer):
    whole = ask(writer, "What is the capital of France?", max_tokens=40)
    assert whole["choices"][0]["finish_reason"] == "stop"
    short = ask(writer, "What is the capital of France?", max_tokens=2)
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 2)
    cut = ask(writer, "What is the capital of France?", max_tokens=40, stop=["France"])
    text = whole["choices"][0]["message"]["content"]
    assert cut["choices"][0]["message"]["content"] == text.partition("France")[0]
    assert cut["choices"][0]["finish_reason"] == "stop"


def test_the_openai_client_streams_and_draws_by_seed(writer):
    from openai import OpenAI

    client = OpenAI(base_url=f"{writer.url}/v1", api_key="none", max_retries=0)
    question = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
    asked = {"model": "m", "messages": question, "max_completion_tokens": 6, "temperature": 0.9, "seed": 3}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == client.chat.completions.create(**asked).choices[0].message.content
    assert chunks[-1].usage.completion_tokens <= 6
    assert client.completions.create(model="m", prompt="2 + 2 =", max_tokens=2, temperature=0).choices[0].text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"), ({"n": 2}, "n"), ({"temperature": -1}, "temperature"), ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"), ({"logprobs": True}, "logprobs"), ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "word " * 900}]}, "messages"),
    ],
)  # fmt: skip
def test_what_this_engine_does_not_do_is_refused_by_field(writer, body, field):
    code, error = refusal(writer, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **body})
    assert (code, error["param"]) == (400, field)
