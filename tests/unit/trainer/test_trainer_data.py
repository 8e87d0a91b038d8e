"""Rows in, examples out; bad rows named by line."""

import json

import pytest
import torch

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.chat import IGNORE, EncodedChat, ensure_chat_template
from tunesmith_trainer.data import collate, encode_rows, read_rows

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
URI = "s3://data/train.jsonl"


def written(tmp_path, *lines):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"text": "x"}, "no field 'messages' (its fields: text)"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, "at least one message"),
        ({"messages": ["hi"]}, "message 1 is not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 needs a text 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 needs a text 'content'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ],
)
def test_a_bad_row_names_its_line_and_what_is_wrong(tmp_path, line, words):
    path = written(tmp_path, GOOD, "", line)
    with pytest.raises(UserError) as caught:
        list(read_rows(path, "messages", URI))
    assert caught.value.reason is Reason.DATASET_INVALID
    assert f"{URI} line 3" in caught.value.message
    assert words in caught.value.message


def test_text_that_is_no_utf8_is_reported(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"messages": "\xff"}\n')
    with pytest.raises(UserError, match="line 1 is not valid JSON"):
        list(read_rows(path, "messages", URI))


def test_another_column_and_blank_lines(tmp_path):
    path = written(tmp_path, {"chat": GOOD["messages"]}, "  ", {"chat": GOOD["messages"]})
    assert [number for number, _ in read_rows(path, "chat", URI)] == [1, 3]


def test_rows_that_the_cut_empties_are_left_out_and_counted(tmp_path, tokenizer):
    ensure_chat_template(tokenizer)
    long = {"messages": [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "b"}]}
    data = encode_rows(written(tmp_path, GOOD, long), tokenizer, column="messages", uri=URI, max_length=40)
    assert (len(data), data.truncated, data.skipped) == (1, 1, 1)
    with pytest.raises(UserError, match="maxLength 10"):
        encode_rows(written(tmp_path, GOOD, long), tokenizer, column="messages", uri=URI, max_length=10)


def test_no_rows_at_all(tmp_path, tokenizer):
    ensure_chat_template(tokenizer)
    with pytest.raises(UserError, match="has no rows"):
        encode_rows(written(tmp_path, ""), tokenizer, column="messages", uri=URI, max_length=10)


def test_padding_is_masked_and_never_a_target():
    batch = collate([EncodedChat([1, 2, 3], [IGNORE, 2, 3]), EncodedChat([4], [4])], 9, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORE, 2, 3], [4, IGNORE, IGNORE]]


def test_the_first_token_is_no_target():
    assert EncodedChat([4, 5], [4, 5]).trained_tokens == 1
