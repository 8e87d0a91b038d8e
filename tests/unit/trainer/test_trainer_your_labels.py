"""docs/data.md: labels of every spelling, pictures of every depth, and what a model can't take, said before the start."""

import base64
import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from support.plans import dataset, training_plan
from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.keys import Reason
from tunesmith_api.reports import DatasetFacts, Outcome, TerminationReport
from tunesmith_api.v1alpha1.task import Classification
from tunesmith_server.predict.images import _image
from tunesmith_store.errors import UserError
from tunesmith_store.pixels import to_rgb
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer import data
from tunesmith_trainer.data.statistics import marked
from tunesmith_trainer.loop.evaluation import sampled
from tunesmith_trainer.models.limits import check_positions, check_tokens
from tunesmith_trainer.report.page import render
from tunesmith_trainer.report.record import Data, RunRecord
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import BadRow, DataSummary
from tunesmith_trainer.tasks.image_inputs import decoded

BASE = "pvc://b"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepared(tmp_path, tokenizer, rows, held_out=None, task="SequenceClassification", **changes):
    """A plan's data made ready, its task, and the lines of its log."""
    (tmp_path / "volumes" / "b").mkdir(parents=True, exist_ok=True)
    store = VolumeStore(tmp_path / "volumes")
    for name, content in (("train", rows), ("eval", held_out or [])):
        store.put_bytes(f"{BASE}/{name}.jsonl", b"\n".join(json.dumps(row).encode() for row in content))
    store.put_bytes(f"{BASE}/model/config.json", b"{}")
    source = dataset(f"{BASE}/train.jsonl", f"{BASE}/eval.jsonl" if held_out else None)
    plan = training_plan(BASE, task=task, dataset=source, **changes)
    task, lines = task_for(plan), []
    task.processor = tokenizer
    found = data.prepare(plan, task, store, tmp_path / "pod", writer=True, log=lines.append)
    return found, task, lines


def labelled(*labels):
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def targets(found):
    return [found.train.get(index).features["labels"] for index in range(len(found.train))]


MULTI = Classification(problem_type="MultiLabel")


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        ([[0, 1, 0], [1, 0, 1]], ["0", "1", "2"], [[0, 1, 0], [1, 0, 1]]),
        # the class that is never marked is one, too
        ([[0, 0, 0], [0, 1, 0]], ["0", "1", "2"], [[0, 0, 0], [0, 1, 0]]),
        # two marks could be two classes: another row says what they are
        ([[0, 1], [1, 1]], ["0", "1"], [[0, 1], [1, 1]]),
        ([[1.0, 0.0], [0.0, 0.0]], ["0", "1"], [[1, 0], [0, 0]]),
        ([[True, False, False]], ["0", "1", "2"], [[1, 0, 0]]),
        ([[], ["a"], ["b", "a"]], ["a", "b"], [[0, 0], [1, 0], [1, 1]]),
        ([[0, 1], [1], [0]], ["0", "1"], [[1, 1], [0, 1], [1, 0]]),
    ],
)
def test_vectors_of_marks_are_no_lists_of_classes(tmp_path, tokenizer, labels, names, expected):
    found, task, _ = prepared(tmp_path, tokenizer, labelled(*labels), classification=MULTI)
    assert (task.objective.names, targets(found)) == (names, expected)
    # another process finds the same in the cache
    again, task, _ = prepared(tmp_path, tokenizer, labelled(*labels), classification=MULTI)
    assert (task.objective.target(labels[0]), targets(again)) == (expected[0], expected)


def test_vectors_go_by_the_listed_classes_and_have_one_width(tmp_path, tokenizer):
    listed = Classification(problem_type="MultiLabel", labels=["x", "y", "z"])
    found, task, _ = prepared(tmp_path, tokenizer, labelled([0, 0, 1]), classification=listed)
    assert (task.objective.names_in([0, 0, 1]), targets(found)) == (["z"], [[0, 0, 1]])
    with pytest.raises(BadRow, match=r"marks 2 classes, and spec\.classification\.labels lists 3"):
        task_for(training_plan(task="SequenceClassification", classification=listed)).check_row(labelled([1, 1])[0])
    with pytest.raises(UserError, match="must have a 0 or 1 for each of 3 classes"):
        prepared(tmp_path, tokenizer, labelled([0, 0, 1], [0, 1, 0, 0]), classification=MULTI)


