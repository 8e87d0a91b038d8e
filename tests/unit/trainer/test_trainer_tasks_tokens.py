"""TokenClassification: words and tags, exact losses, entity scores, and learning, on a tiny BERT over real tweets."""

from collections import Counter

import pytest
import torch
from torch.nn import functional

from support.learning import assess, loss_of, scores, tiny_bert, train, tweet_rows
from support.plans import training_plan
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import IGNORE, BadRow, DataSummary

CPU = torch.device("cpu")


def tagged(rows):
    """Real tweets, in which links and hashtags (of any number of words in a row) and mentions are entities."""
    made = []
    for row in rows:
        words, tags, before = row["text"].split(), [], "O"
        for word in words:
            kind = {"@": "USER", "#": "TOPIC", "h": "LINK" if word.startswith("http") else ""}.get(word[0], "")
            tag = "O" if not kind else f"I-{kind}" if before.endswith(kind) else f"B-{kind}"
            tags.append(tag)
            before = tag
        made.append({"tokens": words, "tags": tags})
    return made


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tweets():
    return tuple(tagged(rows) for rows in tweet_rows(240, 15))


def task_of(folder, rows=(), training=None, **classification):
    plan = training_plan(
        task="TokenClassification", training={"max_length": 48, **(training or {})}, classification=classification
    )
    task = task_for(plan)
    if folder is not None:
        task.load_processor(folder)
        task.prepare(DataSummary(Counter(name for row in rows for name in task.labels_of(row))))
    return task


def encoded(task, rows):
    return [example for row in rows for example in task.encode(row)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"words": ["a"]}, "has no field 'tokens' (its fields: words); set spec.dataset.columns.tokens"),
        ({"tokens": ["a"]}, "has no field 'tags' (its fields: tokens); set spec.dataset.columns.tags"),
        ({"tokens": "a b", "tags": ["O"]}, "field 'tokens' must be a list of words, not str"),
        ({"tokens": [], "tags": []}, "field 'tokens' must be a list of words, not an empty list"),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "field 'tokens': word 2 is not a text but int"),
        ({"tokens": ["a"], "tags": "O"}, "field 'tags' must be a list of tags, not str"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "field 'tokens' has 2 words, but field 'tags' has 1 tags"),
        ({"tokens": ["a"], "tags": [None]}, "field 'tags' is not a class"),
    ],
)
def test_a_bad_row_is_told_what_is_wrong(row, said):
    with pytest.raises(BadRow) as error:
        task_of(None).check_row(row)
    assert said in str(error.value)


def test_only_the_first_token_of_a_word_is_learned(bert):
    task = task_of(bert, labels=["O", "B-X"])
    (example,) = task.encode({"tokens": ["unforgettable", "a"], "tags": ["B-X", "O"]})
    pieces = len(task.processor("unforgettable", add_special_tokens=False)["input_ids"])
    assert pieces > 1
    assert example.features["labels"] == [IGNORE, 1, *[IGNORE] * (pieces - 1), 0, IGNORE]
    assert example.units == 2


def test_tags_may_be_numbers_of_the_listed_names(bert):
    task = task_of(bert, labels=["O", "B-X", "I-X"])
    (example,) = task.encode({"tokens": ["a", "b", "c"], "tags": [1, 2, 0]})
    assert [label for label in example.features["labels"] if label != IGNORE] == [1, 2, 0]


def test_words_beyond_max_length_are_cut_with_their_tags(bert):
    task = task_of(bert, labels=["O", "B-X"], training={"max_length": 8})
    (example,) = task.encode({"tokens": ["a"] * 20, "tags": ["O"] * 20})
    assert example.truncated
    assert (example.length, example.units) == (8, 6)


