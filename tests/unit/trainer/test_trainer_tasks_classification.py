"""SequenceClassification: rows, classes, exact losses, and learning, on a tiny BERT and on the real MiniLM."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from assets import minilm
from support.learning import assess, loss_of, scores, tiny_bert, train, tweet_rows
from support.plans import training_plan
from tunesmith_store.errors import UserError
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import BadRow, DataSummary

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def tweets():
    return tweet_rows(96, 20)


def task_of(folder, rows=(), columns=None, training=None, **classification):
    plan = training_plan(
        task="SequenceClassification",
        training={"max_length": 32, **(training or {})},
        classification=classification,
        dataset={"train": {"uri": "s3://bucket/train.jsonl"}, "columns": columns or {}},
    )
    task = task_for(plan)
    if folder is not None:
        task.load_processor(folder)
        task.prepare(DataSummary(Counter(name for row in rows for name in task.labels_of(row))))
    return task


def encoded(task, rows):
    return [example for row in rows for example in task.encode(row)]


def loaded(task, folder):
    return task.load_model(folder, dtype=torch.float32)


# ---- rows


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"body": "hi", "label": 1}, "has no field 'text' (its fields: body, label); set spec.dataset.columns.text"),
        ({"text": "hi"}, "has no field 'label' (its fields: text); set spec.dataset.columns.label"),
        ({"text": 7, "label": 1}, "field 'text' is not a text but int"),
        ({"text": " ", "label": 1}, "field 'text' is empty"),
        ({"text": "hi", "label": None}, "field 'label' is empty"),
        ({"text": "hi", "label": ["a"]}, "field 'label' is not a class (a text or a whole number) but list"),
        ({"text": "hi", "label": 0.5}, "set spec.classification.problemType: Regression"),
    ],
)
def test_a_bad_row_is_told_what_is_wrong_and_what_to_do(row, said):
    with pytest.raises(BadRow) as error:
        task_of(None).check_row(row)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("kind", "label", "said"),
    [
        ("MultiLabel", "a", "field 'label' must be a list of classes, not str"),
        ("MultiLabel", ["a", {}], "field 'label' is not a class (a text or a whole number) but dict"),
        ("Regression", "much", "field 'label' is not a number to predict but 'much'"),
        ("Regression", float("nan"), "field 'label' is not a number to predict but nan"),
        ("Regression", True, "field 'label' is not a number to predict but True"),
    ],
)
def test_a_target_of_the_wrong_kind_is_a_bad_row(kind, label, said):
    with pytest.raises(BadRow) as error:
        task_of(None, problemType=kind).check_row({"text": "hi", "label": label})
    assert said in str(error.value)


def test_a_class_that_the_spec_does_not_list_is_a_bad_row_that_names_them():
    with pytest.raises(BadRow, match=r"'spam', which is none of spec.classification.labels: ham, eggs"):
        task_of(None, labels=["ham", "eggs"]).check_row({"text": "hi", "label": "spam"})


def test_a_held_out_class_that_training_never_saw_is_a_bad_row_that_names_them(bert):
    task = task_of(bert, [{"text": "a", "label": name} for name in ("b", "a")])
    with pytest.raises(BadRow, match=r"'c', which is none of those in the training data: a, b; correct it"):
        task.encode({"text": "hi", "label": "c"})


def test_the_second_text_of_a_pair_is_checked_under_its_own_name():
    task = task_of(None, columns={"textPair": "reply"})
    with pytest.raises(BadRow, match=r"has no field 'reply' .* set spec.dataset.columns.textPair"):
        task.check_row({"text": "hi", "label": 1})


def test_rows_are_checked_without_torch():
    code = (
        "import sys; from support.plans import training_plan; from tunesmith_trainer.tasks import task_for\n"
        "for name, row in {'SequenceClassification': {'text': 'a', 'label': 1}, 'MaskedLM': {'text': 'a'},\n"
        "  'TokenClassification': {'tokens': ['a'], 'tags': ['O']}, 'Seq2Seq': {'source': 'a', 'target': 'b'}}.items():\n"
        "    task = task_for(training_plan(task=name)); task.check_row(row); task.labels_of(row); task.texts_of(row)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- classes


def test_numbers_are_classes_in_the_order_of_numbers(bert):
    task = task_of(bert, [{"text": "a", "label": label} for label in (10, "9", 1.0, 2)])
    assert task.objective.names == ["1", "2", "9", "10"]
    assert task.encode({"text": "a", "label": 9})[0].features["labels"] == [2]


def test_where_the_spec_names_classes_a_number_is_a_place_among_them(bert):
    task = task_of(bert, labels=["bad", "good"])
    assert task.labels_of({"text": "a", "label": 1}) == ["good"]
    assert task.labels_of({"text": "a", "label": "0"}) == ["bad"]  # as CSV has it


def test_one_class_is_nothing_to_learn(bert):
    with pytest.raises(UserError, match="field 'label' has the classes a; there must be at least 2"):
        task_of(bert, [{"text": "a", "label": "a"}])


def test_thousands_of_classes_are_a_wrong_column(bert):
    with pytest.raises(UserError, match=r"spec.dataset.columns.label: field 'label' has 1001 different classes"):
        task_of(bert, [{"text": "a", "label": number} for number in range(1001)])


def test_a_tuned_model_keeps_its_classes_their_order_and_its_head(tmp_path, tweets):
    names = ["positive", "negative", "neutral"]  # not sorted
    folder = tiny_bert(tmp_path, "BertForSequenceClassification", id2label=dict(enumerate(names)))
    task = task_of(folder, tweets[0])
    model = loaded(task, folder)
    assert task.objective.names == names
    assert list(model.config.id2label.values()) == names
    from transformers import AutoModelForSequenceClassification

    before = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.classifier.weight, before.classifier.weight)
    with pytest.raises(UserError, match=r"another order; it has them as positive, negative, neutral"):
        task_of(folder, labels=sorted(names))


def test_a_new_head_is_the_same_on_every_rank_and_follows_the_seed(bert, tweets):
    heads = []
    for seed, disturbance in ((7, 1), (7, 2), (8, 1)):
        task = task_of(bert, tweets[0], training={"seed": seed})
        torch.manual_seed(disturbance)
        model = loaded(task, bert)
        heads.append(model.classifier.weight)
        assert task.head_modules(model) == ["classifier"]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_other_classes_than_the_models_give_a_new_head_of_their_size(tmp_path, tweets):
    folder = tiny_bert(tmp_path, "BertForSequenceClassification", num_labels=5)
    model = loaded(task_of(folder, tweets[0]), folder)
    assert model.classifier.out_features == 3
    assert model.config.problem_type == "single_label_classification"
    assert model.config.label2id == {"negative": 0, "neutral": 1, "positive": 2}


def test_texts_are_cut_where_the_model_has_no_more_positions(bert):
    task = task_of(bert, labels=["a", "b"], training={"max_length": 1024})
    (long,) = task.encode({"text": "word " * 500, "label": "a"})
    (short,) = task.encode({"text": "word", "label": "a"})
    assert (long.length, long.truncated) == (64, True)
    assert not short.truncated
    roberta = bert.parent / "roberta"
    roberta.mkdir(exist_ok=True)
    (roberta / "config.json").write_text('{"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}')
    from tunesmith_trainer.tasks.classes import position_limit

    assert position_limit(roberta, 1024) == 512


def test_pairs_are_told_apart_and_the_longer_text_is_cut_first(bert):
    task = task_of(bert, labels=["a", "b"], columns={"textPair": "reply"}, training={"max_length": 16})
    (example,) = task.encode({"text": "word " * 50, "reply": "yes", "label": "a"})
    kinds = example.features["token_type_ids"]
    assert example.truncated
    assert kinds == sorted(kinds)
    assert 2 <= sum(kinds) < 8  # all of the reply, and its end


# ---- losses


def mixed(rows, kind):
    """Targets of each kind that the texts themselves decide."""
    marks = {"mention": "@", "link": "http", "shout": "!"}
    made = []
    for row in rows:
        found = [name for name, mark in marks.items() if mark in row["text"]]
        label = {"SingleLabel": row["label"], "MultiLabel": found, "Regression": len(row["text"]) / 100}[kind]
        made.append({"text": row["text"], "label": label})
    return made


@pytest.mark.parametrize("kind", ["SingleLabel", "MultiLabel", "Regression"])
def test_the_loss_of_a_batch_is_the_sum_over_its_examples(bert, tweets, kind):
    rows = mixed(tweets[0][:12], kind)
    extra = {} if kind == "Regression" else {"classWeights": "Balanced"}
    task = task_of(bert, rows, problemType=kind, **extra)
    model, examples = loaded(task, bert), encoded(task, rows)
    single = sum(loss_of(task, model, [example]) for example in examples)
    assert loss_of(task, model, examples) == pytest.approx(single, rel=1e-5)
    whole, parts = assess(task, model, examples, 12), assess(task, model, examples, 5)
    assert task.metrics(whole) == pytest.approx(task.metrics(parts), rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", ["None", "Balanced"])
def test_the_mean_loss_of_one_class_each_is_torchs(bert, tweets, smoothing, weights):
    rows = [{"text": row["text"], "label": "a" if number % 4 else "b"} for number, row in enumerate(tweets[0][:16])]
    task = task_of(bert, rows, classWeights=weights, training={"label_smoothing_factor": smoothing})
    model = loaded(task, bert).eval()
    batch = task.collate(encoded(task, rows), CPU, False)
    # 12 of a and 4 of b: 16 / (2 * 12) and 16 / (2 * 4)
    weight = torch.tensor([2 / 3, 2.0]) if weights == "Balanced" else None
    with torch.no_grad():
        logits = model(**batch.inputs).logits
        expected = functional.cross_entropy(logits, batch.labels, weight=weight, label_smoothing=smoothing)
        plain = functional.cross_entropy(logits, batch.labels, weight=weight)
        assert float(task.loss(model, batch)) / batch.units == pytest.approx(float(expected), rel=1e-5)
        # smoothing is for training: what is held out is measured without
        assert task.metrics(task.assess(model, batch))["loss"] == pytest.approx(float(plain), rel=1e-5)


def test_balanced_weights_are_scikit_learns(bert):
    from sklearn.utils.class_weight import compute_class_weight

    labels = ["a"] * 7 + ["b"] * 2 + ["c"]
    task = task_of(bert, [{"text": "x", "label": label} for label in labels], classWeights="Balanced")
    expected = compute_class_weight("balanced", classes=np.array(["a", "b", "c"]), y=labels)
    assert task.objective.weights == pytest.approx(list(expected))
    assert task.encode({"text": "x", "label": "c"})[0].units == pytest.approx(expected[2])


def test_the_mean_loss_of_several_classes_each_is_torchs(bert, tweets):
    rows = mixed(tweets[0][:16], "MultiLabel")
    task = task_of(bert, rows, problemType="MultiLabel", classWeights="Balanced")
    model = loaded(task, bert).eval()
    assert model.config.problem_type == "multi_label_classification"
    batch = task.collate(encoded(task, rows), CPU, False)
    criterion = nn.BCEWithLogitsLoss(weight=torch.tensor(task.objective.weights))
    with torch.no_grad():
        expected = criterion(model(**batch.inputs).logits, batch.labels)
        assert float(task.loss(model, batch)) / batch.units == pytest.approx(float(expected), rel=1e-5)


def test_smoothing_has_no_meaning_for_numbers():
    with pytest.raises(UserError, match=r"spec.training.labelSmoothingFactor .* Regression has none"):
        task_of(None, problemType="Regression", training={"label_smoothing_factor": 0.1})


# ---- learning


def test_minilm_learns_the_sentiment_of_real_tweets(tweets):
    learned, held_out = tweets
    task = task_of(minilm(), learned, training={"max_length": 24})
    model = loaded(task, minilm())
    for name, part in model.named_parameters():  # the last layer is enough for a test, and quick
        part.requires_grad_(name.startswith(("bert.encoder.layer.5", "bert.pooler", "classifier")))
    examples = encoded(task, held_out)
    before = scores(task, model, examples, 60)
    losses = train(task, model, encoded(task, learned), steps=12, size=16, rate=1e-3)
    after = assess(task, model, examples, 60)
    found = task.metrics(after)
    assert losses[-1] < losses[0]
    assert found["loss"] < before["loss"] - 0.05
    assert found["accuracy"] > before["accuracy"] + 0.1
    assert found["f1"] > before["f1"] + 0.1
    names, matrix = task.confusion_of(after)
    assert names == ["negative", "neutral", "positive"]
    assert [sum(row) for row in matrix] == [20, 20, 20]
    assert sum(matrix[number][number] for number in range(3)) / 60 == pytest.approx(found["accuracy"])


def test_outcomes_name_the_example_and_say_what_was_expected_and_what_was_said(bert, tweets):
    from dataclasses import replace

    task = task_of(bert, tweets[0])
    marked = [
        replace(example, features={**example.features, "index": 40 + number})
        for number, example in enumerate(encoded(task, tweets[0][:5]))
    ]
    found = assess(task, loaded(task, bert), marked)
    assert [outcome.index for outcome in found.outcomes] == [40, 41, 42, 43, 44]
    assert [outcome.expected for outcome in found.outcomes] == [row["label"] for row in tweets[0][:5]]
    assert sum(outcome.loss for outcome in found.outcomes) == pytest.approx(found.sums["loss"][0])
    assert all("%" in outcome.predicted for outcome in found.outcomes)


def test_a_tiny_bert_learns_several_classes_each(bert):
    learned, held_out = (mixed(rows, "MultiLabel") for rows in tweet_rows(240, 20))
    task = task_of(bert, learned, problemType="MultiLabel")
    model = loaded(task, bert)
    examples = encoded(task, held_out)
    before = scores(task, model, examples)
    train(task, model, encoded(task, learned), steps=30, size=16, rate=3e-3)
    after = scores(task, model, examples)
    assert after["loss"] < before["loss"] - 0.1
    assert after["f1Micro"] > before["f1Micro"] + 0.1
    assert after["accuracy"] > before["accuracy"] + 0.1


def test_a_tiny_bert_learns_a_number(bert):
    learned, held_out = (mixed(rows, "Regression") for rows in tweet_rows(240, 20))
    task = task_of(bert, learned, problemType="Regression")
    model = loaded(task, bert)
    assert model.config.num_labels == 1
    examples = encoded(task, held_out)
    before = scores(task, model, examples)
    train(task, model, encoded(task, learned), steps=30, size=16, rate=3e-3)
    after = scores(task, model, examples)
    assert after["loss"] == pytest.approx(after["mse"])
    assert after["mse"] < before["mse"] / 2
    assert after["pearson"] > max(0.5, before["pearson"])


def test_adapters_train_and_the_new_head_trains_whole(bert, tweets):
    from peft import LoraConfig, get_peft_model

    task = task_of(bert, tweets[0])
    model = loaded(task, bert)
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=task.head_modules(model))
    model = get_peft_model(model, config)
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    assert any("lora_A" in name for name in trained)
    assert any("classifier.modules_to_save" in name for name in trained)
    losses = train(task, model, encoded(task, tweets[0][:16]), steps=25, size=16, rate=2e-2)
    assert losses[-1] < losses[0] - 0.1


def test_a_new_head_stays_in_full_precision_above_a_4_bit_body(bert, tweets):
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    task = task_of(bert, tweets[0])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = task.load_model(bert, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})
    assert isinstance(model.bert.encoder.layer[0].attention.self.query, Linear4bit)
    assert type(model.classifier) is nn.Linear
    assert config.llm_int8_skip_modules is None  # the caller's own is left as it was
    assert loss_of(task, model, encoded(task, tweets[0][:4])) > 0


def test_a_causal_model_reads_the_class_at_the_last_token_whatever_the_padding(tmp_path, tweets):
    from transformers import LlamaConfig, LlamaModel

    from support.learning import word_pieces

    tokenizer = word_pieces(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(tmp_path)
    task = task_of(tmp_path, tweets[0])
    model, examples = loaded(task, tmp_path), encoded(task, tweets[0][:8])
    assert task.head_modules(model) == ["score"]
    single = sum(loss_of(task, model, [example]) for example in examples)
    assert loss_of(task, model, examples) == pytest.approx(single, rel=1e-5)