@pytest.mark.parametrize(
    ("labels", "held_out", "names", "numbers"),
    [
        (["True", True, False, "true"], "False", ["false", "true"], [1, 1, 0, 1]),
        (["True", "False"], True, ["False", "True"], [1, 0]),
        (["1.0", 1, 2, "2.0"], "1", ["1", "2"], [0, 0, 1, 1]),
        (["1.0", "2.0"], 2, ["1.0", "2.0"], [0, 1]),
        (["007", "7"], "7", ["007", "7"], [0, 1]),
    ],
)
def test_spellings_of_one_class_are_one(tmp_path, tokenizer, labels, held_out, names, numbers):
    found, task, _ = prepared(tmp_path, tokenizer, labelled(*labels), labelled(held_out))
    assert (task.objective.names, [one for (one,) in targets(found)]) == (names, numbers)
    assert sum(found.statistics.train.classes[name] for name in names) == len(labels)
    assert sum(found.statistics.eval.classes.get(name, 0) for name in names) == 1


def test_listed_classes_may_be_spelled_otherwise():
    listed = Classification(labels=["False", "True"])
    task = task_for(training_plan(task="SequenceClassification", classification=listed))
    assert task.labels_of(labelled(True)[0]) == ["True"]
    task.prepare(DataSummary({}))
    assert task.objective.target("true") == 1


def test_classes_that_look_alike_are_named(tmp_path, tokenizer):
    found, _, lines = prepared(tmp_path, tokenizer, labelled("Negative", "negative", "negative", "positive"))
    remark = "the classes 'Negative' (1 rows) and 'negative' (2 rows) differ in upper and lower case or spaces only"
    assert found.statistics.remarks[0].startswith(remark)
    assert f"warning: {found.statistics.remarks[0]}" in lines
    assert "classes: Negative (1), negative (2), positive (1)" in lines[0]
    page = render(RunRecord.of(training_plan()).model_copy(update={"data": Data.of(found.statistics)}))
    assert "The classes &#39;Negative&#39; (1 rows)" in page


def test_numbers_to_predict_are_not_made_classes(tmp_path, tokenizer):
    rows = labelled(*(f"{number / 100:.2f}" for number in range(100)))
    with pytest.raises(UserError, match=r"has 100 different numbers .*problemType: Regression") as caught:
        prepared(tmp_path, tokenizer, rows)
    assert caught.value.reason is Reason.DATASET_INVALID
    found, _, _ = prepared(tmp_path, tokenizer, labelled("1.5", "2.5", "2.5"))
    assert len(found.train) == 3
    found, _, _ = prepared(tmp_path, tokenizer, labelled(*range(30)))
    assert "all 30 classes are numbers" in found.statistics.remarks[0]
    with pytest.raises(UserError, match=r"set spec\.classification\.problemType: MultiLabel"):
        prepared(tmp_path, tokenizer, labelled(["a"]))


# ---- what is learned is shown


