"""docs/data.md: every form of data that people bring, a row of the table each; what is learned is what was meant."""

import bz2
import gzip
import io
import json
import lzma
import re
from itertools import groupby
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from support.plans import training_plan
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import Columns, Dataset, DatasetSource, OnBadRow
from tunesmith_api.v1alpha1.task import Task
from tunesmith_store.errors import UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.data.image_loader import ImageLoader
from tunesmith_trainer.data.rows import BadRows, RowChecker, columns_of
from tunesmith_trainer.data.sources import open_source
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import IGNORE
from tunesmith_trainer.tasks.chat import TemplateError, encode_chat
from tunesmith_trainer.tasks.preference_pairs import read_pair

PAGE = (Path(__file__).parents[3] / "docs/data.md").read_text()
BRIEF = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
RAIN = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "assistant", "content": "Yes."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
FORMS = {
    "Messages": {"messages": BRIEF},
    "ShareGPT": {"messages": BRIEF},
    "Alpaca": {"messages": BRIEF},
    "Prompt and completion": {"messages": BRIEF},
    "Tools": {"messages": RAIN, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
    "Tools in ShareGPT": {"messages": RAIN, "tools": TOOLS},
}


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "b").mkdir(parents=True)
    return VolumeStore(tmp_path / "volumes")


def read(store, name, data, task=Task.CAUSAL_LM, policy=OnBadRow.FAIL, **source):
    """The rows of a file, and what became of the bad ones."""
    store.put_bytes(f"pvc://b/{name}", data)
    source = DatasetSource(uri=f"pvc://b/{name}", **source)
    plan = training_plan(task=task, dataset=Dataset(train=source))
    bad = BadRows(policy)
    checker = RowChecker(task_for(plan), columns_of(plan), ImageLoader(store), bad)
    return [row for _, row in checker.usable(open_source(source, plan, store, "spec.dataset.train").rows())], bad


def chat_rows(store, *rows):
    return read(store, "x.jsonl", b"\n".join(json.dumps(row).encode() for row in rows), Task.CHAT_SFT)[0]


# ---- conversations


def test_each_form_on_the_page_becomes_the_one_form(store):
    section = PAGE.partition("## Conversations")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"### (.+?)\n.*?```json\n(.+?)\n```", section, re.DOTALL))
    assert shown.keys() == FORMS.keys()
    for name, text in shown.items():
        assert read(store, "x.jsonl", text.encode(), Task.CHAT_SFT)[0] == [FORMS[name]], name
        # what is in the one form stays as it is: read again, and from a column of JSON texts
        assert chat_rows(store, FORMS[name]) == [FORMS[name]]


def test_a_csv_or_parquet_file_may_hold_messages_as_json_text(store):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"messages": [json.dumps(BRIEF)]}), buffer)
    assert read(store, "x.parquet", buffer.getvalue(), Task.CHAT_SFT)[0] == [{"messages": BRIEF}]
    data = b"instruction;output\nHi;Hello!\n"
    assert read(store, "x.csv", data, Task.CHAT_SFT)[0] == [{"messages": BRIEF[1:]}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a", "answer": "b"}, "(its fields: answer, question); set spec.dataset.columns.messages, or"),
        ({"question": "a"}, "'conversations' (ShareGPT), 'instruction' and 'output' (Alpaca), 'prompt' and 'completion'"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "message 2 needs a text 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part 1 has type 'image', and this model reads text only"),
        ({"messages": [{"role": "painter", "content": "a"}]}, "message 1 has role 'painter'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "arguments is not valid JSON"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "arguments must be an object"),
        ({"messages": BRIEF, "tools": [{"parameters": {}}]}, "field 'tools', tool 1 needs a text 'name'"),
        ({"messages": BRIEF, "chat_template_kwargs": {"chat_template": "x"}}, "sets chat_template, which is not for rows to say"),
        ({"instruction": " ", "output": "b"}, "field 'instruction' is empty"),
        ({"prompt": "a", "completion": ""}, "field 'completion' is empty"),
    ],
)  # fmt: skip
def test_what_is_in_no_form_says_what_was_found_and_what_is_expected(store, row, words):
    with pytest.raises(UserError) as caught:
        chat_rows(store, row)
    assert words in caught.value.message


