"""Draws `report.html`: one file that needs nothing else, from a `RunRecord`.

The template `page.html.j2` lays out; what it shows is made here, so that the template holds no logic but loops.
Called by `write` of this package and by `python -m tunesmith_trainer.report`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from tunesmith_api.v1alpha1.task import Task
from tunesmith_trainer.report import charts
from tunesmith_trainer.report.charts import Chart, Series
from tunesmith_trainer.report.formatting import change, count, duration, magnitude, metric, percent, storage
from tunesmith_trainer.report.record import RunRecord, WorstExample
from tunesmith_trainer.report.verdict import Level, Verdict, is_better, main_metric, verdict_of
from tunesmith_trainer.tasks.scores import unit_scores

__all__ = ["render"]

MOST_WORST = 12
MOST_TEXT = 1200
"""Characters of an example or a sample that are shown."""
MOST_CLASSES = 30
TOLD_BY_OTHERS = {"loss", "precision", "recall", "f1Micro", "mcc", "chosenReward", "rejectedReward"}
"""Metrics that get no curve of their own: loss has one, the others move with one that has."""
GUESSED = {Task.CHAT_SFT, Task.CAUSAL_LM}
"""Tasks whose mistakes show the likeliest token at each place of the expected text: no model ever wrote that."""
FAINT = 0.04
"""Attributions below this part of the strongest one aren't coloured."""