def test_status_log_and_report_say_what_is_learned_and_show_it(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": talk}, {"messages": [*talk, *talk, *talk]}]
    found, _, lines = prepared(tmp_path, tokenizer, rows, task="ChatSFT", training={"max_length": 60})
    facts = found.facts
    assert (facts.learned_turns, facts.unlearned_turns, facts.learned_tokens, facts.truncated) == (3, 1, 18, 1)
    assert facts.first_example == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦hello<|im_end|>⟧\n"
    assert "18 of 88 tokens are learned, 3 of 4 turns of the assistant are learned" in lines[0]
    assert lines[1] == f"the first training example, what is learned in ⟦ ⟧: {facts.first_example}"
    page = render(RunRecord.of(training_plan()).model_copy(update={"data": Data.of(found.statistics)}))
    assert '<span class="for" style="--a: .8">hello&lt;|im_end|&gt;</span>' in page
    assert '<th scope="row">assistant turns not learned</th><td class="number">1</td>' in page


def test_what_was_done_so_that_it_can_be_learned_is_counted(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    found, _, lines = prepared(tmp_path, tokenizer, [{"messages": talk}, {"messages": talk[:1] + talk}], task="ChatSFT")
    assert list(found.statistics.train.notes.values()) == [2]
    assert "train: in 2 examples: the model's chat template writes no end of a turn" in lines[1]
    assert Data.of(found.statistics).remarks[0].startswith("in 2 training examples: the model's chat template")


def test_a_long_example_is_cut_in_the_middle_and_its_marks_stay():
    text = marked([("a" * 2000, False), ("b" * 2000, True)], 100)
    assert len(text) <= 100
    assert text.count("⟦") == text.count("⟧") == 1
    assert text.startswith("aaa")
    assert "bbb⟧" in text


# ---- pictures


def file_of(image, form="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def grey(values, kind):
    return Image.fromarray(np.array([values], kind))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (file_of(grey([0, 32768, 65535], np.uint16)), [0, 128, 255]),
        (file_of(grey([0, 0.5, 1], np.float32), "TIFF"), [0, 128, 255]),
        (file_of(grey([0, 128, 255], np.float32), "TIFF"), [0, 128, 255]),
        (file_of(grey([0, 32768, 65535], np.int32), "TIFF"), [0, 128, 255]),
        (file_of(grey([0, 128, 255], np.uint8)), [0, 128, 255]),
        (file_of(Image.merge("LA", [grey([0, 0, 128], np.uint8), grey([0, 255, 255], np.uint8)])), [255, 0, 128]),
        (file_of(Image.merge("RGBA", [*[grey([0, 7, 9], np.uint8)] * 3, grey([255, 255, 0], np.uint8)])), [0, 7, 255]),
    ],
)
def test_pictures_of_every_depth_keep_what_they_show(data, expected):
    for image in (decoded(data, "x"), _image(base64.b64encode(data).decode())):
        assert image.mode == "RGB"
        assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


def test_opaque_pictures_are_converted_as_ever():
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    noise[..., 3] = 255
    image = Image.fromarray(noise)
    assert to_rgb(image).tobytes() == image.convert("RGB").tobytes()
    palette = image.convert("RGB").quantize(8)
    assert to_rgb(palette).tobytes() == palette.convert("RGB").tobytes()
    palette.info["transparency"] = 0
    assert (np.asarray(to_rgb(palette))[np.asarray(palette) == 0] == 255).all()


@pytest.mark.parametrize("values", [[0, 300], [-1, 1], [math.nan, 1]])
def test_numbers_of_no_known_range_are_a_bad_row(values):
    with pytest.raises(BadRow, match="its numbers go from"):
        decoded(file_of(grey(values, np.float32), "TIFF"), "x")


# ---- evaluation, and what a model can't take


def test_held_out_examples_are_drawn_from_all_of_them():
    assert sampled(5, None, 1) == sampled(5, 9, 1) == [0, 1, 2, 3, 4]
    drawn = sampled(10_000, 100, 1)
    assert drawn == sorted(set(drawn)) == sampled(10_000, 100, 1) != sampled(10_000, 100, 2)
    assert len(drawn) == 100
    assert sum(index < 5000 for index in drawn) in range(30, 71)


def test_a_report_with_metrics_that_are_not_finite_can_be_read():
    report = TerminationReport(
        outcome=Outcome.SUCCEEDED,
        reason=Reason.COMPLETED,
        metrics={"evalLoss": 1.5, "evalPearson": math.nan, "x": math.inf},
    )
    assert TerminationReport.from_json(report.to_json()).metrics == {"evalLoss": 1.5}
    # what an older version has written
    text = report.to_json().replace('{"evalLoss":1.5}', '{"evalLoss":1.5,"evalPearson":null}')
    assert TerminationReport.from_json(text).metrics == {"evalLoss": 1.5}
    assert ModelManifest.model_fields["metrics"].annotation == TerminationReport.model_fields["metrics"].annotation


def test_a_report_of_a_long_example_stays_within_its_bound():
    facts = DatasetFacts(first_example="x" * 480, first_bad_row="y" * 300)
    report = TerminationReport(
        outcome=Outcome.FAILED,
        reason=Reason.COMPLETED,
        message="z" * 9000,
        dataset=facts,
        metrics={f"m{n}": 0.123456789 for n in range(200)},
    )
    text = report.to_bounded_json()
    assert len(text.encode()) <= 4096
    assert TerminationReport.from_json(text).dataset.first_bad_row == "y" * 300


@pytest.mark.parametrize(
    ("config", "largest", "words"),
    [
        ({"vocab_size": 259}, 255, None),
        ({"text_config": {"vocab_size": 100}}, 99, "'</s>' (number 258)"),
        ({"vocab_size": 260}, 260, "embeddings for 260 tokens only"),
        ({}, 10**6, None),
    ],
)
def test_a_tokenizer_that_is_larger_than_the_embedding_is_said_before_the_start(tokenizer, config, largest, words):
    if words is None:
        check_tokens(config, tokenizer, largest)
        return
    if largest < 100:  # only what pads isn't there: no matter where nothing is padded
        check_tokens(config, tokenizer, largest, is_padded=False)
    with pytest.raises(UserError, match=r"resize_token_embeddings") as caught:
        check_tokens(config, tokenizer, largest)
    assert words in caught.value.message


def test_more_tokens_than_a_table_of_positions_holds_are_said_before_the_start():
    check_positions({"model_type": "gpt2", "n_positions": 1024}, 1024)
    check_positions({"model_type": "llama", "max_position_embeddings": 1024}, 5000)
    with pytest.raises(
        UserError, match=r"has 1025 tokens, and the model has positions for 1024; set it to 1024 or less"
    ):
        check_positions({"model_type": "gpt2", "n_positions": 1024}, 1025)
    with pytest.raises(UserError, match=r"positions for 512"):
        check_positions({"model_type": "opt", "max_position_embeddings": 512}, 513)