def test_messages_of_a_preference_are_read_the_same_way():
    asked, said = {"from": "human", "value": "Hi"}, [{"from": "gpt", "value": text} for text in ("Hello!", "Go away")]
    pair = read_pair({"prompt": [asked], "chosen": said[:1], "rejected": said[1:]}, Columns())
    assert [*pair.prompt, *pair.chosen] == BRIEF[1:]
    assert pair.rejected == [{"role": "assistant", "content": "Go away"}]


HEADS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + HEADS
# as SmolLM2 has it: what it looks up in the first message isn't there where there is none
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
# as Qwen3: thoughts of the last turn only, and always
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + HEADS
)
# as the distilled models of R1: thoughts are dropped, and opened in the prompt
R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
GLM = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}" + HEADS
MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + HEADS
)
MARKS_ONLY = MARKS.replace("<|im_end|>", "")
OPAQUE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}" + HEADS
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
GREETING = [{"role": "assistant", "content": "welcome"}, *TALK[:2]]
THOUGHTFUL = [*TALK[:3], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso long"}]
REASONED = [*TALK[:3], {"role": "assistant", "content": "so long", "reasoning_content": "hm"}]


def learned(tokenizer, chat):
    """Each run of learned tokens as text."""
    assert all(label in (IGNORE, token) for token, label in zip(chat.input_ids, chat.labels, strict=True))
    runs = groupby(chat.labels, lambda label: label != IGNORE)
    return [tokenizer.decode(list(run)) for is_learned, run in runs if is_learned]


@pytest.mark.parametrize(
    ("template", "talk", "expected", "note"),
    [
        (CHATML, TALK, [["hello<|im_end|>", "so long<|im_end|>"]], ""),
        (CHATML, GREETING, [["welcome<|im_end|>", "hello<|im_end|>"]], ""),
        (DEFAULT_SYSTEM, GREETING, [["welcome<|im_end|>", "hello<|im_end|>"]], ""),
        (MARKS, GREETING, [["welcome<|im_end|>", "hello<|im_end|>"]], ""),
        (QWEN3, TALK, [["<think>\n\n</think>\n\nhello<|im_end|>"], ["<think>\n\n</think>\n\nso long<|im_end|>"]], "examples of their own"),
        (QWEN3, REASONED, [["<think>\n\n</think>\n\nhello<|im_end|>"], ["<think>\nhm\n</think>\n\nso long<|im_end|>"]], "examples of their own"),
        (R1, TALK[:2], [["\n</think>\n\nhello</s>"]], "with </think> before them"),
        (R1, THOUGHTFUL, [["\n</think>\n\nhello</s>"], ["hm\n</think>\n\nso long</s>"]], "examples of their own"),
        (R1, REASONED, [["\n</think>\n\nhello</s>"], ["hm\n</think>\n\nso long</s>"]], "examples of their own"),
        (ALPACA, TALK, [["hello</s>"], ["so long</s>"]], "</s> was put behind"),
        (GLM, TALK, [["hello</s>"], ["so long</s>"]], "</s> was put behind"),
        (MARKS, TALK, [["hello<|im_end|>", "so long<|im_end|>"]], ""),
        (MARKS_ONLY, TALK, [["hello", "so long</s>"]], "the ends of earlier turns are not learned"),
    ],
)  # fmt: skip
def test_what_is_learned_of_a_conversation(tokenizer, template, talk, expected, note):
    tokenizer.chat_template = template
    found = encode_chat(tokenizer, talk, 1000)
    assert [learned(tokenizer, chat) for chat in found] == expected
    assert (sum(chat.turns for chat in found), found[-1].unlearned) == (sum(map(len, expected)), 0)
    assert (
        (note in " ".join(note for chat in found for note in chat.notes)) if note else not any(c.notes for c in found)
    )


@pytest.mark.parametrize(("template", "talk"), [(QWEN3, TALK), (R1, THOUGHTFUL), (ALPACA, TALK)])
def test_a_turn_is_learned_behind_the_prompt_that_the_model_gets(tokenizer, template, talk):
    tokenizer.chat_template = template
    for chat, before in zip(encode_chat(tokenizer, talk, 1000), (1, 3), strict=True):
        start = next(place for place, label in enumerate(chat.labels) if label != IGNORE)
        prompt = tokenizer.apply_chat_template(talk[:before], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(chat.input_ids[:start]) == prompt


def test_turns_that_the_cut_takes_or_the_template_hides_are_counted(tokenizer):
    tokenizer.chat_template = CHATML
    (cut,) = encode_chat(tokenizer, TALK, 30)
    assert (cut.turns, cut.unlearned, cut.truncated) == (1, 1, True)
    (weighted,) = encode_chat(tokenizer, [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]], 1000)
    assert (learned(tokenizer, weighted), weighted.turns, weighted.unlearned) == (["so long<|im_end|>"], 1, 1)
    tokenizer.chat_template = MARKS
    (weighted,) = encode_chat(tokenizer, [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]], 1000)
    assert learned(tokenizer, weighted) == ["so long<|im_end|>"]
    tokenizer.chat_template = OPAQUE
    with pytest.raises(TemplateError, match="where the assistant's turn begins"):
        encode_chat(tokenizer, TALK, 1000)