@dataclass(frozen=True)
class Figure:
    """A number at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Result:
    """A line of the table of results."""

    label: str
    before: str
    after: str
    change: str
    better: bool | None


@dataclass(frozen=True)
class ClassResult:
    """A line of the table of classes."""

    label: str
    precision: str
    recall: str
    f1: str
    examples: str


@dataclass(frozen=True)
class Word:
    """A token of a text and how strongly it is coloured."""

    space: str
    """White space before it, which has no colour."""
    text: str
    strength: float
    kind: str
    """`for` the prediction, `against` it, or nothing."""
    title: str


@dataclass(frozen=True)
class Mistake:
    """An example that the model got wrong."""

    expected: str
    predicted: str
    loss: str
    words: tuple[Word, ...]


def render(record: RunRecord) -> str:
    """Return the page. The same record gives the same bytes."""
    environment = Environment(
        loader=PackageLoader("tunesmith_trainer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    verdict = verdict_of(record)
    return environment.get_template("page.html.j2").render(
        record=record,
        plan=record.plan,
        verdict=verdict,
        standing=_standing(verdict),
        warnings=[found for found in verdict.findings if found.level is Level.WARNING],
        notes=[found for found in verdict.findings if found.level is Level.NOTE],
        figures=_figures(record),
        results=_results(record),
        held_out_charts=_held_out_charts(record),
        loss_charts=[_loss_chart(record, wide=wide) for wide in (True, False)] if record.history else [],
        course_charts=_course_charts(record),
        data_rows=_data_rows(record),
        lengths=_lengths_chart(record),
        balance=_balance_chart(record),
        confusion=_confusion_chart(record),
        classes=_classes(record),
        mistakes=[_mistake(example) for example in record.worst[:MOST_WORST]],
        samples=[sample for sample in record.samples if sample.after is not None or sample.before is not None],
        predicted="guessed, each token behind the expected ones" if record.plan.task in GUESSED else "predicted",
        shorten=_shorten,
        environment_rows=_environment_rows(record),
        storage=storage,
        count=count,
    )


def _standing(verdict: Verdict) -> str:
    if verdict.improved is None:
        return "unknown"
    warned = any(found.level is Level.WARNING for found in verdict.findings)
    return "worse" if not verdict.improved else "warned" if warned else "better"


def _shorten(text: str | None) -> str:
    if text is None:
        return "–"
    return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"


# ---- numbers


def _figures(record: RunRecord) -> list[Figure]:
    figures = []
    name = main_metric(record)
    if name is not None and record.after is not None:
        described, before = metric(name, record.counts_entities), record.before
        note = f"before: {described.text(before.metrics.get(name))}" if before else ""
        figures.append(Figure(f"held-out {described.label}", described.text(record.after.metrics[name]), note))
    if record.history:
        last = record.history[-1]
        start = f"first: {magnitude(record.history[0].loss)}"
        figures.append(Figure("training loss", magnitude(record.metrics.get("trainLoss", last.loss)), start))
        examples = record.data.train_examples
        note = f"{count(examples)} examples" if examples is not None else "streamed data"
        figures.append(Figure("optimizer steps", count(last.step), note))
    speed = _speed(record)
    if speed:
        processes = record.environment.workers
        note = f"{processes} training process{'es' if processes > 1 else ''}"
        figures.append(Figure("tokens per second", count(speed), note))
    seconds = record.environment.wall_seconds or record.environment.train_seconds
    if seconds:
        spent = record.environment.train_seconds
        note = f"{percent(spent / seconds)} in steps" if spent and spent < seconds else ""
        figures.append(Figure("time", duration(seconds), note))
    return figures


def _speed(record: RunRecord) -> float | None:
    seconds = sum(point.seconds for point in record.history)
    measured = sum(point.tokens for point in record.history) / seconds if seconds else None
    return record.metrics.get("tokensPerSecond", measured)


def _results(record: RunRecord) -> list[Result]:
    if record.after is None:
        return []
    results = []
    chosen = main_metric(record)
    names = sorted(record.after.metrics, key=lambda name: name != chosen)
    for name in names:
        described, after = metric(name, record.counts_entities), record.after.metrics[name]
        before = record.before.metrics.get(name) if record.before else None
        moved = change(described, before, after) if before is not None else ""
        same = before is None or described.text(before) == described.text(after)
        better = None if same or before is None else is_better(record, name, after, before)
        results.append(Result(described.label, described.text(before), described.text(after), moved, better))
    return results


def _data_rows(record: RunRecord) -> list[tuple[str, str]]:
    data = record.data
    examples = "streamed" if data.train_examples is None else count(data.train_examples)
    held_out = count(data.eval_examples)
    if "dataset.splitPercent" in record.plan.settings and data.train_examples:
        held_out += f" ({percent(data.eval_examples / (data.eval_examples + data.train_examples))} of all)"
    rows = [("training examples", examples), ("held-out examples", held_out)]
    if data.train_tokens is not None:
        rows.append(("training tokens", count(data.train_tokens)))
    if data.learned_tokens and data.train_tokens:
        share = percent(data.learned_tokens / data.train_tokens)
        rows.append(("learned tokens", f"{count(data.learned_tokens)} ({share})"))
    if data.learned_turns or data.unlearned_turns:
        rows.append(("assistant turns learned", count(data.learned_turns)))
        rows.append(("assistant turns not learned", count(data.unlearned_turns)))
    for label, number in (
        ("truncated", data.truncated),
        ("left out, nothing to learn within maxLength", data.nothing_left),
        ("duplicates left out", data.duplicates),
        ("bad rows left out", data.bad_rows),
    ):
        share = f" ({percent(number / data.train_examples)})" if number and data.train_examples else ""
        rows.append((label, f"{count(number)}{share}"))
    return rows


def _environment_rows(record: RunRecord) -> list[tuple[str, str]]:
    facts = record.environment
    rows = [
        ("device", facts.device),
        ("training processes", str(facts.workers)),
        ("precision", facts.precision),
        ("strategy", facts.strategy),
    ]
    if facts.trained_parameters is not None and facts.total_parameters:
        share = percent(facts.trained_parameters / facts.total_parameters)
        rows.append(("trained parameters", f"{count(facts.trained_parameters)} ({share})"))
        rows.append(("all parameters", count(facts.total_parameters)))
    return rows


def _classes(record: RunRecord) -> list[ClassResult]:
    if record.confusion is None:
        return []
    counts = record.confusion.counts
    rows = []
    for at, label in enumerate(record.confusion.labels[:MOST_CLASSES]):
        actual, said = sum(counts[at]), sum(row[at] for row in counts)
        precision, recall, f1 = unit_scores(counts[at][at], said, actual)
        rows.append(ClassResult(label, percent(precision), percent(recall), percent(f1), count(actual)))
    return rows


# ---- charts


def _loss_chart(record: RunRecord, *, wide: bool) -> Chart:
    steps = [float(point.step) for point in record.history]
    lines = [Series("training", steps, [point.loss for point in record.history])]
    evaluated = [found for found in record.evaluations if "loss" in found.metrics]
    if evaluated:
        held_out = [found.metrics["loss"] for found in evaluated]
        lines.append(Series("held out", [float(found.step) for found in evaluated], held_out, marked=True))
    name = "loss-wide" if wide else "loss"
    events = [float(item.step) for item in record.incidents]
    note = "running median over the recorded steps" + ("; dotted lines: see the events below" if events else "")
    return charts.curve(name, "Loss", lines, note=note, wide=wide, events=events, smooth=True)


def _held_out_charts(record: RunRecord) -> list[Chart]:
    if len(record.evaluations) < 3 or record.after is None:
        return []
    drawn = []
    chosen = main_metric(record)
    told = (name for name in record.after.metrics if name not in TOLD_BY_OTHERS)
    names = sorted(told, key=lambda name: name != chosen)
    for name in names[:4]:
        found = [item for item in record.evaluations if math.isfinite(item.metrics.get(name, math.nan))]
        described = metric(name, record.counts_entities)
        write = _percent_tick if described.is_share else charts.tick_text
        steps, values = [float(item.step) for item in found], [item.metrics[name] for item in found]
        line = Series(described.label, steps, values, marked=True)
        title = described.label[0].upper() + described.label[1:]
        drawn.append(charts.curve(f"held-out-{name}", title, [line], note="held-out data", write=write))
    return drawn


def _percent_tick(value: float) -> str:
    return f"{value * 100:.4g} %"


def _gigabytes_tick(value: float) -> str:
    return f"{value:.3g} GB"


def _course_charts(record: RunRecord) -> list[Chart]:
    points = record.history
    if len(points) < 2:
        return []
    steps = [float(point.step) for point in points]
    rate = Series("learning rate", steps, [point.learning_rate for point in points])
    drawn = [charts.curve("rate", "Learning rate", [rate], from_zero=True)]
    norms = [point for point in points if point.grad_norm is not None]
    if norms:
        values = [point.grad_norm for point in norms if point.grad_norm is not None]
        line = Series("gradient norm", [float(point.step) for point in norms], values)
        limit = record.plan.max_grad_norm
        clip = (limit, f"clipped at {limit:g}") if limit else None
        drawn.append(
            charts.curve(
                "norm", "Gradient norm", [line], note="before clipping", limit=clip, from_zero=True, smooth=True
            )
        )
    timed = [point for point in points if point.seconds > 0]
    if len(timed) > 1:
        speeds = [point.tokens / point.seconds for point in timed]
        line = Series("tokens per second", [float(point.step) for point in timed], speeds)
        note = "all workers together, padding not counted"
        drawn.append(charts.curve("speed", "Tokens per second", [line], note=note, from_zero=True, smooth=True))
    held = [point for point in points if point.memory_bytes]
    if len(held) > 1:
        values = [(point.memory_bytes or 0) / 1e9 for point in held]
        line = Series("memory", [float(point.step) for point in held], values)
        note = "held by the first worker"
        drawn.append(charts.curve("memory", "Memory", [line], note=note, write=_gigabytes_tick, from_zero=True))
    return drawn


def _lengths_chart(record: RunRecord) -> Chart | None:
    found = record.data.lengths
    if found is None or not found.total:
        return None
    note = "training examples by length in tokens"
    limit = record.plan.max_length
    return charts.histogram("lengths", "Lengths", found.edges, found.counts, note=note, limit=limit)


def _balance_chart(record: RunRecord) -> Chart | None:
    classes = sorted(record.data.classes, key=lambda item: -item.train)
    trained, held_out = sum(item.train for item in classes), sum(item.held_out for item in classes)
    if not trained:
        return None
    shares = [(item.train / trained, item.held_out / held_out if held_out else None) for item in classes]
    note = "share of the training data" + ("; the mark is the held-out data's" if held_out else "")
    if len(classes) > charts.MOST_CLASSES:
        note += f"; the {charts.MOST_CLASSES} most frequent classes"
    return charts.bars("balance", "Class balance", [item.label for item in classes], shares, note=note)


def _confusion_chart(record: RunRecord) -> Chart | None:
    found = record.confusion
    if found is None or not found.labels:
        return None
    note = "shade: part of the true class; number: held-out examples"
    if len(found.labels) > charts.MOST_CLASSES:
        note += f"; the {charts.MOST_CLASSES} classes with the most mistakes"
    return charts.heat_map("confusion", "Confusion matrix", found.labels, found.counts, note=note)


# ---- texts


def _mistake(example: WorstExample) -> Mistake:
    words: tuple[Word, ...] = (
        Word("", _shorten("\n".join(filter(None, (example.text, example.text_pair)))), 0.0, "", ""),
    )
    finite = [(token, score) for token, score in example.attributions if math.isfinite(score)]
    if finite:
        strongest = max(abs(score) for _, score in finite) or 1.0
        words = tuple(_word(token, score / strongest) for token, score in finite)
    return Mistake(example.expected, example.predicted, magnitude(example.loss), words)


def _word(token: str, part: float) -> Word:
    text = token.lstrip()
    space = token[: len(token) - len(text)]
    if abs(part) < FAINT or not text:
        return Word(space, text, 0.0, "", "")
    kind = "for" if part > 0 else "against"
    return Word(space, text, round(abs(part), 2), kind, f"{text.strip()}: {part:+.2f}".replace("-", "−"))
