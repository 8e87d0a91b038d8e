"""Conversations about pictures: LLaVA, Idefics3 and Qwen2.5-VL with their real processors, real photographs, real batches."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from assets import tiny
from assets.pictures import from_base64, photographs, picture_questions, to_base64
from support.plans import training_plan
from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.data.examples import ExampleSet, ExampleWriter
from tunesmith_trainer.data.table import RowTable
from tunesmith_trainer.tasks.base import IGNORE, BadRow
from tunesmith_trainer.tasks.vision_chat import VisionChat

CPU = torch.device("cpu")
KEPT = []
"""What is never let go of, as in `tunesmith_trainer.group.worker`."""
FAMILIES = ["llava", "idefics3", "smolvlm", "qwen2_5_vl"]
TILED = {"idefics3", "smolvlm"}
IMAGES = {
    "llava": ("<image>", 16), "idefics3": ("<image>", 5 * 4), "smolvlm": ("<image>", 5 * 4), "qwen2_5_vl": ("<|image_pad|>", 15),
}  # fmt: skip
"""What an image of 40 × 24 pixels becomes: the token, and how many."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: getattr(tiny, name)(tmp_path_factory.mktemp(name)) for name in FAMILIES}


def vision_chat(**training):
    return VisionChat(training_plan("s3://bucket", training={"max_length": 512, **training}))


def ready(folder, **training):
    task = vision_chat(**training)
    task.load_processor(folder)
    return task, task.load_model(folder, dtype=torch.float32)


def encoded(task, rows):
    examples = []
    for row in rows:
        task.check_row(row)
        examples += task.encode(row)
    return examples


def part(text=None):
    return {"type": "image"} if text is None else {"type": "text", "text": text}


def row_of(*parts, images=1, answer="yes", size=(40, 24)):
    piece = to_base64(photographs()[0].resize(size))
    messages = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [piece] * images}


def learned(task, example):
    return task.processor.decode([label for label in example.features["labels"] if label != IGNORE])


# ---- rows


def parts_by(role, *parts):
    return [
        {"role": "user", "content": "look"},
        {"role": role, "content": list(parts)},
        {"role": "assistant", "content": "x"},
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (row_of(part(), part("what?"), images=2), ["1 image part(s) in 'messages'", "2 image(s) in 'images'", "columns.images"]),
        (row_of(part("what?"), images=1), ["0 image part(s)", "1 image(s)"]),
        ({"messages": row_of(part())["messages"]}, ["1 image part(s)", "0 image(s)"]),
        (row_of(part(), part("what?")) | {"images": ["%%"]}, ["'images': image 1 is not valid base64"]),
        (row_of(part(), part("what?")) | {"images": 5}, ["'images' must be a list of images"]),
        ({"messages": parts_by("user", {"type": "image_url"})}, ["message 2, part 1 has type 'image_url'", "use {type: text} or {type: image}"]),
        ({"messages": parts_by("user", {"type": "text"})}, ["message 2, part 1 needs a text 'text'"]),
        ({"messages": parts_by("user", "words")}, ["message 2, part 1 has type 'None'"]),
        ({"messages": parts_by("assistant", part())}, ["message 2, part 1 is an image of the assistant's"]),
        ({"messages": [{"role": "user", "content": []}]}, ["message 1 needs as 'content' a text or a list of parts"]),
        ({"messages": [{"role": "user", "content": 5}]}, ["message 1 needs as 'content'"]),
        ({"messages": [{"role": "user"}]}, ["message 1 needs a text 'content'"]),
        ({"messages": [{"role": "painter", "content": [part()]}]}, ["message 1 has role 'painter'"]),
        ({"messages": [{"role": "user", "content": [part("hi")]}]}, ["no assistant message"]),
    ],
)  # fmt: skip
def test_a_row_that_cant_be_used_says_why_and_what_helps(row, words):
    with pytest.raises(BadRow) as caught:
        vision_chat().check_row(row)
    assert all(word in str(caught.value) for word in words), caught.value


def test_plain_texts_stay_good_rows_and_parts_of_parquet_files_too():
    task = vision_chat()
    task.check_row({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    image = to_base64(photographs()[0].resize((9, 9)))
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "ho"}], "images": image}
    task.check_row(row)
    assert task.texts_of(row) == {"messages.0.1": "what?"}
    changed = task.with_texts(row, {"messages.0.1": "what is it?"})
    assert changed["messages"][0]["content"] == [part(), part("what is it?")]
    task.check_row(changed)