def test_a_template_is_given_tools_and_settings_and_must_show_them(tokenizer):
    calling = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "name": None},
    ]
    tokenizer.chat_template = WITH_TOOLS
    (chat,) = encode_chat(tokenizer, calling, 1000, {"tools": TOOLS})
    assert tokenizer.decode(chat.input_ids).startswith('[{"type": "function", "function": {"name": "weather"')
    assert learned(tokenizer, chat) == ['<call>{"name": "weather", "arguments": {"city": "Oslo"}}<|im_end|>']
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ mood }}")
    (chat,) = encode_chat(tokenizer, TALK[:2], 1000, {"mood": "!"})
    assert learned(tokenizer, chat) == ["hello!<|im_end|>"]
    for template in (CHATML, MARKS):
        tokenizer.chat_template = template
        with pytest.raises(TemplateError, match="doesn't show tools"):
            encode_chat(tokenizer, TALK, 1000, {"tools": TOOLS})
        with pytest.raises(TemplateError, match="doesn't show tool calls"):
            encode_chat(tokenizer, calling, 1000)


# ---- files

LINES = b'{"text": "a"}\n{"text": "b"}\n'
ITEMS = [{"text": "a"}, {"text": "b"}]
TABLE = pyarrow.table({"text": ["a", "b"]})


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def arrow(opened, table=TABLE):
    sink = pyarrow.BufferOutputStream()
    with opened(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl.gz", gzip.compress(LINES)),
        ("x.jsonl.bz2", bz2.compress(LINES)),
        ("x.ndjson.xz", lzma.compress(LINES)),
        ("x.jsonl.zst", zstd(LINES)),
        ("x.csv.gz", gzip.compress(b"text\na\nb\n")),
        ("x.arrow", arrow(pyarrow.ipc.new_file)),
        ("x.arrow", arrow(pyarrow.ipc.new_stream)),
        ("x.jsonl", json.dumps(ITEMS, indent=2).encode()),
        ("x.json", json.dumps(ITEMS).encode()),
        ("x.json", json.dumps({"version": 1, "data": ITEMS}, indent=2).encode()),
        ("x.jsonl", json.dumps({"version": 1, "data": ITEMS}).encode()),
        ("x.json", b'{\n"text": "a"\n}\n{\n"text": "b"\n}\n'),
        ("x.csv", b"id;text\n1;a\n2;b\n"),
        ("x.csv", b"id\ttext\n1\ta\n2\tb\n"),
        ("x.csv", "id,text\n1,a\n2,b\n".encode("utf-16")),
        ("x.jsonl", LINES.decode().encode("utf-16")),
    ],
)
def test_a_file_of_each_kind_gives_its_rows(store, name, data):
    assert read(store, name, data)[0] == ITEMS


def test_latin_1_is_named_and_read_where_it_is_asked_for(store):
    for name, data in (("x.csv", "text\ncafé €\n"), ("x.jsonl", '{"text": "café €"}'), ("x.txt", "café €")):
        with pytest.raises(UserError, match=r"is not valid UTF-8.*set encoding: Latin1"):
            read(store, name, data.encode("cp1252"))
        assert read(store, name, data.encode("cp1252"), encoding="Latin1")[0] == [{"text": "café €"}]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.jsonl.gz", b"no", "can't be decompressed"),
        ("x.jsonl.gz", gzip.compress(LINES * 100)[:30], "can't be decompressed"),
        ("x.jsonl.zst", b"nothing of the kind", "can't be decompressed"),
        ("x.arrow", b"nothing of the kind", "can't be read as Arrow"),
        ("x.parquet.gz", b"", "doesn't say how it is written (.jsonl, .json, .csv"),
        ("x.json", json.dumps({"train": ITEMS, "test": ITEMS}).encode(), "holds several lists of rows (train, test)"),
        ("x.csv", b"\xff\xfea", "begins like UTF-16 and isn't"),
    ],
)
def test_a_file_that_is_none_says_why(store, name, data, words):
    with pytest.raises(UserError) as caught:
        read(store, name, data)
    assert words in caught.value.message
    assert caught.value.reason is Reason.DATASET_INVALID


