"""Scores from additive counts agree with scikit-learn; padding puts zeros where nothing is."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn import metrics

from tunesmith_trainer.tasks import scores
from tunesmith_trainer.tasks.base import Example
from tunesmith_trainer.tasks.collator import length_mask, pad, pad_rows, stack, text_inputs
from tunesmith_trainer.tasks.scores import has_spans
from tunesmith_trainer.tasks.token_classification import span_counts, spans_of

CPU = torch.device("cpu")
pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def added(left, right):
    return {name: [a + b for a, b in zip(values, right[name], strict=True)] for name, values in left.items()}


@given(pairs, st.integers(0, 60))
def test_scores_of_classes_are_scikit_learns_however_the_data_are_cut(data, cut):
    true, said = (np.array(side, dtype=int) for side in zip(*data, strict=True))
    parts = [scores.class_sums(true[part], said[part], 6) for part in (slice(cut), slice(cut, None))]
    sums = added(*parts)
    found = scores.class_scores(sums)
    macro = metrics.precision_recall_fscore_support(true, said, average="macro", zero_division=0)
    assert found["precision"] == pytest.approx(macro[0])
    assert found["recall"] == pytest.approx(macro[1])
    assert found["f1"] == pytest.approx(macro[2])
    assert found["f1Micro"] == pytest.approx(metrics.accuracy_score(true, said))
    assert scores.matthews(sums) == pytest.approx(metrics.matthews_corrcoef(true, said), abs=1e-12)
    assert scores.confusion_matrix(sums) == metrics.confusion_matrix(true, said, labels=range(6)).tolist()


@given(st.lists(st.tuples(*[st.booleans()] * 6), min_size=1, max_size=40))
def test_scores_of_several_classes_each_are_scikit_learns(rows):
    true, said = np.array(rows)[:, :3], np.array(rows)[:, 3:]
    sums = scores.multi_label_sums(true, said)
    found = scores.class_scores(sums)
    occurring = [number for number in range(3) if true[:, number].any() or said[:, number].any()]
    if occurring:
        macro = metrics.f1_score(true, said, labels=occurring, average="macro", zero_division=0)
        assert found["f1"] == pytest.approx(macro)
    assert found["f1Micro"] == pytest.approx(metrics.f1_score(true, said, average="micro", zero_division=0))
    assert sums["exact"][0] / len(rows) == pytest.approx(metrics.accuracy_score(true, said))


def test_too_many_classes_leave_no_confusion_matrix_but_all_scores():
    sums = scores.class_sums([0, 500, 700], [0, 500, 3], 800)
    assert scores.confusion_matrix(sums) is None
    assert scores.class_scores(sums)["f1Micro"] == pytest.approx(2 / 3)


@example([(0.0, 1e-123), (1e-123, 0.0)])  # the product of the two spreads is too small for a float
@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 2), min_size=2, max_size=50))
def test_scores_of_numbers_are_numpys(data):
    true, said = np.array(data).T
    found = scores.regression_scores(scores.regression_sums(true, said))
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(true, said), abs=1e-9)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(true, said), abs=1e-9)
    if true.std() > 1e-2 and said.std() > 1e-2:
        assert found["pearson"] == pytest.approx(np.corrcoef(true, said)[0, 1], abs=1e-6)


def test_numbers_that_do_not_vary_correlate_with_nothing():
    assert scores.regression_scores(scores.regression_sums([0.1] * 7, range(7)))["pearson"] == 0


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O B-PER I-PER O B-LOC", {("PER", 1, 3), ("LOC", 4, 5)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("I-PER I-PER I-LOC", {("PER", 0, 2), ("LOC", 2, 3)}),
        ("B-PER I-LOC O", {("PER", 0, 1), ("LOC", 1, 2)}),
        ("O O", set()),
    ],
)
def test_spans_are_read_as_conlleval_reads_them(tags, spans):
    assert spans_of(tags.split()) == spans


def test_an_entity_counts_only_with_its_exact_words_and_type():
    expected = ["B-PER", "I-PER", "O", "B-LOC"]
    assert span_counts(expected, expected) == (2, 2, 2)
    assert span_counts(expected, ["B-PER", "O", "O", "B-ORG"]) == (0, 2, 2)
    assert span_counts(expected, ["O", "O", "O", "B-LOC"]) == (1, 1, 2)


def test_tags_of_single_words_are_no_spans():
    assert has_spans(["B-PER", "I-PER", "O"])
    assert not has_spans(["NOUN", "VERB"])
    assert not has_spans(["B-PER", "I-PER", "NOUN"])


def test_rows_are_padded_on_the_right_to_the_longest():
    assert pad_rows([[1, 2, 3], [], [4]], 9, CPU).tolist() == [[1, 2, 3], [9, 9, 9], [4, 9, 9]]
    assert pad_rows([[0.5], [1.0, 2.0]], 0, CPU).dtype is torch.float32
    assert length_mask([2, 0, 1], CPU).tolist() == [[1, 1], [0, 0], [1, 0]]


def test_a_batch_of_texts_has_an_attention_mask_and_token_types_where_they_are_given():
    short = Example({"input_ids": [5], "token_type_ids": [0], "labels": [0.0, 1.0]}, 1, 1.0)
    long = Example({"input_ids": [6, 7], "token_type_ids": [0, 1], "labels": [1.0, 1.0]}, 2, 1.0)
    inputs = text_inputs([short, long], 3, CPU)
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {
        "input_ids": [[5, 3], [6, 7]],
        "attention_mask": [[1, 0], [1, 1]],
        "token_type_ids": [[0, 0], [0, 1]],
    }
    assert stack([short, long], "labels", CPU).tolist() == [[0.0, 1.0], [1.0, 1.0]]
    assert pad([short, long], "input_ids", 3, CPU).dtype is torch.int64