# ---- tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_assistants_turns_are_learned_behind_expanded_images(folders, family):
    task, _ = ready(folders[family])
    messages = [
        {"role": "user", "content": [part(), part("first?")]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [part(), part(), part("more?")]},
        {"role": "assistant", "content": [part("two, three")]},
    ]
    image = to_base64(photographs()[1].resize((40, 24)))
    (example,) = encoded(task, [{"messages": messages, "images": [image] * 3}])
    space, end = (" ", "<end_of_utterance>") if family in TILED else ("", "<|im_end|>")
    assert learned(task, example) == f"{space}one{end}{space}two, three{end}"
    assert example.units == len(f"{space}one{space}two, three") + 2
    token, count = IMAGES[family]
    token = task.processor.tokenizer.convert_tokens_to_ids(token)
    assert example.features["input_ids"].count(token) == 3 * count
    assert all(
        label in (IGNORE, token)
        for token, label in zip(example.features["input_ids"], example.features["labels"], strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_pixels_are_those_of_the_models_own_processor(folders, family):
    task, model = ready(folders[family])
    rows = picture_questions(3)
    batch = task.collate(encoded(task, rows), CPU, packed=False)
    processor = task.processor
    processor.tokenizer.padding_side = "right"
    texts = [processor.apply_chat_template(task._messages(row)) for row in rows]
    images = [[from_base64(text) for text in row["images"]] for row in rows]
    expected = processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert set(batch.inputs) == set(expected)
    for name, value in expected.items():
        assert torch.equal(batch.inputs[name], value), name
    assert task.predict(model, batch).logits.shape == (int(batch.units), model.config.text_config.vocab_size)


def test_text_behind_the_last_image_may_be_cut_an_image_never(folders):
    row = row_of(part(), part("what?"), answer="a long answer " * 20)
    task, _ = ready(folders["llava"], max_length=64)
    (example,) = encoded(task, [row])
    assert example.truncated
    assert (example.length, len(example.features["input_ids"]), len(example.features["labels"])) == (64, 64, 64)
    task, _ = ready(folders["llava"], max_length=20)
    with pytest.raises(BadRow, match=r"takes 22 tokens up to its last image, which spec\.training\.maxLength 20"):
        encoded(task, [row])


def test_an_image_token_in_the_text_is_no_image(folders):
    task, _ = ready(folders["llava"])
    with pytest.raises(BadRow, match="the model's processor refuses it"):
        encoded(task, [row_of(part(), part("what is <image>?"))])


def test_a_folder_without_a_processor_or_chat_template_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="processor can't be used") as caught:
        vision_chat().load_processor(tiny.llama(tmp_path / "text"))
    assert caught.value.reason is Reason.MODEL_INVALID
    for path in folders["llava"].iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"no chat template; add chat_template\.jinja"):
        vision_chat().load_processor(tmp_path)


def test_examples_come_back_from_disk_as_they_were(folders, tmp_path):
    task, _ = ready(folders["idefics3"])
    examples = encoded(task, picture_questions(4))
    with ExampleWriter(tmp_path, "train") as writer:
        for row, example in enumerate(examples):
            writer.add(example, row, 0)
    found = ExampleSet(tmp_path, "train", RowTable(tmp_path, "rows"))
    again = task.collate([found.get(number) for number in range(4)], CPU, packed=False)
    batch = task.collate(examples, CPU, packed=False)
    assert torch.equal(again.labels, batch.labels)
    assert all(torch.equal(again.inputs[name], value) for name, value in batch.inputs.items())


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_what_a_processor_has_for_videos_is_saved_as_it_was(folders, tmp_path, family):
    settings = json.loads((folders[family] / "preprocessor_config.json").read_text())
    task, _ = ready(folders[family])
    task.processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == settings["processor_class"]
    assert saved["video_processor"] == settings
    again = vision_chat().load_processor(tmp_path)
    assert again.video_processor.to_dict() == settings
    assert again.image_processor.to_dict() == task.processor.image_processor.to_dict()


# ---- computing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_counts_as_much_as_its_rows_one_by_one(folders, family):
    task, model = ready(folders[family])
    examples = encoded(task, picture_questions(8))
    alone = sum(task.loss(model, task.collate([example], CPU, packed=False)).item() for example in examples)
    batch = task.collate(examples, CPU, packed=False)
    assert batch.units == sum(example.units for example in examples)
    assert task.loss(model, batch).item() == pytest.approx(alone, rel=1e-5)


def test_a_batch_without_images_gets_one_for_company_that_changes_nothing(folders):
    task, model = ready(folders["llava"])
    (example,) = encoded(task, [row_of(part("what?"), images=0)])
    batch = task.collate([example], CPU, packed=False)
    assert batch.inputs["pixel_values"].shape == (1, 3, 16, 16)
    ids, labels = (torch.tensor([example.features[name]]) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE, reduction="sum")
    loss = task.loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad is not None
    assert len(task.assess(model, batch).outcomes) == 1


@contextmanager
def one_rank_group(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_distributed_data_parallel_waits_for_no_gradient_that_never_comes(folders, tmp_path, method):
    task, model = ready(folders["llava"])
    if method == "LoRA":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    task.freeze_reference(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert any("vision_tower.encoder.layers.2." in name for name in frozen)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("vision_tower.encoder.layers.1." in name for name in trained)
    pictures, words = encoded(task, picture_questions(2)), encoded(task, [row_of(part("what?"), images=0)])
    with one_rank_group(tmp_path):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        KEPT.append(wrapped)
        for examples in (pictures, words, pictures):  # each fails where the one before has left something unreduced
            task.loss(wrapped, task.collate(examples, CPU, packed=False)).backward()
    assert all(model.get_parameter(name).grad is not None for name in trained)


@pytest.mark.parametrize("method", ["Full", "LoRA"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_learns_to_tell_what_it_sees(folders, family, method):
    task, model = ready(folders[family])
    if method == "LoRA":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    task.freeze_reference(model)
    examples = [
        replace(example, features={**example.features, "index": number})
        for number, example in enumerate(encoded(task, picture_questions(8)))
    ]
    batch = task.collate(examples, CPU, packed=False)
    start = task.metrics(task.assess(model.eval(), batch))
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        (task.loss(model, batch) / batch.units).backward()
        optimizer.step()
    with torch.no_grad():
        found = task.assess(model.eval(), batch)
    end = task.metrics(found)
    assert end["loss"] < 0.5 * start["loss"]
    assert end["tokenAccuracy"] > start["tokenAccuracy"]
    assert end["perplexity"] == pytest.approx(math.exp(end["loss"]))
    assert [outcome.index for outcome in found.outcomes] == list(range(8))
    assert found.outcomes[0].expected.strip() == "building"
