"""DPO and Reward: pairs in every form, losses that agree with TRL's, and a tiny model that learns to prefer."""

import copy
import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from assets import tiny
from assets.tweets import LABELS, tweets
from support.plans import training_plan
from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.dataset import Columns, Dataset, DatasetSource
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.task import Preference, PreferenceLoss, Task
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.attention import packed_implementation
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import IGNORE, BadRow
from tunesmith_trainer.tasks.preference_pairs import read_pair

CPU = torch.device("cpu")
COLUMNS = Columns()


def task_plan(task, method=MethodType.FULL, training=None, **changes):
    training = {"max_length": 256, **(training or {})}
    return training_plan("s3://bucket", task=task, method=method.value, training=training, **changes)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def folder(tmp_path):
    """A tokenizer without a chat template."""
    return tiny.llama(tmp_path)


@pytest.fixture
def chat_folder(tmp_path):
    return tiny.llama(tmp_path, template=tiny.CHATML)


def ready(task, folder, method=MethodType.FULL, *, dropout=0.3, **changes):
    """A task with its processor, and its model as the loop has it before training."""
    task = task_for(task_plan(task, method, **changes))
    task.load_processor(folder)
    torch.manual_seed(1)
    model = task.load_model(folder, dtype=torch.float32)
    if method is MethodType.LORA:
        from peft import LoraConfig, get_peft_model

        saved = ["score"] if task.plan.task is Task.REWARD else None
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, modules_to_save=saved)
        )
    task.freeze_reference(model)
    return task, model


