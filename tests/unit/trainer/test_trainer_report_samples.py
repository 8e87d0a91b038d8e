"""Samples: greedy answers to held-out prompts, equal to a decoder's loop written by hand, bounded in number and time."""

import pytest
import torch

from assets import tiny
from assets.pictures import photographs, to_base64
from support.learning import word_pieces
from support.plans import training_plan
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.models.tokenizers import CHATML
from tunesmith_trainer.report.samples import MOST_SAMPLES, sample, samples
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.vision_chat import VisionChat

NEW_TOKENS = 6


def prepared(task_name, processor):
    task = task_for(training_plan(task=task_name, generation={"maxNewTokens": NEW_TOKENS}))
    task.processor = processor
    return task


@pytest.fixture
def chat(tokenizer):
    tokenizer.chat_template = CHATML.replace("END_OF_TURN", "<|im_end|>")
    tokenizer.pad_token = "</s>"
    return tokenizer


def tiny_llama(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def greedy(model, ids, ends, new_tokens=NEW_TOKENS):
    """The reference: one whole forward pass for each token."""
    ids, produced = list(ids), []
    model.eval()
    with torch.no_grad():
        for _ in range(new_tokens):
            token = int(model(input_ids=torch.tensor([ids + produced])).logits[0, -1].argmax())
            produced.append(token)
            if token in ends:
                break
    return produced


def conversation(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]}


def test_a_conversations_last_answer_is_what_a_greedy_loop_says(chat):
    model = tiny_llama(chat)
    task = prepared("ChatSFT", chat)
    row = conversation("one", "two", "three", "four")
    prompt = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    ids = chat(prompt, add_special_tokens=False)["input_ids"]
    ends = {chat.eos_token_id, chat.convert_tokens_to_ids("<|im_end|>")}
    expected = chat.decode(greedy(model, ids, ends), skip_special_tokens=True).strip()
    answers = sample(model, task, [row])
    assert answers == [expected]
    [shown] = samples(task, [row], ["old"], answers)
    assert shown.prompt == "user: one\nassistant: two\nuser: three"
    assert (shown.expected, shown.before, shown.after) == ("four", "old", expected)


def test_an_answer_ends_with_the_turn(chat):
    model = tiny_llama(chat)
    end = chat.convert_tokens_to_ids("<|im_end|>")
    original = model.forward

    def ends_at_once(*arguments, **options):
        found = original(*arguments, **options)
        found.logits[..., end] = 1e4
        return found

    model.forward = ends_at_once
    assert sample(model, prepared("ChatSFT", chat), [conversation("one", "two")]) == [""]


def test_a_plain_text_is_continued_from_its_beginning(chat):
    model = tiny_llama(chat)
    text = "The quick brown fox jumps over the lazy dog and runs away."
    ids = chat(text)["input_ids"]
    given = len(ids) // 2
    task = prepared("CausalLM", chat)
    expected = chat.decode(greedy(model, ids[:given], {chat.eos_token_id}), skip_special_tokens=True).strip()
    assert sample(model, task, [{"text": text}, {"text": "ab"}]) == [expected]
    [shown] = samples(task, [{"text": text}, {"text": "ab"}], [], ["x"])
    assert shown.prompt == text[:given]
    assert shown.expected == text[given : given + NEW_TOKENS]
    assert shown.before is None


def test_a_source_text_is_answered_by_an_encoder_decoder(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    pieces = word_pieces(tmp_path)
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=pieces.pad_token_id,
        eos_token_id=pieces.sep_token_id, decoder_start_token_id=pieces.pad_token_id, initializer_factor=3.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    task = prepared("Seq2Seq", pieces)
    row = {"source": "the flight was late", "target": "it was late"}
    ids = torch.tensor([pieces(row["source"])["input_ids"]])
    produced = [config.decoder_start_token_id]
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([produced])).logits
            produced.append(int(logits[0, -1].argmax()))
            if produced[-1] == config.eos_token_id:
                break
    assert sample(model, task, [row]) == [pieces.decode(produced, skip_special_tokens=True).strip()]
    [shown] = samples(task, [row], [], ["x"])
    assert (shown.prompt, shown.expected) == (row["source"], row["target"])


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"prompt": "why?", "chosen": "so", "rejected": "no"}, "user: why?", "so"),
        (
            {"chosen": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}],
             "rejected": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "no"}]},
            "user: why?", "so",
        ),
        ({"chosen": "Human: why?\n\nso", "rejected": "Human: why?\n\nno"}, "Human: why?\n\n", "so"),
    ],
)  # fmt: skip
def test_a_preferences_prompt_is_asked_in_every_form(chat, row, prompt, expected):
    task = prepared("DPO", chat)
    [shown] = samples(task, [row], [], sample(tiny_llama(chat), task, [row]))
    assert (shown.prompt, shown.expected) == (prompt, expected)


