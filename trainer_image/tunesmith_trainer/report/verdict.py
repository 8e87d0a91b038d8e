"""What a run amounts to, in plain words: the first lines of the report, and of the model card.

Pure functions of the record. A finding says what was seen, with its numbers, and what to do about it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tunesmith_api.v1alpha1.task import Task
from tunesmith_trainer.report.formatting import THIN, Metric, change, count, metric, percent
from tunesmith_trainer.report.record import IncidentKind, RunRecord

__all__ = ["Finding", "Level", "Verdict", "main_metric", "verdict_of"]

OVERFITTING_RISE = 0.02
"""Part by which held-out loss lies above its lowest before it is called overfitting."""
MANY_TRUNCATED = 0.05
MANY_BAD_ROWS = 0.01
UNBALANCED = 5.0
"""How many times rarer the rarest class is than the most frequent one."""
MANY_CLIPPED = 0.5
STILL_FALLING = 0.05
FEW_EXAMPLES = 100
COSTLY = 0.01
"""Part by which the held-out loss of the written model lies above that of the trained one before it is told."""
NORMAL_95 = 1.96
"""Standard deviations around the mean that hold 95 % of a normal distribution."""

PREFERRED = (
    "accuracy",
    "f1",
    "rewardAccuracy",
    "rougeL",
    "bleu",
    "pearson",
    "mse",
    "exactMatch",
    "perplexity",
    "loss",
)
"""Which metric a run is judged by where the plan names none: the first that there is."""


class Level(StrEnum):
    """How much a finding matters."""

    WARNING = "Warning"
    NOTE = "Note"


@dataclass(frozen=True)
class Finding:
    """One thing that a reader should know."""

    level: Level
    title: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a run amounts to."""

    headline: str
    detail: str
    improved: bool | None
    """None where there is nothing to compare."""
    findings: tuple[Finding, ...]


def main_metric(record: RunRecord) -> str | None:
    """Return the held-out metric that the run is judged by; None without an evaluation."""
    if record.after is None:
        return None
    found = record.after.metrics
    chosen = record.plan.metric_for_best
    if chosen != "loss" and chosen in found:
        return chosen
    if record.plan.task in {Task.CHAT_SFT, Task.CAUSAL_LM} and found.get("exactMatch", 0.0) < 0.05:
        found = {name: value for name, value in found.items() if name != "exactMatch"}
    return next((name for name in PREFERRED if name in found), next(iter(found), None))


def is_better(record: RunRecord, name: str, new: float, old: float) -> bool:
    """Whether `new` is the better value of a metric."""
    return new > old if name in record.higher_is_better else new < old


def verdict_of(record: RunRecord) -> Verdict:
    """Judge a run."""
    findings = tuple(_findings(record))
    name = main_metric(record)
    if name is None or record.after is None:
        losses = [point.loss for point in record.history]
        if not losses:
            return Verdict("No step was recorded.", "", None, findings)
        detail = "There was no held-out data: whether the model got better at anything new isn't known."
        last = record.metrics.get("trainLoss", losses[-1])
        return Verdict(f"Training loss {_moved(metric('loss'), losses[0], last)}.", detail, None, findings)
    described, after = metric(name, record.counts_entities), record.after.metrics[name]
    if record.before is None or name not in record.before.metrics:
        headline = f"Held-out {described.label} is {described.text(after)}."
        return Verdict(headline, _detail(record, name), None, findings)
    before = record.before.metrics[name]
    headline = f"Held-out {described.label} {_moved(described, before, after)}."
    return Verdict(headline, _detail(record, name), is_better(record, name, after, before), findings)


def _moved(described: Metric, before: float, after: float) -> str:
    if not math.isfinite(after):
        return f"ended at {described.text(after)}; it started at {described.text(before)}"
    if described.text(before) == described.text(after):
        return f"stayed at {described.text(after)}"
    verb = "rose" if after > before else "fell"
    return f"{verb} from {described.text(before)} to {described.text(after)} ({change(described, before, after)})"


def _detail(record: RunRecord, name: str) -> str:
    """Say on how much data, how surely, and what the loss did."""
    assert record.after is not None
    sentences = []
    examples = record.data.eval_examples
    if examples:
        interval = _interval(record, name)
        surely = ""
        if interval is not None:
            low, high = (f"{end * 100:.1f}" for end in interval)
            surely = f"; the 95{THIN}% interval is {low} to {high}{THIN}%"
        sentences.append(f"Measured on {count(examples)} held-out examples{surely}.")
    if name != "loss" and record.before and "loss" in record.before.metrics and "loss" in record.after.metrics:
        moved = _moved(metric("loss"), record.before.metrics["loss"], record.after.metrics["loss"])
        sentences.append(f"Held-out loss {moved}.")
    saved = record.model.step if record.model else None
    if saved is not None and record.history and saved < record.history[-1].step:
        sentences.append(f"The saved weights are those of step {saved}, the best evaluation.")
    return " ".join(sentences)