def perturbed(model):
    """The same model a few steps later."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


ROWS = [
    {"prompt": "Is it good?", "chosen": " Yes, very.", "rejected": " No"},
    {"prompt": "The colour of grass", "chosen": " green", "rejected": " is blue, or so they say"},
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11"},
]


def examples_of(task, rows=ROWS):
    found = []
    for row in rows:
        task.check_row(row)
        found += task.encode(row)
    return found


# ---- rows

CHOSEN, REJECTED = [said("yes")], [said("no")]
QUESTION = [user("really?")]


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "really?", "chosen": "yes", "rejected": "no"}, "really?", "yes", "no"),
        ({"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}, QUESTION, CHOSEN, REJECTED),
        ({"prompt": "really?", "chosen": CHOSEN, "rejected": REJECTED}, QUESTION, CHOSEN, REJECTED),
        ({"prompt": QUESTION, "chosen": "yes", "rejected": "no"}, QUESTION, CHOSEN, REJECTED),
        ({"chosen": QUESTION + CHOSEN, "rejected": QUESTION + REJECTED}, QUESTION, CHOSEN, REJECTED),
        ({"prompt": None, "chosen": QUESTION + CHOSEN, "rejected": QUESTION + REJECTED}, QUESTION, CHOSEN, REJECTED),
        ({"prompt": "really?", "chosen": QUESTION + CHOSEN, "rejected": QUESTION + REJECTED}, QUESTION, CHOSEN, REJECTED),
        ({"prompt": QUESTION, "chosen": QUESTION + CHOSEN, "rejected": QUESTION + REJECTED}, QUESTION, CHOSEN, REJECTED),
        ({"chosen": "Q: why? A: because", "rejected": "Q: why? A: before"}, "Q: why? A: ", "because", "before"),
    ],
)  # fmt: skip
def test_every_form_of_a_preference_is_read_alike(row, prompt, chosen, rejected):
    pair = read_pair(row, COLUMNS)
    assert (pair.prompt, list(pair.chosen), list(pair.rejected)) == (prompt, list(chosen), list(rejected))
    assert pair.templated == ("prompt" in row or not isinstance(row["chosen"], str))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q", "rejected": "no"}, ["'chosen'", "prompt, rejected", "spec.dataset.columns.chosen"]),
        ({"prompt": "q", "chosen": "yes"}, ["'rejected'", "spec.dataset.columns.rejected"]),
        ({"prompt": "q", "chosen": "yes", "rejected": "yes"}, ["the same", "remove the row"]),
        ({"prompt": "q", "chosen": "yes", "rejected": REJECTED}, ["'chosen' is a text but 'rejected' a list", "same form"]),
        ({"prompt": "q", "chosen": CHOSEN, "rejected": "no"}, ["'rejected' is a text but 'chosen' a list", "same form"]),
        ({"prompt": "q", "chosen": " ", "rejected": "no"}, ["'chosen' is empty"]),
        ({"prompt": 7, "chosen": "yes", "rejected": "no"}, ["'prompt' must be a text or a list"]),
        ({"prompt": [{"role": "user"}], "chosen": "yes", "rejected": "no"}, ["'prompt': message 1 needs a text 'content'"]),
        ({"prompt": QUESTION, "chosen": [{"role": "bot", "content": "x"}], "rejected": REJECTED}, ["'chosen': message 1", "'bot'"]),
        ({"prompt": QUESTION, "chosen": ["yes"], "rejected": REJECTED}, ["'chosen': message 1 is not an object"]),
        ({"prompt": QUESTION, "chosen": [user("x")], "rejected": REJECTED}, ["'chosen' has no assistant message"]),
        ({"chosen": "yes", "rejected": "no"}, ["no field 'prompt'", "spec.dataset.columns.prompt"]),
    ],
)  # fmt: skip
def test_a_row_without_a_preference_says_what_is_wrong_and_what_helps(row, words):
    with pytest.raises(BadRow) as caught:
        task_for(task_plan(Task.DPO)).check_row(row)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_reward_needs_no_prompt():
    task_for(task_plan(Task.REWARD)).check_row({"chosen": "a fine text", "rejected": "trash"})


def test_columns_can_be_named_otherwise():
    columns = Columns(prompt="ask", chosen="win", rejected="lose")
    dataset = Dataset(train=DatasetSource(uri="s3://bucket/x.jsonl"), columns=columns)
    task = task_for(task_plan(Task.DPO, dataset=dataset))
    row = {"ask": "q", "win": "yes", "lose": "no"}
    task.check_row(row)
    assert task.texts_of(row) == {"ask": "q"}
    assert task.texts_of({"ask": QUESTION, "win": CHOSEN, "lose": REJECTED}) == {}


# ---- tokens


def learned(tokenizer, ids, labels):
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    return tokenizer.decode([label for label in labels if label != IGNORE])


def test_without_a_chat_template_texts_are_joined_and_the_answer_and_its_end_are_learned(folder):
    task, _ = ready(Task.DPO, folder)
    features = examples_of(task)[0].features
    tokenizer = task.processor
    assert tokenizer.decode(features["chosen_input_ids"]) == "Is it good? Yes, very.</s>"
    assert learned(tokenizer, features["chosen_input_ids"], features["chosen_labels"]) == " Yes, very.</s>"
    assert learned(tokenizer, features["rejected_input_ids"], features["rejected_labels"]) == " No</s>"


def test_with_a_chat_template_only_the_turns_behind_the_prompt_are_learned(chat_folder):
    task, _ = ready(Task.DPO, chat_folder)
    prompt = [user("hello"), said("hi, what is it?"), user("really?")]
    row = {"prompt": prompt, "chosen": CHOSEN, "rejected": REJECTED}
    (example,) = examples_of(task, [row])
    ids, labels = example.features["chosen_input_ids"], example.features["chosen_labels"]
    assert "hi, what is it?" in task.processor.decode(ids)
    assert learned(task.processor, ids, labels) == "yes<|im_end|>"
    (whole,) = examples_of(task, [{"chosen": prompt + CHOSEN, "rejected": prompt + REJECTED}])
    assert whole == example
    assert (example.units, example.length) == (1.0, len(ids) + len(example.features["rejected_input_ids"]))


def test_a_text_prompt_becomes_a_users_turn_where_there_is_a_chat_template(chat_folder):
    task, _ = ready(Task.DPO, chat_folder)
    (example,) = examples_of(task, [{"prompt": "really?", "chosen": "yes", "rejected": "no"}])
    assert example == examples_of(task, [{"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}])[0]


def test_messages_need_a_chat_template(folder):
    task, _ = ready(Task.DPO, folder)
    with pytest.raises(BadRow, match="no chat template; give prompt, chosen and rejected as texts"):
        examples_of(task, [{"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED}])


def test_a_cut_that_leaves_no_difference_leaves_the_row_out(folder):
    task, _ = ready(Task.DPO, folder, training={"max_length": 12})
    assert examples_of(task, [{"prompt": "a long question?", "chosen": "yes", "rejected": "no"}]) == []
    assert examples_of(task, [{"prompt": "question", "chosen": "same and so on", "rejected": "same but no"}]) == []
    (example,) = examples_of(task, [{"prompt": "question", "chosen": "yes, indeed", "rejected": "no"}])
    assert example.truncated
    assert len(example.features["chosen_input_ids"]) == 12
    task, _ = ready(Task.REWARD, folder, training={"max_length": 12})
    assert examples_of(task, [{"prompt": "a long question?", "chosen": "yes", "rejected": "no"}]) == []


# ---- DPO


def by_hand(task, model, reference, row):
    """The log-probability ratios of both answers, one token after the other."""
    features, ratios = task.encode(row)[0].features, []
    for side in ("chosen", "rejected"):
        ids, labels = features[f"{side}_input_ids"], features[f"{side}_labels"]
        total = 0.0
        for one, sign in ((model, 1), (reference, -1)):
            scores = one(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            total += sign * sum(scores[place - 1, label] for place, label in enumerate(labels) if label != IGNORE)
        ratios.append((total, sum(label != IGNORE for label in labels)))
    return ratios


@pytest.mark.parametrize("kind", PreferenceLoss)
def test_the_loss_is_that_of_the_paper(folder, kind):
    task, model = ready(Task.DPO, folder, preference=Preference(beta=0.3, loss_type=kind))
    reference = copy.deepcopy(model)
    perturbed(model)
    loss = task.loss(model, task.collate(examples_of(task), CPU, packed=False))
    expected = 0.0
    for row in ROWS:
        (chosen, m), (rejected, n) = by_hand(task, model, reference, row)
        if kind is PreferenceLoss.SIGMOID:
            expected += math.log1p(math.exp(-0.3 * (chosen - rejected).item()))
        else:
            expected += (chosen / m - rejected / n - 1 / 0.6).item() ** 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def packed_loss(task, model, examples):
    with packed_implementation(model, True):
        return task.loss(model, task.collate(examples, CPU, packed=True))


@pytest.mark.parametrize("method", [MethodType.FULL, MethodType.LORA])
def test_a_batch_counts_as_much_as_its_pairs_one_by_one_padded_or_packed(folder, method):
    task, model = ready(Task.DPO, folder, method)
    perturbed(model).eval()
    examples = examples_of(task)
    alone = sum(float(task.loss(model, task.collate([example], CPU, packed=False))) for example in examples)
    assert float(task.loss(model, task.collate(examples, CPU, packed=False))) == pytest.approx(alone, rel=1e-5)
    assert float(packed_loss(task, model, examples)) == pytest.approx(alone, rel=1e-5)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", [MethodType.FULL, MethodType.LORA])
def test_the_reference_is_the_model_that_training_starts_from(folder, method):
    task, model = ready(Task.DPO, folder, method)
    batch = task.collate(examples_of(task), CPU, packed=False)
    start = task.metrics(task.assess(model.eval(), batch))
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert start["rewardMargin"] == pytest.approx(0.0, abs=1e-6)
    perturbed(model)
    moved = task.metrics(task.assess(model, batch))
    assert abs(moved["rewardMargin"]) > 1e-3
    assert moved["rewardMargin"] == pytest.approx(moved["chosenReward"] - moved["rejectedReward"])
    if method is MethodType.FULL:
        assert task.reference is not None
        assert not any(parameter.requires_grad for parameter in task.reference.parameters())
    else:
        assert task.reference is None


def test_dropout_never_touches_the_reference_and_stays_on_for_the_model(folder):
    task, model = ready(Task.DPO, folder, MethodType.LORA)
    perturbed(model).train()
    batch = task.collate(examples_of(task), CPU, packed=False)
    modes = {name: module.training for name, module in model.named_modules()}
    first, second = task._reference(batch), task._reference(batch)
    assert torch.equal(first.sums, second.sums)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert float(task.loss(model, batch)) != float(task.loss(model, batch))


def test_a_loss_without_a_reference_is_refused(folder):
    task = task_for(task_plan(Task.DPO))
    task.load_processor(folder)
    model = task.load_model(folder, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="freeze_reference"):
        task.loss(model, task.collate(examples_of(task), CPU, packed=False))


def test_a_reference_of_16_bits_is_kept_where_training_computes_in_them(folder):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    task, _ = ready(Task.DPO, folder, training={"precision": "BF16"})
    assert {parameter.dtype for parameter in task.reference.parameters()} == {torch.bfloat16}
    task, _ = ready(Task.DPO, folder)
    assert {parameter.dtype for parameter in task.reference.parameters()} == {torch.float32}


@contextmanager
def one_rank_group(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [Task.DPO, Task.REWARD])
def test_distributed_data_parallel_sees_one_forward_per_loss_also_with_adapters(folder, tmp_path, kind):
    task, model = ready(kind, folder, MethodType.LORA)
    perturbed(model).eval()
    examples = examples_of(task)
    task.loss(model, task.collate(examples, CPU, packed=False)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    with one_rank_group(tmp_path):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a second pass fails where the first left something unreduced
            model.zero_grad()
            task.loss(wrapped, task.collate(examples, CPU, packed=False)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (name in expected)
            if name in expected:
                assert torch.allclose(parameter.grad, expected[name], atol=1e-6), name


def test_label_smoothing_spreads_over_both_orders_of_a_pair(folder):
    for kind in (Task.DPO, Task.REWARD):
        task, model = ready(kind, folder)
        perturbed(model)
        examples = examples_of(task)
        swapped = [replace(example, features=swap(example.features)) for example in examples]
        plain = float(task.loss(model, task.collate(examples, CPU, packed=False)))
        flipped = float(task.loss(model, task.collate(swapped, CPU, packed=False)))
        object.__setattr__(task.plan.training, "label_smoothing_factor", 0.2)
        smooth = float(task.loss(model, task.collate(examples, CPU, packed=False)))
        assert smooth == pytest.approx(0.9 * plain + 0.1 * flipped, rel=1e-5)


def swap(features):
    return {
        name.replace(*(("chosen", "rejected") if "chosen" in name else ("rejected", "chosen"))): value
        for name, value in features.items()
    }


def test_ipo_has_no_label_smoothing():
    with pytest.raises(UserError, match=r"labelSmoothingFactor.*lossType IPO") as caught:
        task_for(
            task_plan(
                Task.DPO, preference=Preference(loss_type=PreferenceLoss.IPO), training={"label_smoothing_factor": 0.1}
            )
        )
    assert caught.value.reason is Reason.INVALID_SPEC


# ---- Reward


def test_a_rewards_loss_is_that_of_bradley_and_terry(folder):
    task, model = ready(Task.REWARD, folder)
    examples = examples_of(task)

    def score(ids):
        return float(model(input_ids=torch.tensor([ids])).logits[0, 0])

    margins = [score(e.features["chosen_input_ids"]) - score(e.features["rejected_input_ids"]) for e in examples]
    expected = sum(math.log1p(math.exp(-margin)) for margin in margins)
    batch = task.collate(examples, CPU, packed=False)
    assert float(task.loss(model, batch)) == pytest.approx(expected, rel=1e-5)
    metrics = task.metrics(task.assess(model, batch))
    assert metrics["loss"] == pytest.approx(expected / 3, rel=1e-5)
    assert metrics["margin"] == pytest.approx(sum(margins) / 3, abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == task.processor.pad_token_id == task.processor.eos_token_id


@pytest.mark.parametrize("method", [MethodType.FULL, MethodType.LORA])
def test_before_the_first_step_of_dpo_every_pair_is_a_tie_and_counts_half(chat_folder, method):
    task, model = ready(Task.DPO, chat_folder, method, dropout=0.0)
    batch = task.collate(examples_of(task), CPU, packed=False)
    with torch.no_grad():
        metrics = task.metrics(task.assess(model.eval(), batch))
    assert (metrics["rewardAccuracy"], metrics["rewardMargin"]) == (0.5, 0.0)


def test_outcomes_name_the_row_and_what_was_preferred(folder):
    task, model = ready(Task.REWARD, folder)
    examples = [
        replace(example, features={**example.features, "index": 10 + number})
        for number, example in enumerate(examples_of(task))
    ]
    outcomes = task.assess(model, task.collate(examples, CPU, packed=False)).outcomes
    assert [outcome.index for outcome in outcomes] == [10, 11, 12]
    assert outcomes[0].expected == "Yes, very."
    assert all(outcome.predicted in (outcome.expected, "No", "is blue, or so they say", "11") for outcome in outcomes)


# ---- learning


def preferences(tmp_path, count):
    """Tweets with the right label as the better answer and a wrong one as the worse."""
    lines = tweets(tmp_path / "tweets", count, 1).train.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines):
        *question, answer = json.loads(line)["messages"]
        wrong = [label for label in LABELS if label != answer["content"]][number % 2]
        rows.append({"prompt": question[-1]["content"][-20:], "chosen": answer["content"], "rejected": wrong})
    return rows


@pytest.mark.parametrize("method", [MethodType.FULL, MethodType.LORA])
@pytest.mark.parametrize("kind", [Task.DPO, Task.REWARD])
def test_a_tiny_model_learns_to_prefer_the_right_label(chat_folder, tmp_path, kind, method):
    task, model = ready(kind, chat_folder, method, dropout=0.0)
    batch = task.collate(examples_of(task, preferences(tmp_path, 8)), CPU, packed=False)
    start = task.metrics(task.assess(model.eval(), batch))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(20):
        optimizer.zero_grad()
        (task.loss(model, batch) / batch.units).backward()
        optimizer.step()
    end = task.metrics(task.assess(model.eval(), batch))
    accuracy = "rewardAccuracy" if kind is Task.DPO else "accuracy"
    assert end["loss"] < 0.6 * start["loss"]
    assert end[accuracy] >= max(0.8, start[accuracy])
