"""Which tokens the assistant said: for templates of every habit, and the real SmolLM2."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith_store.errors import UserError
from tunesmith_trainer.models.tokenizers import ensure_chat_template
from tunesmith_trainer.tasks.base import IGNORE
from tunesmith_trainer.tasks.chat import TemplateError, encode_chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as reasoning models do: thoughts of earlier turns are dropped
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# puts something into the prompt that isn't in the finished turn
OPAQUE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def spoken(tokenizer, encoded):
    """The text of each run of labelled tokens."""
    runs, current = [], []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label != IGNORE:
            assert label == token
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs + ([tokenizer.decode(current)] if current else [])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_each_assistant_turn_counts_with_its_end_of_turn_token(tokenizer, template):
    tokenizer.chat_template = template
    (encoded,) = encode_chat(tokenizer, TALK, 1000)
    assert spoken(tokenizer, encoded) == ["hello<|im_end|>", "so long<|im_end|>"]
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_marks_and_prefixes_agree(tokenizer):
    tokenizer.chat_template = CHATML
    by_prefix = encode_chat(tokenizer, TALK, 1000)
    tokenizer.chat_template = MARKED
    assert encode_chat(tokenizer, TALK, 1000) == by_prefix


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each(tokenizer):
    tokenizer.chat_template = FORGETFUL
    talk = [*TALK[:2], {"role": "assistant", "content": "<think>hm</think>hello"}, *TALK[3:]]
    first, last = encode_chat(tokenizer, talk, 1000)
    assert spoken(tokenizer, first) == ["<think>hm</think>hello<|im_end|>"]
    assert spoken(tokenizer, last) == ["so long<|im_end|>"]
    assert tokenizer.decode(last.input_ids) == tokenizer.apply_chat_template(talk, tokenize=False)
    assert (first.turns, last.turns, last.unlearned) == (1, 1, 0)
    assert "turns became examples of their own" in first.notes[0]


def test_a_template_that_hides_the_turn_is_refused(tokenizer):
    tokenizer.chat_template = OPAQUE
    with pytest.raises(TemplateError, match="generation"):
        encode_chat(tokenizer, TALK, 1000)


def test_a_template_that_raises_is_reported(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TemplateError, match="roles must alternate"):
        encode_chat(tokenizer, TALK, 1000)


def test_the_cut_at_max_length_is_at_the_end(tokenizer):
    tokenizer.chat_template = CHATML
    (whole,) = encode_chat(tokenizer, TALK, 1000)
    (cut,) = encode_chat(tokenizer, TALK, 60)
    assert cut.input_ids == whole.input_ids[:60]
    assert cut.labels == whole.labels[:60]


def test_without_a_template_it_is_chatml(tokenizer):
    tokenizer.chat_template = None
    assert ensure_chat_template(tokenizer)
    assert not ensure_chat_template(tokenizer)
    (encoded,) = encode_chat(tokenizer, TALK, 1000)
    assert spoken(tokenizer, encoded) == ["hello<|im_end|>", "so long<|im_end|>"]


def test_without_template_and_end_token_it_is_refused():
    class Bare:
        chat_template = None
        eos_token = None

        def get_vocab(self):
            return {}

    with pytest.raises(UserError, match="chat_template"):
        ensure_chat_template(Bare())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=4))
def test_whatever_is_said_exactly_that_counts(tokenizer, turns):
    tokenizer.chat_template = CHATML
    # characters that the tokenizer can't give back, and the special tokens' own text, are not the point here
    clean = [(a.replace("<", "").strip(), b.replace("<", "").strip()) for a, b in turns]
    talk = [m for a, b in clean for m in ({"role": "user", "content": a}, {"role": "assistant", "content": b})]
    (encoded,) = encode_chat(tokenizer, talk, 10_000)
    assert spoken(tokenizer, encoded) == [f"{b}<|im_end|>" for _, b in clean]


@pytest.mark.timeout(300)
def test_the_real_smollm2_template():
    assets = pytest.importorskip("assets")
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(assets.smollm2())
    (encoded,) = encode_chat(real, TALK[1:], 1000)
    assert spoken(real, encoded) == ["hello<|im_end|>", "so long<|im_end|>"]
    text = real.decode(encoded.input_ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant")
    # a service bot greets
    (greeting,) = encode_chat(real, [{"role": "assistant", "content": "welcome"}, *TALK[1:3]], 1000)
    assert spoken(real, greeting) == ["welcome<|im_end|>", "hello<|im_end|>"]
