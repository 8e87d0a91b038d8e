"""Texts changed anew in each epoch, the same way each time; synonyms from WordNet's own files; paraphrases handed back."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.plans import dataset, training_plan
from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.data import wordnet
from tunesmith_trainer.data.augment import TextChanger, augmenter_of
from tunesmith_trainer.data.paraphrase import paraphrased
from tunesmith_trainer.data.rows import Located
from tunesmith_trainer.tasks import task_for

words = st.text("abc'é-", min_size=1, max_size=5)
texts = st.lists(words | st.sampled_from([" ", "\n", "  ", "\t"]), max_size=12).map("".join)
chances = st.floats(0, 0.99)


@settings(deadline=None)
@given(text=texts, dropout=chances, seed=st.integers())
def test_dropout_leaves_words_out_keeps_the_order_and_never_all(text, dropout, seed):
    changed = TextChanger(dropout, 0, 0, None).change(text, random.Random(seed))
    left = iter(text.split())
    assert all(word in left for word in changed.split())
    assert bool(changed.split()) == bool(text.split())
    if changed != text:
        assert not re.search(r"\S\s+$", changed) or re.search(r"\s$", text)


@settings(deadline=None)
@given(text=texts, swap=chances, seed=st.integers())
def test_swapping_moves_words_and_loses_none(text, swap, seed):
    changed = TextChanger(0, swap, 0, None).change(text, random.Random(seed))
    assert Counter(changed.split()) == Counter(text.split())
    assert re.sub(r"\S", "", changed) == re.sub(r"\S", "", text)


@settings(deadline=None)
@given(text=texts)
def test_no_chance_changes_nothing(text):
    assert TextChanger(0, 0, 0, lambda word: ["other"]).change(text, random.Random(1)) == text


def test_about_the_part_that_was_asked_for_is_changed():
    text = " ".join(f"w{number}" for number in range(10_000))
    dropped = TextChanger(0.1, 0, 0, None).change(text, random.Random(1))
    assert len(dropped.split()) == pytest.approx(9000, abs=150)
    replaced = TextChanger(0, 0, 0.2, lambda word: ["x"]).change(text, random.Random(1))
    assert replaced.split().count("x") == pytest.approx(2000, abs=200)


def test_a_synonym_keeps_case_and_punctuation_and_words_of_grammar_stay():
    known = {"movie": ["film"], "the": ["x"], "good": ["fine"]}
    changer = TextChanger(0, 0, 0.999999, lambda word: known.get(word, []))
    changed = changer.change('The "Movie," was GOOD — good!  (unknown)', random.Random(0))
    assert changed == 'The "Film," was FINE — fine!  (unknown)'


def test_a_machine_without_wordnet_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(wordnet, "PLACES", (str(tmp_path),))
    for name in ("WNSEARCHDIR", "NLTK_DATA"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="wordnet-base") as caught:
        wordnet.find_wordnet()
    assert caught.value.reason is Reason.INVALID_SPEC
    assert "spec.dataset.augmentation.synonymReplacement" in caught.value.message


# ---- rows and examples


def augmenter(tokenizer, task="CausalLM", **settings):
    plan = training_plan(task=task, dataset=dataset(augmentation=settings))
    made = task_for(plan)
    made.processor = tokenizer
    return augmenter_of(plan, made), made


def test_each_epoch_has_its_own_changes_and_the_same_again(tokenizer):
    changer, _ = augmenter(tokenizer, wordDropout=0.5)
    row = {"text": "one two three four five six seven eight"}
    first = [changer.example(row, 0, number, epoch) for number in range(3) for epoch in range(3)]
    again = [augmenter(tokenizer, wordDropout=0.5)[0].example(row, 0, n, e) for n in range(3) for e in range(3)]
    assert first == again
    assert len({tuple(example.features["input_ids"]) for example in first if example}) > 6


def test_nothing_to_change_is_no_work(tokenizer):
    assert augmenter(tokenizer)[0] is None
    assert augmenter(tokenizer, wordDropout=0)[0] is None
    changer, _ = augmenter(tokenizer, wordSwap=0.9)
    assert changer.example({"text": "alone"}, 0, 0, 0) is None


def test_a_part_that_the_change_takes_away_stays_as_it_was(tokenizer):
    changer, task = augmenter(tokenizer, wordDropout=0.9)
    row = {"text": "word " * 40}
    assert len(task.encode(row)) == 4
    assert changer.example(row, 3, 0, 0) is None


def test_only_the_users_words_of_a_conversation_are_changed(tokenizer):
    changer, _ = augmenter(tokenizer, "ChatSFT", wordDropout=0.5)
    row = {
        "messages": [
            {"role": "system", "content": "a b c d e f g h"},
            {"role": "user", "content": "a b c d e f g h"},
            {"role": "assistant", "content": "a b c d e f g h"},
        ]
    }
    changed = changer.changed(row, 0, 0)["messages"]
    assert changed[0] == row["messages"][0]
    assert changed[1]["content"] != row["messages"][1]["content"]
    assert changed[2] == row["messages"][2]


# ---- paraphrases


class Shouts:
    """Says the same, louder."""

    def __init__(self):
        self.asked = []

    def paraphrase(self, texts):
        self.asked += texts
        return [text.upper() for text in texts]


@settings(deadline=None)
@given(chance=st.floats(0, 1), count=st.integers(0, 600), shift=st.integers(0, 50))
def test_which_rows_are_paraphrased_depends_on_their_content_only(chance, count, shift):
    task = task_for(training_plan(task="CausalLM"))
    rows = [Located(f"line {number}", {"text": f"row {number}"}) for number in range(count)]
    told = []
    louder = Shouts()
    found = list(paraphrased(rows, task, louder, chance, 7, told.append))
    assert [where for where, _ in found] == [where for where, _ in rows]
    assert [row["text"].lower() for _, row in found] == [row["text"] for _, row in rows]
    changed = {row["text"].lower() for _, row in found if row["text"].isupper()}
    assert sorted(changed) == sorted(louder.asked)
    assert told == [*range(256, count, 256), *([count] if count else [])]
    rest = list(paraphrased(rows[shift:], task, Shouts(), chance, 7, told.append))
    assert rest == found[shift:]
