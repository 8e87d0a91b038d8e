"""What a run amounts to in words: headline, doubts and warnings, each for its own cause and for no other."""

import math

import pytest

from support.records import evaluated, evaluations, history, run_record
from tunesmith_trainer.report.formatting import change, count, duration, magnitude, metric, percent, storage
from tunesmith_trainer.report.record import ClassCount, Confusion, Data, Evaluation, Incident, IncidentKind
from tunesmith_trainer.report.verdict import Level, main_metric, verdict_of


def plain(text):
    return text.replace("\u202f", " ").replace("\u2212", "-")


def calm(**changes):
    """A record without anything to warn of, changed where a test cares."""
    quiet = {
        "evaluations": evaluated((0, {"loss": 1.1, "accuracy": 0.348}), (60, {"loss": 0.8, "accuracy": 0.637})),
        "incidents": (),
        "data": Data(train_examples=1000, eval_examples=600),
    }
    points = [point | {"gradNorm": 0.5} for point in history()]
    record = run_record()
    quiet["history"] = tuple(type(record.history[0]).model_validate(point) for point in points)
    return record.model_copy(update=quiet | changes)


def titles(record, level=None):
    return [found.title for found in verdict_of(record).findings if level in (None, found.level)]


def test_a_good_run_is_told_with_its_numbers_and_nothing_to_warn_of():
    verdict = verdict_of(calm())
    assert plain(verdict.headline) == "Held-out accuracy rose from 34.8 % to 63.7 % (+28.9 points)."
    # statsmodels: proportion_confint(0.637 * 600, 600, method="wilson")
    assert "600 held-out examples; the 95 % interval is 59.8 to 67.4 %." in plain(verdict.detail)
    assert "loss fell from 1.100 to 0.800 (-27.3 %)" in plain(verdict.detail)
    assert verdict.improved is True
    assert verdict.findings == ()


@pytest.mark.parametrize(("share", "interval"), [(1.0, "82.4 to 100.0"), (0.0, "0.0 to 17.6"), (0.5, "29.0 to 71.0")])
def test_where_all_of_a_few_examples_are_right_it_is_not_sure_that_all_are(share, interval):
    found = evaluated((60, {"loss": 0.8, "accuracy": share}))
    verdict = verdict_of(calm(evaluations=found, data=Data(train_examples=1000, eval_examples=18)))
    assert f"18 held-out examples; the 95 % interval is {interval} %." in plain(verdict.detail)


def test_the_f1_of_tags_that_mark_spans_is_that_of_entities():
    found = evaluated((0, {"loss": 1.0, "f1": 0.2}), (60, {"loss": 0.8, "f1": 0.5}))
    for labels, name in ((("B-PER", "I-PER", "O"), "entity F1"), (("NOUN", "VERB", "O"), "F1 (macro)")):
        record = run_record({"task": "TokenClassification"}, evaluations=found)
        confusion = Confusion(labels=labels, counts=((1, 0, 0), (0, 1, 0), (0, 0, 1)))
        record = record.model_copy(update={"confusion": confusion, "model": None})
        assert plain(verdict_of(record).headline).startswith(f"Held-out {name} rose from 20.0 % to 50.0 %")


def written(loss, method="LoRA", dtype="bfloat16", rounding=""):
    record = calm()
    model = record.model.model_copy(
        update={"dtype": dtype, "rounding": rounding, "metrics": {"loss": loss, "accuracy": 0.6}}
    )
    return record.model_copy(update={"model": model, "plan": record.plan.model_copy(update={"method": method})})


def test_the_model_as_it_was_written_is_judged():
    record = written(0.9)
    assert (record.after.metrics["loss"], record.after.step) == (0.9, 60)
    assert record.working.metrics["loss"] == 0.8
    assert plain(verdict_of(record).headline) == "Held-out accuracy rose from 34.8 % to 60.0 % (+25.2 points)."


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        ("LoRA", "Set output.dtype: FP32."),
        ("QLoRA", "in 4 bits"),
        ("Full with quantization-aware training", "unrounded"),
    ],
)
def test_what_writing_has_cost_is_told_with_its_figures(method, advice):
    (found,) = verdict_of(written(0.9, method)).findings
    assert (found.level, found.title) == (Level.WARNING, "The saved model is worse than the trained one")
    assert "was 0.800 at the end of training and is 0.900 with the model read back" in found.text
    assert advice in found.text
    assert titles(written(0.805)) == []