@pytest.mark.parametrize("closing", [None, '"fine, quoted",l', 'x,"l"'])
def test_a_quote_that_is_not_closed_costs_its_own_line_and_no_other(store, closing):
    rows = [f"text {number},l" for number in range(5000)]
    rows[6] = '"never closed,l'
    if closing:
        rows[100] = closing
        rows[4000] = '"two\nlines",l'
    found, bad = read(store, "x.csv", "\n".join(["text,label", *rows]).encode(), policy=OnBadRow.SKIP)
    assert (len(found), bad.count) == (4999, 1)
    assert bad.first.startswith("pvc://b/x.csv line 8 is not valid CSV")
    assert "a quote in it may not be closed" in bad.first
    assert {"text": "two\nlines"} in found or not closing


def written(table):
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def test_nulls_with_which_arrow_pads_arguments_are_left_out_and_those_of_a_row_stay(store):
    other = {**CALL, "function": {"name": "time", "arguments": {"zone": "CET", "days": [{"a": 1}]}}}
    messages = [[*RAIN[:1], {**RAIN[1], "tool_calls": [call]}] for call in (CALL, other)]
    table = pyarrow.Table.from_pylist([{"messages": talk} for talk in messages])
    assert table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["zone"] is None
    found, _ = read(store, "x.parquet", written(table), Task.CHAT_SFT)
    assert [row["messages"][1]["tool_calls"] for row in found] == [[CALL], [other]]
    (row,) = chat_rows(
        store, {"messages": [RAIN[0], {**RAIN[1], "tool_calls": [{"name": "f", "arguments": {"x": None}}]}]}
    )
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": None}


def test_a_map_is_an_object(store):
    calls = pyarrow.struct({"name": pyarrow.string(), "arguments": pyarrow.map_(pyarrow.string(), pyarrow.string())})
    message = pyarrow.struct(
        {"role": pyarrow.string(), "content": pyarrow.string(), "tool_calls": pyarrow.list_(calls)}
    )
    call = {"name": "weather", "arguments": [("city", "Oslo")]}
    column = pyarrow.array([[RAIN[0], {**RAIN[1], "tool_calls": [call]}]], pyarrow.list_(message))
    (row,), _ = read(store, "x.parquet", written(pyarrow.table({"messages": column})), Task.CHAT_SFT)
    assert row["messages"][1]["tool_calls"] == [CALL]


def test_what_datasets_writes_as_json_is_decoded(store, tmp_path):
    import datasets

    rows = [{"text": "hello", "label": "neg"}, {"text": "you", "label": ["a", 1]}]
    written_by = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(written_by.features)
    written_by.to_parquet(tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    plan = training_plan(task=Task.SEQUENCE_CLASSIFICATION)
    store.put_bytes("pvc://b/x.parquet", data)
    source = open_source(DatasetSource(uri="pvc://b/x.parquet"), plan, store, "f")
    assert [dict(raw.content) for raw in source.rows()] == rows
    written_by.save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():
        store.put_bytes(f"pvc://b/saved/{file.name}", file.read_bytes())
    source = open_source(DatasetSource(uri="pvc://b/saved"), plan, store, "f")
    assert [dict(raw.content) for raw in source.rows()] == rows


def test_dates_in_a_column_of_texts_are_texts(store):
    from datetime import UTC, date, datetime

    times = [datetime(2026, 1, 2), datetime(2026, 1, 2, 3, 4, 5)]  # noqa: DTZ001
    assert [row["text"] for row in read(store, "x.parquet", written(pyarrow.table({"text": times})))[0]] == [
        "2026-01-02", "2026-01-02T03:04:05",
    ]  # fmt: skip
    days = pyarrow.table({"text": [date(2026, 1, 2)]})
    assert read(store, "x.parquet", written(days))[0] == [{"text": "2026-01-02"}]
    zoned = pyarrow.table({"text": [datetime(2026, 1, 2, 3, tzinfo=UTC)]})
    assert read(store, "x.parquet", written(zoned))[0] == [{"text": "2026-01-02T03:00:00+00:00"}]
