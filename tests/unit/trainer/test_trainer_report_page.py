"""The page: whole, self-contained, safe against what data holds, the same for the same record, small for long runs."""

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

from support.plans import dataset, training_plan
from support.records import LABELS, history, run_record
from tunesmith_trainer import report
from tunesmith_trainer.report import charts
from tunesmith_trainer.report.page import render
from tunesmith_trainer.report.record import Confusion, Data, HistoryPoint, RunRecord, Sample, WorstExample
from tunesmith_trainer.report.verdict import verdict_of

VOID = {"meta", "br", "img", "link", "input", "hr"}


PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


class Outline(HTMLParser):
    """Checks that tags nest, and collects what tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.addresses, self.wrong = [], [], Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags[tag] += 1
        if values.get("id"):
            self.ids.append(values["id"])
        self.addresses += [values[name] for name in ("src", "href", "xlink:href", "action", "data") if values.get(name)]
        self.wrong += [name for name in values if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")


@pytest.fixture(scope="module")
def page():
    return render(run_record())


def test_the_page_is_whole_and_asks_for_nothing(page):
    outline = Outline(page)
    assert outline.wrong == []
    assert outline.open == []
    assert [name for name, times in Counter(outline.ids).items() if times > 1] == []
    assert outline.tags["script"] == 0
    assert all(address.startswith("#") for address in outline.addresses)
    assert not re.search(r"@import|url\((?!#)", page)
    # what a drawing refers to within itself is there
    assert {address[1:] for address in outline.addresses} <= set(outline.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(outline.ids)


def test_every_drawing_can_be_read_aloud_and_takes_the_pages_colours(page):
    drawings = re.findall(r"<svg .*?</svg>", page, re.DOTALL)
    assert len(drawings) == 11
    for drawing in drawings:
        assert re.match(r'<svg [^>]*role="img" aria-labelledby="([\w-]+) ([\w-]+)">', drawing)
        assert re.search(r"<title[^>]*>[^<]+</title><desc[^>]*>[^<]{20,}</desc>", drawing)
        assert re.findall(r"(?:fill|stroke): #\w+", drawing) == []
        assert "var(--" in drawing
        assert "DejaVu" not in drawing
    loss = next(drawing for drawing in drawings if 'id="loss-title"' in drawing)
    assert "held out: from 1.1 to 0.84 (step 0 to step 60), lowest 0.8." in loss


def test_the_page_serves_light_dark_and_narrow_screens(page):
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "max-width: 620px" in page


def test_the_page_tells_the_run(page):
    text = re.sub(r"<[^>]+>", "", page).replace("\u202f", " ")
    for part in (
        "Held-out accuracy rose from 34.8 % to 63.7 % (+28.9 points).",
        "Overfitting after step 40",
        "s3://models/sentiment",
        "the loss jumped to 4.1 from 0.7",
        "training.learningRate",
        "user: is it late?",
        "91 MB",
    ):
        assert part in text, part
    assert ' <span class="against" style="--a: 0.6" title="delayed: −0.60">delayed</span>' in page
    assert '>great</span>, <span class="against"' in page  # the comma is too weak to be coloured


def test_the_same_record_gives_the_same_bytes(page):
    assert render(run_record()) == page


def test_what_data_holds_is_shown_and_never_becomes_markup():
    attack = '<script>alert("x")</script>&<img src=x onerror=y>'
    labels = (attack, *LABELS[1:])
    record = run_record(
        worst=(WorstExample(text=attack, expected=attack, predicted=attack, loss=1.0, attributions=((attack, 1.0),)),),
        samples=(Sample(prompt=attack, expected=attack, before=attack, after=attack),),
        confusion=Confusion(labels=labels, counts=run_record().confusion.counts),
    )
    outline = Outline(render(record))
    assert outline.tags["script"] == outline.tags["img"] == 0
    assert outline.wrong == []


def test_a_record_without_anything_optional_has_a_page_too():
    text = render(RunRecord.of(training_plan()))
    assert "No step was recorded." in text
    assert Outline(text).wrong == []
    for heading in ("Mistakes", "Samples", "Results on held-out data", "What to know"):
        assert f"<h2>{heading}</h2>" not in text


def test_a_long_run_has_a_small_page_that_keeps_its_spikes():
    points = [HistoryPoint.model_validate(point) for point in history(40_000)]
    points[20_000] = points[20_000].model_copy(update={"loss": 97.0})
    record = run_record(history=tuple(points))
    assert len(render(record).encode()) < 700_000
    thinned = charts.thinned([point.step for point in points], [point.loss for point in points])
    assert len(thinned.means) <= charts.MOST_POINTS
    assert max(thinned.highest) == 97.0
    assert sum(thinned.means) / len(thinned.means) == pytest.approx(sum(p.loss for p in points) / len(points))


def test_values_that_are_not_finite_are_left_out_of_curves():
    points = [HistoryPoint.model_validate(point) for point in history()]
    points[5] = points[5].model_copy(update={"loss": float("nan"), "grad_norm": float("inf")})
    assert "nan" not in re.sub(r"<[^>]+>", "", render(run_record(history=tuple(points)))).lower()


def test_of_many_classes_the_most_confused_are_drawn():
    size = 40
    counts = [[10 if row == column else 0 for column in range(size)] for row in range(size)]
    counts[7][31] = 5
    chosen = charts.most_confused(counts)
    assert len(chosen) == charts.MOST_CLASSES
    assert {7, 31} <= set(chosen)
    assert chosen == sorted(chosen)
    assert charts.most_confused(counts[:3]) == [0, 1, 2]


def test_smoothing_follows_a_trend_and_ignores_a_spike():
    values = [float(number) for number in range(100)]
    values[50] = 1000.0
    smooth = charts.smoothed(values)
    assert len(smooth) == 100
    assert abs(smooth[50] - 50) < 2
    assert max(smooth) < 101


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.00002, "2e−5"), (1500.0, "1.5k"), (2_000_000.0, "2M"), (-0.25, "−0.25")]
)
def test_axis_values_are_short(value, text):
    assert charts.tick_text(value) == text


def test_page_and_record_are_written_and_the_page_can_be_drawn_again_without_torch(tmp_path, page):
    written = report.write(run_record(), tmp_path)
    assert written == tmp_path / "report.html"
    assert written.read_text() == page
    code = (
        "import runpy, sys; sys.argv[0] = 'report'; "
        "found = 0\ntry: runpy.run_module('tunesmith_trainer.report', run_name='__main__')\n"
        "except SystemExit as end: found = end.code\n"
        "assert found == 0 and 'torch' not in sys.modules"
    )
    again = tmp_path / "again.html"
    subprocess.run([sys.executable, "-c", code, tmp_path / "report.json", again], check=True, env=PATHS)
    assert again.read_bytes() == written.read_bytes()


def test_a_file_that_is_no_record_is_refused_in_words(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text('{"schemaVersion": 1}')
    command = [sys.executable, "-m", "tunesmith_trainer.report", bad, tmp_path / "out.html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=PATHS)
    assert done.returncode == 2
    assert "is no report.json of this version" in done.stderr
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize(
    ("task", "words"), [("ChatSFT", "guessed, each token behind"), ("SequenceClassification", "predicted")]
)
def test_guesses_at_each_place_of_the_right_answer_are_not_called_predictions(task, words):
    (label,) = re.findall(r'<span class="muted">· ([^<]*)</span> <b>', render(run_record({"task": task})))
    assert label.startswith(words)


def test_the_share_that_is_held_out_is_the_one_that_came_out():
    data = dataset(splitPercent=20)
    page = render(run_record({"dataset": data}, data=Data(train_examples=112, eval_examples=48)))
    assert "48 (30.0\u202f% of all)" in page
    assert "of all)" not in render(run_record())


def test_one_training_loss_is_told_on_a_page():
    record = run_record(evaluations=())
    assert " to 0.610 " in verdict_of(record).headline
    assert ">0.610<" in render(record)