def test_what_rounding_would_have_cost_is_a_note():
    (found,) = verdict_of(written(0.8, dtype="float32", rounding="the files hold float32: rounding")).findings
    assert (found.level, found.text) == (Level.NOTE, "The files hold float32: rounding.")


def test_a_metric_that_got_worse_is_a_warning():
    record = calm(evaluations=evaluated((0, {"loss": 1.0, "accuracy": 0.6}), (60, {"loss": 1.2, "accuracy": 0.5})))
    assert verdict_of(record).improved is False
    assert titles(record, Level.WARNING) == ["No better than before"]


def test_of_loss_less_is_better():
    record = calm(evaluations=evaluated((0, {"loss": 1.0}), (60, {"loss": 0.9})))
    assert verdict_of(record).improved is True
    assert "loss fell from 1.000 to 0.900" in verdict_of(record).headline


def test_a_small_gain_on_few_examples_may_be_chance():
    found = evaluated((0, {"loss": 1.0, "accuracy": 0.50}), (60, {"loss": 0.9, "accuracy": 0.53}))
    record = calm(evaluations=found, data=Data(train_examples=1000, eval_examples=200))
    assert titles(record) == ["Within chance"]
    assert titles(calm(evaluations=found, data=Data(train_examples=1000, eval_examples=20_000))) == []


def test_rising_held_out_loss_is_overfitting_and_only_a_note_where_the_best_was_saved():
    record = calm(evaluations=tuple(map(Evaluation.of, evaluations())))
    assert titles(record, Level.WARNING) == ["Overfitting after step 40"]
    saved = record.model_copy(update={"model": record.model.model_copy(update={"step": 40})})
    assert titles(saved, Level.NOTE) == ["Overfitting after step 40"]
    assert "weights are those of step 40" in verdict_of(saved).detail


def test_a_classifier_that_is_no_better_than_its_most_frequent_class_is_caught():
    confusion = Confusion(labels=("a", "b"), counts=((90, 0), (10, 0)))
    found = evaluated((0, {"loss": 1.0, "accuracy": 0.5}), (60, {"loss": 0.5, "accuracy": 0.9}))
    record = calm(confusion=confusion, evaluations=found)
    assert titles(record, Level.WARNING) == ["No better than the most frequent class"]
    assert "“a”" in verdict_of(record).findings[0].text


def test_rollbacks_and_restarts_are_counted():
    incidents = (
        Incident(step=21, message="spike"),
        Incident(step=30, kind=IncidentKind.RESTART, message="resumed"),
        Incident(step=50, kind=IncidentKind.EARLY_STOP, message="no better for 3 evaluations"),
    )
    record = calm(incidents=incidents)
    assert titles(record, Level.WARNING) == ["The loss spiked"]
    assert titles(record, Level.NOTE) == ["Stopped early at step 50", "1 restart"]
    assert verdict_of(record).findings[0].text.startswith("1 rollback (at step 21), the batch left out")


@pytest.mark.parametrize(("truncated", "warned"), [(50, False), (51, True)])
def test_truncation_is_warned_of_above_five_percent(truncated, warned):
    record = calm(data=Data(train_examples=1000, eval_examples=600, truncated=truncated))
    assert titles(record) == (["Many examples truncated"] if warned else [])


@pytest.mark.parametrize(("rare", "warned"), [(201, False), (200, True)])
def test_classes_are_unbalanced_where_one_is_five_times_as_frequent(rare, warned):
    classes = (ClassCount(label="often", train=1000), ClassCount(label="seldom", train=rare))
    record = calm(data=Data(train_examples=1200, eval_examples=600, classes=classes))
    assert titles(record) == (["Classes unbalanced"] if warned else [])


