"""What is right about an answer, how sure a comparison is, and which rows are compared."""

import json

import numpy
import pytest
from scipy import stats

from tunesmith_api.keys import Reason
from tunesmith_api.plan import EvaluationPlan, ServingPlan
from tunesmith_api.v1alpha1.gate import Metric
from tunesmith_server.evaluation.figures import Candidate, figures_of, metric_of, score_of
from tunesmith_server.evaluation.interview import Answer, Answers
from tunesmith_server.evaluation.page import page_of
from tunesmith_server.evaluation.rows import Message, Row, draw, read_rows
from tunesmith_server.evaluation.statistics import mean_difference, paired_difference, perplexity_increase, wilson
from tunesmith_store.errors import UserError
from tunesmith_store.store import NotFound, ObjectInfo


@pytest.mark.parametrize(("successes", "trials"), [(81, 263), (15, 148), (0, 20), (29, 29), (1, 1)])
def test_the_interval_of_a_share_is_wilsons(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_a_paired_difference_is_that_of_newcombes_table():
    # Newcombe 1998, Statistics in Medicine 17: 2635-2650, table III, method 10
    assert paired_difference(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_the_interval_of_a_paired_difference_is_the_other_way_round_for_the_other_way_round():
    low, high = paired_difference(150, 30, 8, 12)
    assert paired_difference(150, 8, 30, 12) == pytest.approx((-high, -low))


def test_few_rows_that_all_agree_are_not_taken_for_certainty():
    low, high = paired_difference(12, 0, 0, 0)
    assert low < -0.1
    assert high > 0.1
    assert paired_difference(120, 0, 0, 0)[1] < 0.05


def test_95_of_100_intervals_have_the_true_difference():
    chance, kept = numpy.random.default_rng(7), 0
    shares = (0.70, 0.12, 0.03, 0.15)
    for cells in chance.multinomial(60, shares, size=2000):
        low, high = paired_difference(*map(int, cells))
        kept += low <= shares[1] - shares[2] <= high
    assert 0.93 < kept / 2000 < 0.98


def test_bootstrap_intervals_are_about_those_of_a_normal_distribution():
    chance = numpy.random.default_rng(3)
    first, second = chance.normal(0.8, 0.1, 400), chance.normal(0.7, 0.1, 400)
    low, high = mean_difference(list(first), list(second))
    half = 1.96 * (first - second).std() / 20
    assert (low, high) == pytest.approx(((first - second).mean() - half, (first - second).mean() + half), abs=0.002)


def test_perplexity_is_compared_over_tokens_and_alike_rows_leave_no_doubt():
    low, high = perplexity_increase([1.0, 2.0, 8.0], [1.1, 2.2, 8.8], [1, 2, 8])
    assert (low, high) == pytest.approx((10.517, 10.517), abs=0.01)


def row(question: str, reference: str) -> Row:
    return Row(messages=(Message(role="user", content=question),), reference=reference)


def test_labels_are_matched_whole_and_texts_by_words():
    labels = [row(f"{number}", label) for number, label in enumerate(["positive", "negative"] * 3)]
    assert metric_of(labels) is Metric.EXACT_MATCH
    assert metric_of([row("a", "The flight was late, sadly, once again."), row("b", "Yes")]) is Metric.F1
    assert metric_of([row("a", "Paris"), row("b", "Rome")]) is Metric.F1
    assert score_of(Metric.EXACT_MATCH, " Positive.", "positive") == 1
    assert score_of(Metric.EXACT_MATCH, "positive, I think", "positive") == 0
    assert score_of(Metric.F1, "the capital is Paris", "Paris") == pytest.approx(0.4)
    assert score_of(Metric.F1, "", "Paris") == 0


def candidate(*answers: Answer, size: int = 10) -> Candidate:
    return Candidate(Answers(answers=answers, tokens_per_second=20.0, memory_bytes=1000), size)


def test_figures_are_of_the_rows_that_both_could_answer():
    rows = [row(str(number), label) for number, label in enumerate(["yes", "no"] * 5)]
    first = candidate(*(Answer(text=it.reference, loss=0.1, tokens=1) for it in rows[:-1]), Answer(), size=20)
    second = candidate(*(Answer(text="yes", loss=0.2, tokens=1) for it in rows))
    found = figures_of(rows, first, second, "abc")
    assert (found.examples, found.skipped, found.metric) == (9, 1, Metric.EXACT_MATCH)
    assert (found.baseline.accuracy_percent, found.quantized.accuracy_percent) == ("100.00", "55.56")
    assert found.baseline.perplexity == "1.1052"
    assert found.accuracy_drop_percent is not None
    assert found.accuracy_drop_percent.value == "44.44"
    assert found.agreement_percent is not None
    assert found.agreement_percent.value == "55.56"
    assert found.perplexity_increase_percent is not None
    assert found.perplexity_increase_percent.value == "10.52"
    assert (found.baseline.size_bytes, found.quantized.size_bytes) == (20, 10)


def test_without_rows_only_what_takes_none_is_measured():
    found = figures_of([], candidate(), candidate(), "")
    assert (found.examples, found.metric, found.accuracy_drop_percent) == (0, None, None)
    assert found.quantized.tokens_per_second == "20.00"


def test_what_rows_and_models_say_is_text_on_the_page():
    rows = [row("<script>alert(1)</script>", "yes")]
    first, second = (candidate(Answer(text=it, loss=0.1, tokens=1)) for it in ("yes", "<b>no</b>"))
    values = {
        "name": "m", "namespace": "n", "uid": "u", "revision": "m-r1", "model_uri": "s3://models/m", "quantization": "Q4_0",
        "engine": "LlamaCpp", "context_length": 256, "parallel_requests": 2, "artifact_uri": "s3://models/m/quantized",
    }  # fmt: skip
    page = page_of(ServingPlan(**values), figures_of(rows, first, second, "abc"), rows, first, second)
    assert "Q4_0 against the unquantized model" in page
    assert "&lt;script&gt;alert(1)" in page
    assert "&lt;b&gt;no" in page
    assert "<script>" not in page


class Files:
    """A store of a few objects."""

    def __init__(self, **files: str) -> None:
        self._files = {f"s3://data/{name}": text.encode() for name, text in files.items()}

    def head(self, uri: str) -> ObjectInfo:
        return ObjectInfo(uri, len(self.get_bytes(uri)), "")

    def list(self, uri: str) -> list[ObjectInfo]:
        return [self.head(it) for it in sorted(self._files) if it.startswith(f"{uri}/")]

    def get_bytes(self, uri: str) -> bytes:
        if uri not in self._files:
            raise NotFound(uri)
        return self._files[uri]


def chat(*contents: object) -> str:
    roles = ("user", "assistant") * 5
    return json.dumps({"messages": [{"role": role, "content": it} for role, it in zip(roles, contents)]}) + "\n"  # noqa: B905


def test_rows_come_from_a_file_or_a_folder_or_the_manifest():
    store = Files(
        **{
            "one.jsonl": chat("a", "b"),
            "many/2.jsonl": chat("e", "f"),
            "many/1.jsonl": chat("c", "d"),
            "many/": "",
            "many/x.txt": "no",
        }
    )
    rows, digest = read_rows(store, EvaluationPlan(uri="s3://data/one.jsonl"))
    assert [it.reference for it in rows] == ["b"]
    assert len(digest) == 64
    assert [it.reference for it in read_rows(store, EvaluationPlan(uri="s3://data/many/"))[0]] == ["d", "f"]
    parts = [{"type": "text", "text": "g"}, {"type": "text", "text": "h"}]
    (found,), _ = read_rows(store, EvaluationPlan(inline=chat(parts, "i")))
    assert (found.messages[0].content, found.reference) == ("gh", "i")
    assert read_rows(store, EvaluationPlan())[0] == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", "line 1 is no chat row"),
        ("no json", "line 1 is no chat row"),
        (chat("a", "b") + chat("a"), "line 2: messages must end with an assistant's answer"),
        (chat([{"type": "image"}], "b"), "only parts of text"),
        ("\n", "has no rows"),
    ],
)
def test_a_bad_row_is_named(text, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        read_rows(Files(**{"a.jsonl": text}), EvaluationPlan(uri="s3://data/a.jsonl"))
    assert caught.value.reason is Reason.DATASET_INVALID


def test_missing_rows_are_told():
    with pytest.raises(UserError, match="no evaluation set at s3://data/gone"):
        read_rows(Files(), EvaluationPlan(uri="s3://data/gone.jsonl"))


def test_the_same_rows_are_drawn_again():
    rows = [row(str(number), "x") for number in range(100)]
    some = draw(rows, EvaluationPlan(max_examples=10, seed=3))
    assert some == draw(rows, EvaluationPlan(max_examples=10, seed=3))
    assert some != draw(rows, EvaluationPlan(max_examples=10, seed=4))
    assert [int(it.messages[0].content) for it in some] == sorted(int(it.messages[0].content) for it in some)
    assert draw(rows, EvaluationPlan(max_examples=100)) == rows


def test_texts_with_classes_are_read_by_the_names_of_their_fields():
    inline = '{"text": "a", "label": 1}\n{"text": "b", "text_pair": "c", "label": "yes"}\n'
    rows, _ = read_rows(Files(), EvaluationPlan(inline=inline))
    assert [(it.text, it.text_pair, it.reference) for it in rows] == [("a", None, "1"), ("b", "c", "yes")]
    assert rows[1].question == "b\nc"
    named = EvaluationPlan(inline='{"body": "a", "kind": "x"}', text_field="body", label_field="kind")
    assert read_rows(Files(), named)[0] == [Row(text="a", reference="x")]


@pytest.mark.parametrize("row", ['{"text": "a", "label": ["x", "y"]}', '{"text": "", "label": "x"}', '{"label": "x"}',
                                 '{"text": "a", "label": 0.5}', '{"text": "a", "label": true}'])  # fmt: skip
def test_a_row_without_one_text_and_one_class_is_named(row):
    with pytest.raises(UserError, match="inline line 1 is no text with one class"):
        read_rows(Files(), EvaluationPlan(inline=row))


def test_of_a_class_every_character_counts():
    rows = [Row(text="a", reference="+"), Row(text="b", reference="-"), Row(text="c", reference="+")]
    first, second = (
        Candidate(Answers(answers=tuple(Answer(text=it, loss=0.1, tokens=1) for it in said), tokens_per_second=1, memory_bytes=1), 1)
        for said in ("+-+", "+++")
    )  # fmt: skip
    found = figures_of(rows, first, second, "d")
    assert found.metric is Metric.EXACT_MATCH
    assert (found.baseline.accuracy_percent, found.quantized.accuracy_percent) == ("100.00", "66.67")
    assert found.agreement_percent.value == "66.67"
