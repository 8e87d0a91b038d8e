"""MaskedLM: which tokens are taken out, exact losses, and learning, on a tiny BERT over real tweets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from support.learning import assess, loss_of, scores, tiny_bert, train, tweet_rows, word_pieces
from support.plans import training_plan
from tunesmith_store.errors import UserError
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import IGNORE, BadRow, Example

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"), "BertForMaskedLM")


@pytest.fixture(scope="module")
def texts():
    return tweet_rows(240, 10)


def task_of(folder, part=0.15, seed=7, **changes):
    task = task_for(
        training_plan(
            task="MaskedLM", training={"max_length": 32, "seed": seed}, masked_lm={"mlmProbability": part}, **changes
        )
    )
    if folder is not None:
        task.load_processor(folder)
    return task


def encoded(task, rows):
    return [example for row in rows for example in task.encode(row)]


def test_a_row_needs_a_text():
    with pytest.raises(BadRow, match=r"has no field 'text' \(its fields: body\); set spec.dataset.columns.text"):
        task_of(None).check_row({"body": "hi"})


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path):
    tokenizer = word_pieces(tmp_path)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"spec.model.uri: the tokenizer has no mask token.*use task CausalLM"):
        task_of(tmp_path)


def test_the_tests_own_tokenizer_is_the_same_each_time(tmp_path):
    first, second = (word_pieces(tmp_path / name).backend_tokenizer.to_str() for name in ("first", "second"))
    assert first == second


def test_masks_depend_on_seed_epoch_and_text_and_on_nothing_else(bert, texts):
    task, other = task_of(bert), task_of(bert, seed=8)
    first, second = encoded(task, texts[0][:2])

    def labels(of, example):
        return of.masked(example)[1].tolist()

    torch.manual_seed(1)
    once = labels(task, first)
    torch.manual_seed(2)
    labels(task, second)
    assert labels(task, first) == once
    assert labels(task, replace(first, epoch=1)) != once
    assert labels(other, first) != once
    alone, beside = (task.collate(batch, CPU, False) for batch in ([first], [second, first]))
    length = first.length
    assert torch.equal(alone.inputs["input_ids"][0], beside.inputs["input_ids"][1, :length])


def test_of_the_tokens_to_guess_80_percent_are_masked_10_replaced_10_left(bert):
    task = task_of(bert)
    special = set(task.processor.all_special_ids)
    fates = {"masked": 0, "replaced": 0, "left": 0}
    draw = np.random.default_rng(0)
    ordinary = [number for number in range(len(task.processor)) if number not in special]
    chosen = places = 0
    for _ in range(600):
        ids = [task.processor.cls_token_id, *draw.choice(ordinary, 40).tolist(), task.processor.sep_token_id]
        seen, labels = task.masked(Example({"input_ids": ids}, len(ids), 1.0))
        guessed = labels != IGNORE
        assert not guessed[0]  # special tokens stay
        assert not guessed[-1]
        assert (labels[guessed] == np.array(ids)[guessed]).all()
        assert (seen[~guessed] == np.array(ids)[~guessed]).all()
        fates["masked"] += int((seen[guessed] == task.processor.mask_token_id).sum())
        fates["left"] += int((seen[guessed] == labels[guessed]).sum())
        others = guessed & (seen != task.processor.mask_token_id) & (seen != labels)
        fates["replaced"] += int(others.sum())
        assert not special & set(seen[others].tolist())
        chosen, places = chosen + int(guessed.sum()), places + 40
    assert chosen / places == pytest.approx(0.15)
    # four standard deviations of 3600 draws
    assert fates["masked"] / chosen == pytest.approx(0.8, abs=0.027)
    assert fates["replaced"] / chosen == pytest.approx(0.1, abs=0.02)
    assert fates["left"] / chosen == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("part", [0.15, 0.5])
def test_units_are_the_tokens_to_guess_known_before_any_is_masked(bert, texts, part):
    task = task_of(bert, part)
    examples = encoded(task, texts[0][:20])
    batch = task.collate(examples, CPU, False)
    assert batch.units == len(batch.labels) == sum(example.units for example in examples)
    ordinary = sum(example.length - 2 for example in examples)
    assert batch.units / ordinary == pytest.approx(float(part), abs=0.03)
    assert min(example.units for example in examples) >= 1


def test_a_text_without_a_known_token_has_nothing_to_guess(bert):
    assert task_of(bert).encode({"text": "☃"}) == []


def test_a_long_text_is_cut_at_max_length(bert):
    (example,) = task_of(bert).encode({"text": "word " * 100})
    assert (example.length, example.truncated) == (32, True)


def test_the_loss_of_a_batch_is_the_sum_over_its_examples(bert, texts):
    task = task_of(bert)
    model, examples = task.load_model(bert, dtype=torch.float32), encoded(task, texts[0][:12])
    single = sum(loss_of(task, model, [example]) for example in examples)
    assert loss_of(task, model, examples) == pytest.approx(single, rel=1e-5)


def test_the_loss_is_the_models_own(bert, texts):
    task = task_of(bert)
    model = task.load_model(bert, dtype=torch.float32).eval()
    batch = task.collate(encoded(task, texts[0][:6]), CPU, False)
    labels = torch.full(batch.inputs["input_ids"].shape, IGNORE)
    labels.view(-1)[batch.extras["kept"]] = batch.labels
    with torch.no_grad():
        expected = model(**batch.inputs, labels=labels).loss
        assert float(task.loss(model, batch)) / batch.units == pytest.approx(float(expected), rel=1e-5)


def test_an_evaluation_asks_the_same_however_it_is_cut_and_says_what_was_guessed(bert, texts):
    task = task_of(bert)
    model, examples = task.load_model(bert, dtype=torch.float32), encoded(task, texts[1])
    whole, parts = assess(task, model, examples, 30), assess(task, model, examples, 7)
    assert task.metrics(whole) == pytest.approx(task.metrics(parts), rel=1e-5)
    found = task.metrics(whole)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
    assert len(whole.outcomes) == len(examples)
    ids = examples[0].features["input_ids"]
    assert set(whole.outcomes[0].expected.split()) <= set(task.processor.convert_ids_to_tokens(ids))


def test_random_weights_are_the_same_on_every_rank(bert):
    models = [task_of(bert, seed=seed, model_init="Random").load_model(bert, dtype=torch.float32) for seed in (7, 7, 8)]
    first, same, other = (model.bert.encoder.layer[0].attention.self.query.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_tiny_bert_learns_from_random_weights(bert, texts):
    task = task_of(bert, 0.3, model_init="Random")
    model = task.load_model(bert, dtype=torch.float32)
    examples = encoded(task, texts[1])
    before = scores(task, model, examples)
    # the word pieces differ from process to process: among equal counts the tokenizer's trainer takes any
    rows, _ = tweet_rows(4000, 10)
    losses = train(task, model, encoded(task, rows), steps=200, size=24, rate=2e-3)
    after = scores(task, model, examples)
    assert losses[-1] < losses[0] - 1
    assert after["loss"] < before["loss"] - 0.5
    assert after["perplexity"] < before["perplexity"] * 2 / 3
    assert after["accuracy"] > before["accuracy"] + 0.03