def test_bad_rows_are_a_note_and_many_of_them_a_warning():
    few = Data(train_examples=1000, eval_examples=600, bad_rows=2, first_bad_row="train.jsonl line 8 has no label")
    assert titles(calm(data=few), Level.NOTE) == ["Rows left out"]
    assert "line 8" in verdict_of(calm(data=few)).findings[0].text
    assert titles(calm(data=few.model_copy(update={"bad_rows": 200})), Level.WARNING) == ["Rows left out"]


def test_a_loss_that_is_not_finite_is_told():
    record = calm()
    points = (*record.history[:-1], record.history[-1].model_copy(update={"loss": math.nan}))
    assert titles(record.model_copy(update={"history": points}), Level.WARNING) == ["Loss not finite"]


def test_clipping_most_gradients_is_a_note():
    record = calm()
    points = tuple(point.model_copy(update={"grad_norm": 3.0}) for point in record.history)
    assert titles(record.model_copy(update={"history": points})) == ["Most gradients were clipped"]


def test_losses_that_still_fall_ask_for_more_training():
    record = calm()
    points = tuple(point.model_copy(update={"loss": 3.0 * 0.97**point.step}) for point in record.history)
    found = evaluated((0, {"loss": 3.0}), (30, {"loss": 1.5}), (60, {"loss": 0.8}))
    assert titles(record.model_copy(update={"history": points, "evaluations": found})) == ["Not yet done learning"]


def test_without_held_out_data_training_loss_is_all_there_is_to_tell():
    record = calm(evaluations=(), data=Data(train_examples=1000))
    verdict = verdict_of(record)
    assert verdict.headline.startswith("Training loss fell from")
    assert verdict.improved is None
    assert "isn't known" in verdict.detail
    assert verdict_of(calm(evaluations=(), history=(), data=Data())).headline == "No step was recorded."


@pytest.mark.parametrize(
    ("task", "metrics", "chosen"),
    [
        ("SequenceClassification", {"loss": 1.0, "f1": 0.5, "accuracy": 0.5}, "accuracy"),
        ("ChatSFT", {"loss": 1.0, "perplexity": 2.7, "tokenAccuracy": 0.5, "exactMatch": 0.6}, "exactMatch"),
        ("ChatSFT", {"loss": 1.0, "perplexity": 2.7, "tokenAccuracy": 0.5, "exactMatch": 0.01}, "perplexity"),
        ("Seq2Seq", {"loss": 1.0, "bleu": 12.0, "rougeL": 0.3}, "rougeL"),
        ("DPO", {"loss": 1.0, "rewardAccuracy": 0.7, "rewardMargin": 1.0}, "rewardAccuracy"),
        ("MaskedLM", {"loss": 1.0}, "loss"),
    ],
)
def test_a_run_is_judged_by_what_its_task_is_about(task, metrics, chosen):
    record = run_record({"task": task}, evaluations=evaluated((60, metrics)))
    assert main_metric(record) == chosen


def test_a_run_is_judged_by_the_metric_that_its_plan_names():
    record = run_record({"training": {"metric_for_best_model": "f1"}})
    assert main_metric(record) == "f1"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent(0.6374), "63.7 %"),
        (magnitude(0.0), "0.000"),
        (magnitude(0.00002), "2.00e-05"),
        (magnitude(-12.345), "-12.35"),
        (magnitude(123456.0), "123 456"),
        (magnitude(math.nan), "not a number"),
        (count(1234567), "1 234 567"),
        (duration(4.25), "4.2 s"),
        (duration(200), "3 min 20 s"),
        (duration(3840), "1 h 04 min"),
        (storage(91_000_000), "91 MB"),
        (storage(12), "12 B"),
        (change(metric("accuracy"), 0.5, 0.25), "-25.0 points"),
        (change(metric("loss"), 2.0, 1.0), "-50.0 %"),
        (change(metric("mcc"), 0.1, 0.4), "+0.300"),
        (change(metric("loss"), 1.0, math.nan), "–"),
        (metric("someNewMetric").label, "some new metric"),
    ],
)
def test_numbers_are_written_for_people(written, expected):
    assert plain(written) == expected
