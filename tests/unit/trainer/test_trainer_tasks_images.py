"""ImageClassification: real digits to far better than chance, pixels as the model's own processor makes them."""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from assets import tiny
from assets.pictures import digits, photographs, to_base64
from support.plans import dataset, training_plan
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.task import Classification, Task
from tunesmith_store.errors import UserError
from tunesmith_trainer.data.examples import ExampleSet, ExampleWriter
from tunesmith_trainer.data.table import RowTable
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import BadRow, DataSummary

CPU = torch.device("cpu")


def image_task(**changes):
    return task_for(training_plan("s3://bucket", task=Task.IMAGE_CLASSIFICATION, **changes))


def counted(task, rows):
    labels = {}
    for row in rows:
        task.check_row(row)
        for name in task.labels_of(row):
            labels[name] = labels.get(name, 0) + 1
    return DataSummary(labels)


def ready(folder, rows, **changes):
    """A task that knows its classes, its model, and the rows' examples."""
    task = image_task(**changes)
    task.load_processor(folder)
    task.prepare(counted(task, rows))
    model = task.load_model(folder, dtype=torch.float32)
    return task, model, [example for row in rows for example in task.encode(row)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.vit(tmp_path_factory.mktemp("vit"))


def copied(folder, to, name, **changes):
    """The model folder with some settings of one of its files changed."""
    for path in folder.iterdir():
        to.joinpath(path.name).write_bytes(path.read_bytes())
    settings = json.loads((to / name).read_text()) | changes
    (to / name).write_text(json.dumps(settings))
    return to


# ---- rows


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"label": 1}, ["no field 'image'", "its fields: label", "spec.dataset.columns.image"]),
        ({"image": to_base64(Image.new("L", (4, 4)))}, ["no field 'label'", "spec.dataset.columns.label"]),
        ({"image": 7, "label": 1}, ["'image' is no image", "base64 text"]),
        ({"image": "not base64!", "label": 1}, ["'image' is not valid base64"]),
        (
            {"image": base64.b64encode(b"no image at all").decode(), "label": 1},
            ["'image' is not an image", "PNG, JPEG"],
        ),
        ({"image": to_base64(Image.new("L", (4, 4))), "label": 0.5}, ["'label' has the number 0.5"]),
    ],
)
def test_a_row_that_cant_be_used_says_why_and_what_helps(row, words):
    with pytest.raises(BadRow) as caught:
        image_task().check_row(row)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_damaged_image_is_found_when_it_is_decoded(folder):
    data = base64.b64decode(to_base64(photographs()[0].crop((0, 0, 64, 64))))
    row = {"image": base64.b64encode(data[: len(data) // 2]).decode(), "label": 1}
    task, _, _ = ready(folder, digits(20))
    task.check_row(row)
    with pytest.raises(BadRow, match="field 'image' can't be decoded"):
        task.encode(row)


def test_a_data_url_is_as_good_as_base64_text_and_columns_can_be_named(folder):
    plain = digits(20)
    columns = {"image": "picture", "label": "digit"}
    rows = [{"picture": "data:image/png;base64," + row["image"], "digit": row["label"]} for row in plain]
    task, _, examples = ready(folder, rows, dataset=dataset("s3://bucket/x.jsonl", columns=columns))
    _, _, expected = ready(folder, plain)
    batch, other = task.collate(examples, CPU, False), task.collate(expected, CPU, False)
    assert torch.equal(batch.inputs["pixel_values"], other.inputs["pixel_values"])


# ---- pixels


@pytest.mark.parametrize("size", [(8, 8), (640, 427), (13, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pixels_are_those_of_the_models_own_processor(folder, size, mode):
    image = photographs()[1].resize(size).convert(mode)
    task, _, _ = ready(folder, digits(20))
    (example,) = task.encode({"image": to_base64(image), "label": 3})
    expected = task.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    found = task.collate([example], CPU, False).inputs["pixel_values"]
    assert found.shape == (1, 3, 16, 16)
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_photo_taken_upright_is_turned_upright(folder):
    photo = photographs()[0].crop((0, 0, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    out = io.BytesIO()
    photo.rotate(90, expand=True).save(out, "PNG", exif=exif)
    task, _, _ = ready(folder, digits(20))
    rows = [{"image": base64.b64encode(out.getvalue()).decode(), "label": 1}, {"image": to_base64(photo), "label": 1}]
    turned, plain = (task.collate(task.encode(row), CPU, False).inputs["pixel_values"] for row in rows)
    assert torch.allclose(turned, plain, atol=1e-6)


def test_what_is_stored_is_small_and_a_token_is_a_patch(folder):
    task, _, _ = ready(folder, digits(20))
    photo = {"image": to_base64(photographs()[0]), "label": 1}
    for row, resized in ((photo, 1), (digits(1)[0], 0)):
        (example,) = task.encode(row)
        assert example.features["resized"] == [resized]
        assert example.features["image"].dtype == np.uint8
        assert example.features["image"].nbytes < 16 * 16 * 3 + 100
        assert (example.length, example.units) == (16, 1.0)


def test_examples_come_back_from_disk_as_they_were(folder, tmp_path):
    task, _, examples = ready(folder, digits(20))
    examples += task.encode({"image": to_base64(photographs()[0]), "label": 1})
    with ExampleWriter(tmp_path, "train") as writer:
        for row, example in enumerate(examples):
            writer.add(example, row, 0)
    found = ExampleSet(tmp_path, "train", RowTable(tmp_path, "rows"))
    again = task.collate([found.get(number) for number in range(21)], CPU, False)
    batch = task.collate(examples, CPU, False)
    assert torch.equal(again.inputs["pixel_values"], batch.inputs["pixel_values"])
    assert torch.equal(again.labels, batch.labels)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"shortest_edge": 16}}, "different sizes"),
        ({"do_resize": False}, "different sizes"),
        ({"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}, "more than resize"),
    ],
)
def test_a_processor_that_makes_no_batches_is_refused(folder, tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        image_task().load_processor(copied(folder, tmp_path, "preprocessor_config.json", **changes))
    assert caught.value.reason is Reason.MODEL_INVALID


def test_a_model_of_grey_images_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="1 channels"):
        image_task().load_processor(copied(folder, tmp_path, "config.json", num_channels=1))


def test_a_model_learns_from_images_of_another_size_than_its_own(folder, tmp_path):
    size = {"height": 24, "width": 24}
    rows = digits(20)
    task, model, examples = ready(copied(folder, tmp_path, "preprocessor_config.json", size=size), rows)
    assert examples[0].length == 36
    task.loss(model, task.collate(examples, CPU, False)).backward()
    assert model.classifier.weight.grad.any()


# ---- loss


def test_a_batch_counts_as_much_as_its_images_one_by_one_with_class_weights(folder):
    rows = [row for row in digits(60, classes=3) if row["label"] != 2][:20] + digits(60, classes=3)[-8:]
    changes = {"classification": Classification(class_weights="Balanced"), "training": {"label_smoothing_factor": 0.1}}
    task, model, examples = ready(folder, rows, **changes)
    counts = counted(task, rows).labels
    assert len({example.units for example in examples}) == len(set(counts.values())) > 1
    assert sum(example.units for example in examples) == pytest.approx(len(rows))
    batch = task.collate(examples, CPU, False)
    alone = sum(task.loss(model, task.collate([example], CPU, False)).item() for example in examples)
    assert task.loss(model, batch).item() == pytest.approx(alone, rel=1e-5)
    assert batch.units == pytest.approx(len(rows))


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_digits_are_told_apart_far_better_than_by_chance(folder, method):
    train, held_out = digits(200, classes=4), digits(80, start=200, classes=4)
    torch.manual_seed(0)
    task, model, examples = ready(folder, train, method=method)
    if method == "LoRA":
        from peft import LoraConfig, get_peft_model

        heads = list(task.head_modules(model))
        assert heads == ["classifier"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", modules_to_save=heads))
    unseen = [
        replace(example, features={**example.features, "index": number})
        for number, row in enumerate(held_out)
        for example in task.encode(row)
    ]
    batch, judged = task.collate(examples, CPU, False), task.collate(unseen, CPU, False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        (task.loss(model, batch) / batch.units).backward()
        optimizer.step()
    with torch.no_grad():
        found = task.assess(model.eval(), judged)
    metrics = task.metrics(found)
    assert metrics["accuracy"] > 0.6
    assert metrics["loss"] < 1.2
    names, matrix = task.confusion_of(found)
    assert names == ["0", "1", "2", "3"]
    assert sum(map(sum, matrix)) == 80
    assert sum(matrix[number][number] for number in range(4)) == round(80 * metrics["accuracy"])
    assert [outcome.index for outcome in found.outcomes] == list(range(80))
    assert model.config.id2label == dict(enumerate(names))
