"""The parts of the engine Transformers that need no model: batches, spans, stop texts, what a request may say."""

import asyncio
import json
import threading
from dataclasses import dataclass

import pytest

from tunesmith_server.predict.answers import Refusal
from tunesmith_server.predict.batching import Batcher, TooBusy, next_batch
from tunesmith_server.predict.generate import TextSoFar
from tunesmith_server.predict.kinds import ModelKind, kind_of
from tunesmith_server.predict.sampling import Sampling, messages_of
from tunesmith_server.predict.spans import Word, spans_of
from tunesmith_store.errors import UserError


@pytest.mark.parametrize(
    ("lengths", "most", "chosen"),
    [
        ([5], 0, [0]),
        ([10, 100, 12, 9], 2048, [0, 2, 3]),  # the long one would be nine tenths of the pass
        ([100, 10, 100, 100], 250, [0, 2]),
        ([8, 8, 8, 8], 24, [0, 1, 2]),
        ([400, 1, 1, 1], 2048, [0]),
    ],
)
def test_a_batch_begins_with_the_oldest_and_wastes_little(lengths, most, chosen):
    assert sorted(next_batch(lengths, most)) == chosen


@dataclass(frozen=True)
class Item:
    value: int
    length: int = 4


async def test_what_waits_is_computed_together_and_each_gets_its_own_answer():
    gate, sizes = threading.Event(), []

    def compute(batch):
        gate.wait(10)
        sizes.append(len(batch))
        return [item.value * 2 for item in batch]

    batcher = Batcher(compute)
    asked = [asyncio.create_task(batcher.answers([Item(number), Item(-number)])) for number in range(5)]
    await asyncio.sleep(0.05)
    gate.set()
    assert await asyncio.gather(*asked) == [[number * 2, -number * 2] for number in range(5)]
    assert sum(sizes) == 10
    assert len(sizes) < 5


async def test_a_full_queue_and_a_failed_pass_leave_the_rest_alone():
    gate = threading.Event()

    def compute(batch):
        gate.wait(10)
        if any(item.value < 0 for item in batch):
            raise ValueError("broken")
        return [item.value for item in batch]

    batcher = Batcher(compute, most_tokens=0, most_waiting=2)
    first = asyncio.create_task(batcher.answers([Item(-1)]))
    await asyncio.sleep(0.02)  # it is being computed
    second = asyncio.create_task(batcher.answers([Item(2), Item(3)]))
    await asyncio.sleep(0)
    with pytest.raises(TooBusy, match="2 inputs wait"):
        await batcher.answers([Item(4)])
    gate.set()
    with pytest.raises(ValueError, match="broken"):
        await first
    assert await second == [2, 3]


async def test_nobody_computes_what_nobody_waits_for():
    gate, computed = threading.Event(), []

    def compute(batch):
        gate.wait(10)
        computed.extend(item.value for item in batch)
        return [item.value for item in batch]

    batcher = Batcher(compute, most_tokens=0)
    first = asyncio.create_task(batcher.answers([Item(1)]))
    gone = asyncio.create_task(batcher.answers([Item(2)]))
    await asyncio.sleep(0.02)
    gone.cancel()
    await asyncio.sleep(0)
    gate.set()
    await first
    assert await batcher.answers([Item(3)]) == [3]
    assert computed == [1, 3]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-PER I-PER O B-LOC", [("PER", "aa bb"), ("LOC", "dd")]),
        ("I-PER I-PER O I-LOC", [("PER", "aa bb"), ("LOC", "dd")]),
        ("B-PER B-PER O O", [("PER", "aa"), ("PER", "bb")]),
        ("B-PER I-LOC I-LOC O", [("PER", "aa"), ("LOC", "bb cc")]),
        ("O O O O", []),
        ("name name O place", [("name", "aa bb"), ("place", "dd")]),
    ],
)
def test_tags_become_spans(tags, spans):
    text = "aa bb cc dd"
    words = [Word(tag, 0.5, 3 * number, 3 * number + 2) for number, tag in enumerate(tags.split())]
    assert [(it["entity_group"], it["word"]) for it in spans_of(text, words)] == spans


def given(tokens, *stops):
    pieces = {1: "Hel", 2: "lo wor", 3: "ld", 4: "é".encode()[:1], 5: "é".encode()[1:]}

    def decode(numbers):
        raw = b"".join(it if isinstance(it, bytes) else it.encode() for it in (pieces[number] for number in numbers))
        return raw.decode(errors="replace")

    text = TextSoFar(decode, stops)
    return [text.add(token) for token in tokens], text.rest(), text.stopped


def test_text_is_given_out_as_it_comes_but_no_half_character_and_no_begun_stop():
    assert given([1, 2, 3]) == (["Hel", "lo wor", "ld"], "", False)
    assert given([1, 4, 5]) == (["Hel", "", "é"], "", False)
    assert given([1, 2, 3], "world") == (["Hel", "lo ", ""], "", True)
    assert given([1, 2], "works") == (["Hel", "lo "], "wor", False)
    assert given([1, 4]) == (["Hel", ""], "�", False)


def test_a_request_for_text_is_read():
    read = Sampling.of({"max_tokens": 9, "max_completion_tokens": 5, "temperature": 0, "stop": "x", "stream": True})
    assert (read.max_tokens, read.temperature, read.stops, read.stream) == (5, 0.0, ("x",), True)
    assert messages_of(
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    ) == [{"role": "system", "content": "a\nb"}]


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2}, {"tools": [{}]}, {"temperature": "hot"}, {"temperature": 2.1}, {"top_p": 0}, {"max_tokens": True}, {"stop": [""]},
        {"stop": list("abcde")}, {"seed": 1.5}, {"stream": "yes"}, {"frequency_penalty": 1}, {"response_format": {"type": "json_schema"}},
        {"stream_options": "all"},
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused_by_its_field(body):
    with pytest.raises(Refusal) as caught:
        Sampling.of(body)
    assert caught.value.field == next(iter(body))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"architectures": ["BertForSequenceClassification"]}, ModelKind.TEXT_CLASSIFIER),
        ({"architectures": ["RobertaForTokenClassification"]}, ModelKind.TOKEN_CLASSIFIER),
        ({"architectures": ["ViTForImageClassification"]}, ModelKind.IMAGE_CLASSIFIER),
        ({"architectures": ["LlamaForCausalLM"]}, ModelKind.LANGUAGE_MODEL),
        ({"architectures": ["GPT2LMHeadModel"]}, ModelKind.LANGUAGE_MODEL),
        ({"architectures": ["BertModel"], "model_type": "bert"}, ModelKind.ENCODER),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, ModelKind.ENCODER),
    ],
)
def test_a_model_is_known_by_its_architecture(config, kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert kind_of(tmp_path) is kind


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"architectures": ["T5ForConditionalGeneration"]}',
        '{"architectures": ["LlamaModel"], "model_type": "llama"}',
    ],
)
def test_a_model_that_nobody_serves_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError):
        kind_of(tmp_path)


def test_a_pooling_file_makes_an_encoder_of_any_model(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    assert kind_of(tmp_path) is ModelKind.ENCODER