def test_a_byte_level_tokenizer_sees_words_as_in_running_text(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [row["text"] for row in tweet_rows(200)[0]]
    base.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<pad>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    task = task_of(tmp_path, labels=["O", "B-X"])
    (example,) = task.encode({"tokens": ["what", "a", "flight"], "tags": ["O", "O", "B-X"]})
    assert example.features["input_ids"] == tokenizer("what a flight")["input_ids"]


@pytest.mark.parametrize("weights", ["None", "Balanced"])
def test_the_loss_of_a_batch_is_the_sum_over_its_examples_and_the_mean_is_torchs(bert, tweets, weights):
    rows = tweets[0][:12]
    task = task_of(bert, rows, classWeights=weights, training={"label_smoothing_factor": 0.1})
    model, examples = task.load_model(bert, dtype=torch.float32), encoded(task, rows)
    single = sum(loss_of(task, model, [example]) for example in examples)
    assert loss_of(task, model, examples) == pytest.approx(single, rel=1e-5)
    batch = task.collate(examples, CPU, False)
    labels = torch.full(batch.inputs["input_ids"].shape, IGNORE)
    labels.view(-1)[batch.extras["kept"]] = batch.labels
    weight = torch.tensor(task.objective.weights) if task.objective.weights else None
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        expected = functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), weight=weight, ignore_index=IGNORE, label_smoothing=0.1
        )
    assert loss_of(task, model, examples) / batch.units == pytest.approx(float(expected), rel=1e-5)


def test_metrics_do_not_depend_on_how_the_data_are_cut(bert, tweets):
    task = task_of(bert, tweets[0])
    model, examples = task.load_model(bert, dtype=torch.float32), encoded(task, tweets[1])
    whole, parts = assess(task, model, examples, 45), assess(task, model, examples, 7)
    assert task.metrics(whole) == pytest.approx(task.metrics(parts), rel=1e-5)


class Oracle(torch.nn.Module):
    """Says the classes it was given, batch after batch."""

    def __init__(self, answers, classes):
        super().__init__()
        self.answers, self.classes = list(answers), classes

    def forward(self, input_ids, **inputs):
        said = self.answers.pop(0)
        logits = torch.zeros(*input_ids.shape, self.classes)
        logits[0, range(1, 1 + len(said)), said] = 9.0
        return type("Output", (), {"logits": logits})


def test_entities_count_only_as_wholes(bert):
    names = ["O", "B-PER", "I-PER"]
    task = task_of(bert, labels=names)
    row = {"tokens": ["a", "b", "c", "d"], "tags": ["B-PER", "I-PER", "O", "B-PER"]}
    (example,) = task.encode(row)
    assert example.length == 6
    # the first person is found by half, the second whole
    found = assess(task, Oracle([[1, 0, 0, 1]], 3), [example])
    metrics = task.metrics(found)
    assert metrics["accuracy"] == pytest.approx(3 / 4)
    assert (metrics["precision"], metrics["recall"], metrics["f1"]) == (0.5, 0.5, 0.5)
    assert task.confusion_of(found) == (names, [[1, 0, 0], [0, 2, 0], [1, 0, 0]])
    assert found.outcomes[0].expected == "B-PER I-PER O B-PER"
    assert found.outcomes[0].predicted == "B-PER O O B-PER"


def test_tags_of_single_words_are_scored_as_classes(bert):
    task = task_of(bert, labels=["NOUN", "VERB"])
    (example,) = task.encode({"tokens": ["a", "b", "c", "d"], "tags": ["NOUN", "NOUN", "NOUN", "VERB"]})
    metrics = task.metrics(assess(task, Oracle([[0, 0, 0, 0]], 2), [example]))
    assert metrics["recall"] == pytest.approx((1 + 0) / 2)
    assert metrics["precision"] == pytest.approx((3 / 4 + 0) / 2)


def test_a_tiny_bert_learns_the_entities_of_real_tweets(bert, tweets):
    learned, held_out = tweets
    task = task_of(bert, learned)
    assert task.objective.names == sorted({tag for row in learned for tag in row["tags"]})
    model = task.load_model(bert, dtype=torch.float32)
    assert task.head_modules(model) == ["classifier"]
    examples = encoded(task, held_out)
    before = scores(task, model, examples)
    losses = train(task, model, encoded(task, learned), steps=30, size=16, rate=3e-3)
    after = scores(task, model, examples)
    assert losses[-1] < losses[0] / 2
    assert after["loss"] < before["loss"] / 2
    assert after["f1"] > before["f1"] + 0.3
    assert after["accuracy"] > 0.8