def test_a_preference_without_a_chat_template_is_asked_as_it_is_trained(tokenizer):
    row = {"prompt": "why?", "chosen": " so", "rejected": " no"}
    model, task = tiny_llama(tokenizer), prepared("DPO", tokenizer)
    ids = tokenizer("why?")["input_ids"]
    expected = tokenizer.decode(greedy(model, ids, {tokenizer.eos_token_id}), skip_special_tokens=True).strip()
    assert sample(model, task, [row]) == [expected]
    [shown] = samples(task, [row], [], [expected])
    assert (shown.prompt, shown.expected) == ("why?", " so")


def test_a_template_that_fails_costs_the_samples_and_not_the_run(chat):
    chat.chat_template = "{{ raise_exception('only one turn, please') }}"
    lines = []
    assert sample(tiny_llama(chat), prepared("ChatSFT", chat), [conversation("one", "two")], log=lines.append) == []
    assert lines == ["warning: the report has 0 samples: only one turn, please"]


def test_ranks_that_share_a_model_out_give_shorter_answers_instead_of_fewer(chat):
    model, task = tiny_llama(chat), prepared("ChatSFT", chat)
    rows = [conversation(f"question {number}", "yes") for number in range(2)]
    whole = sample(model, task, rows)
    assert sample(model, task, rows, group=Group()) == whole
    short = sample(model, task, rows, budget_seconds=0.0, group=Group())
    assert len(short) == len(whole)
    assert all(answer.startswith(start) and answer != start for answer, start in zip(whole, short, strict=True))


def test_samples_are_few_and_stop_when_time_is_used_up(chat):
    model, task = tiny_llama(chat).train(), prepared("ChatSFT", chat)
    rows = [conversation(f"question {number}", "yes") for number in range(MOST_SAMPLES + 3)]
    assert len(sample(model, task, rows)) == MOST_SAMPLES
    assert sample(model, task, rows, budget_seconds=0.0) == []
    assert samples(task, rows, [], []) == ()
    assert model.training


def test_tasks_that_write_nothing_have_no_samples(chat):
    assert sample(tiny_llama(chat), prepared("MaskedLM", chat), [{"text": "some text"}]) == []


@pytest.mark.parametrize("family", ["llava", "idefics3", "smolvlm", "qwen2_5_vl"])
def test_a_conversation_about_pictures_is_answered_from_what_is_seen(family, tmp_path):
    folder = getattr(tiny, family)(tmp_path)
    task = VisionChat(training_plan(training={"max_length": 512}, generation={"maxNewTokens": NEW_TOKENS}))
    processor = task.load_processor(folder)
    model = task.load_model(folder, dtype=torch.float32).eval()
    picture = photographs()[0].resize((40, 24))
    question = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a roof"}]
    row = {"messages": messages, "images": [to_base64(picture)]}
    text = processor.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[[picture]], return_tensors="pt", add_special_tokens=False)
    prompt = inputs.pop("input_ids")
    mask = inputs.pop("attention_mask")
    inputs.pop("token_type_ids", None)
    ids, first = prompt, prompt.shape[1]
    ends = {processor.tokenizer.eos_token_id, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            known = {name: value for name, value in inputs.items() if name in task._arguments}
            token = int(model(input_ids=ids, attention_mask=mask, **known).logits[0, -1].argmax())
            ids, mask = torch.cat([ids, torch.tensor([[token]])], 1), torch.cat([mask, mask[:, :1]], 1)
            if (kinds := inputs.get("mm_token_type_ids")) is not None:  # what is written is text
                inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(kinds[:, :1])], 1)
            if token in ends:
                break
    expected = processor.tokenizer.decode(ids[0, first:].tolist(), skip_special_tokens=True).strip()
    lines = []
    answers = sample(model, task, [row], log=lines.append)
    assert lines == []
    assert answers == [expected]
    [shown] = samples(task, [row], [], answers)
    assert (shown.prompt, shown.expected) == ("user: [image] what is it?", "a roof")


def test_a_model_that_cannot_generate_is_told_and_has_no_samples(chat):
    model, lines = tiny_llama(chat).train(), []
    model.forward = lambda **inputs: 1 / 0
    assert sample(model, prepared("ChatSFT", chat), [conversation("one", "two")], log=lines.append) == []
    assert lines == ["warning: the report has 0 samples: division by zero"]
    assert model.training
