"""Calibration rows: which are read, which are drawn, and that none is evaluated on, too."""

import json

import pytest

from tunesmith_api.plan import CalibrationPlan, EvaluationPlan
from tunesmith_server.calibration.texts import held_out, read_texts
from tunesmith_store.errors import UserError
from tunesmith_store.volumes import VolumeStore


@pytest.fixture
def store(tmp_path):
    (tmp_path / "data").mkdir()
    return VolumeStore(tmp_path)


def chat(question: str, answer: str = "yes") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def conversation(question: str, answer: str = "yes"):
    return (("user", question), ("assistant", answer))


def test_texts_and_conversations_are_read_and_what_is_neither_is_left_out(store):
    image = {"messages": [{"role": "user", "content": [{"type": "image"}]}]}
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    rows = lines({"text": "t"}, chat("q"), image, parts, {"text": 3}, {"label": 1}, [], {"text": ""}) + "no json"
    found = read_texts(store, CalibrationPlan(inline=rows))
    assert found.rows == ("t", conversation("q"), (("user", "ab"),))
    named = CalibrationPlan(inline=lines({"body": "x"}), text_field="body")
    assert read_texts(store, named).rows == ("x",)


def test_the_same_rows_are_drawn_each_time_and_others_with_another_seed(store):
    store.put_bytes("pvc://data/rows/a.jsonl", lines(*({"text": str(it)} for it in range(50))).encode())
    store.put_bytes("pvc://data/rows/b.jsonl", lines(*({"text": str(it)} for it in range(50, 100))).encode())
    store.put_bytes("pvc://data/rows/notes.md", b"not rows")
    plan = CalibrationPlan(uri="pvc://data/rows", max_examples=10)
    first, again = read_texts(store, plan), read_texts(store, plan)
    assert first.digest == again.digest
    assert list(first.rows) == sorted(first.rows, key=int), "in their order"
    assert len(first.rows) == 10
    assert read_texts(store, plan.model_copy(update={"seed": 1})).digest != first.digest


def test_rows_that_the_models_are_compared_by_are_left_out(store):
    evaluation = EvaluationPlan(inline=lines(chat("held out")))
    without = held_out(store, evaluation)
    both = lines(chat("held out"), chat("held out", "no"), chat("learned"))
    found = read_texts(store, CalibrationPlan(inline=both), without)
    assert found.rows == (conversation("held out", "no"), conversation("learned"))
    with pytest.raises(UserError, match="has no rows of text beside those that are evaluated"):
        read_texts(store, CalibrationPlan(inline=lines(chat("held out"))), without)


def test_rows_that_are_not_there_are_named(store):
    with pytest.raises(UserError, match="no calibration rows at pvc://data/gone"):
        read_texts(store, CalibrationPlan(uri="pvc://data/gone"))