def _interval(record: RunRecord, name: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a share of examples (Wilson, 1927); None for other metrics.

    Unlike the plain normal approximation it has a width where all examples were right, or none.
    """
    per_example = {"accuracy", "exactMatch", "rewardAccuracy"}
    examples = record.data.eval_examples
    if name not in per_example or not examples or record.plan.task is Task.TOKEN_CLASSIFICATION or not record.after:
        return None
    share, square = min(1.0, max(0.0, record.after.metrics[name])), NORMAL_95**2
    center = share + square / (2 * examples)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / examples + square / (4 * examples**2))
    scale = 1 + square / examples
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def _findings(record: RunRecord) -> Iterator[Finding]:
    yield from _about_result(record)
    yield from _about_files(record)
    yield from _about_course(record)
    yield from _about_data(record)


def _about_result(record: RunRecord) -> Iterator[Finding]:
    name = main_metric(record)
    if name is not None and record.before and record.after and name in record.before.metrics:
        before, after = record.before.metrics[name], record.after.metrics[name]
        described, interval = metric(name, record.counts_entities), _interval(record, name)
        if not is_better(record, name, after, before):
            text = (
                f"{described.label.capitalize()} was {described.text(before)} before training and is "
                f"{described.text(after)} now. Check the labels, or try another learning rate."
            )
            yield Finding(Level.WARNING, "No better than before", text)
        elif interval is not None and after - before < (interval[1] - interval[0]) / math.sqrt(2):
            text = (
                f"A change of {change(described, before, after)} on {count(record.data.eval_examples)} examples may "
                "be chance. More held-out examples would tell."
            )
            yield Finding(Level.NOTE, "Within chance", text)
    yield from _about_majority(record)
    yield from _about_overfitting(record)


def _about_files(record: RunRecord) -> Iterator[Finding]:
    """What became of the trained model when it was written."""
    model, working = record.model, record.working
    if model is None or not model.dtype:
        return
    if model.rounding:
        yield Finding(Level.NOTE, "Number format", f"{model.rounding[0].upper()}{model.rounding[1:]}.")
    if model.metrics is None or working is None or not {"loss"} <= working.metrics.keys() & model.metrics.keys():
        return
    trained, saved = working.metrics["loss"], model.metrics["loss"]
    if saved - trained > COSTLY * abs(trained):
        text = f"Held-out loss was {trained:.3f} at the end of training and is {saved:.3f} with the model read back."
        yield Finding(Level.WARNING, "The saved model is worse than the trained one", f"{text} {_why(record)}".strip())


def _why(record: RunRecord) -> str:
    method = record.plan.method
    if method.startswith("QLoRA"):
        return "The adapters learned over a base in 4 bits and are merged into the base as it is stored."
    if "quantization-aware" in method:
        return "It learned with rounded weights and is saved with unrounded ones, for a quantization to come."
    return "Set output.dtype: FP32." if record.model and record.model.dtype != "float32" else ""


def _about_overfitting(record: RunRecord) -> Iterator[Finding]:
    losses = [(found.step, found.metrics["loss"]) for found in record.evaluations if "loss" in found.metrics]
    if len(losses) < 3:
        return
    (best, lowest), (last, latest) = min(losses, key=lambda item: item[1]), losses[-1]
    if best in (0, last) or latest <= lowest * (1 + OVERFITTING_RISE):
        return
    text = f"Held-out loss was lowest at step {best} ({lowest:.3f}) and rose to {latest:.3f} by step {last}."
    title = f"Overfitting after step {best}"
    if record.after is not None and record.after.step < last:
        yield Finding(Level.NOTE, title, f"{text} The saved weights are those of step {record.after.step}.")
    else:
        advice = "Stop earlier (training.earlyStopping) or save the best weights (training.loadBestModelAtEnd)."
        yield Finding(Level.WARNING, title, f"{text} {advice}")


def _about_majority(record: RunRecord) -> Iterator[Finding]:
    if record.confusion is None or record.after is None or "accuracy" not in record.after.metrics:
        return
    totals = [sum(row) for row in record.confusion.counts]
    if not sum(totals):
        return
    share = max(totals) / sum(totals)
    if record.after.metrics["accuracy"] <= share:
        label = record.confusion.labels[totals.index(max(totals))]
        text = f"Always answering “{label}” would be right for {percent(share)} of the held-out examples."
        yield Finding(Level.WARNING, "No better than the most frequent class", text)


def _about_course(record: RunRecord) -> Iterator[Finding]:
    rolled = [item for item in record.incidents if item.kind is IncidentKind.ROLLBACK]
    if rolled:
        steps = ", ".join(str(item.step) for item in rolled[:8])
        text = (
            f"{_times(len(rolled), 'rollback')} (at step {steps}), the batch left out each time. "
            "A lower learning rate or a longer warm-up makes them rarer."
        )
        yield Finding(Level.WARNING, "The loss spiked", text)
    stopped = next((item for item in record.incidents if item.kind is IncidentKind.EARLY_STOP), None)
    if stopped:
        yield Finding(Level.NOTE, f"Stopped early at step {stopped.step}", stopped.message)
    restarts = sum(item.kind is IncidentKind.RESTART for item in record.incidents)
    if restarts:
        text = "Training resumed from the newest checkpoint each time; the loss curve is that of a run without a stop."
        yield Finding(Level.NOTE, _times(restarts, "restart"), text)
    norms = [point.grad_norm for point in record.history if point.grad_norm is not None]
    limit = record.plan.max_grad_norm
    clipped = sum(norm > limit for norm in norms)
    if limit and len(norms) >= 20 and clipped > MANY_CLIPPED * len(norms):
        text = (
            f"{percent(clipped / len(norms))} of the recorded steps had a gradient norm above {limit:g} "
            "(training.maxGradNorm): the limit sets the step size more than the learning rate does."
        )
        yield Finding(Level.NOTE, "Most gradients were clipped", text)
    yield from _about_convergence(record)


def _times(number: int, what: str) -> str:
    return f"{count(number)} {what}" if number == 1 else f"{count(number)} {what}s"


def _about_convergence(record: RunRecord) -> Iterator[Finding]:
    losses = [point.loss for point in record.history if math.isfinite(point.loss)]
    if len(losses) < len(record.history):
        text = f"{len(record.history) - len(losses)} recorded steps had a loss that is not a finite number."
        yield Finding(Level.WARNING, "Loss not finite", text)
    tenth = len(losses) // 10
    evaluated = [found.metrics["loss"] for found in record.evaluations if "loss" in found.metrics]
    if tenth < 5 or len(evaluated) < 3 or evaluated[-1] != min(evaluated):
        return
    earlier, later = statistics.median(losses[-2 * tenth : -tenth]), statistics.median(losses[-tenth:])
    if later < earlier * (1 - STILL_FALLING) and evaluated[-1] < evaluated[-2] * (1 - STILL_FALLING):
        text = (
            "Training and held-out loss were both still falling at the end: more epochs or a higher learning rate "
            "would probably help."
        )
        yield Finding(Level.NOTE, "Not yet done learning", text)


def _about_data(record: RunRecord) -> Iterator[Finding]:
    data, limit = record.data, record.plan.max_length
    total = data.train_examples or 0
    if total and data.truncated > MANY_TRUNCATED * total:
        text = (
            f"{count(data.truncated)} of {count(total)} training examples ({percent(data.truncated / total)}) were "
            f"longer than training.maxLength {limit} and lost their end."
        )
        yield Finding(Level.WARNING, "Many examples truncated", text)
    if data.bad_rows:
        rows = total + data.eval_examples + data.bad_rows
        level = Level.WARNING if data.bad_rows > MANY_BAD_ROWS * rows else Level.NOTE
        first = f" The first: {data.first_bad_row}" if data.first_bad_row else ""
        text = f"{count(data.bad_rows)} rows can't be used (dataset.onBadRow: Skip).{first}"
        yield Finding(level, "Rows left out", text)
    counts = [item.train for item in data.classes if item.train]
    if len(counts) > 1 and max(counts) >= UNBALANCED * min(counts):
        most = max(data.classes, key=lambda item: item.train).label
        least = min((item for item in data.classes if item.train), key=lambda item: item.train).label
        text = (
            f"“{most}” occurs {max(counts) / min(counts):.0f} times as often as “{least}”. Look at F1 rather than "
            "accuracy, and try classification.classWeights: Balanced."
        )
        yield Finding(Level.WARNING, "Classes unbalanced", text)
    if record.after is not None and 0 < data.eval_examples < FEW_EXAMPLES:
        text = f"{data.eval_examples} held-out examples give a rough picture only."
        yield Finding(Level.NOTE, "Little held-out data", text)
