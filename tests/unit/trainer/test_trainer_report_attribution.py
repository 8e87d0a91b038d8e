"""Attributions: they add up to what they explain, find the word that decides, and give the text back whole."""

import time

import pytest
import torch

from support.learning import SPECIAL
from tunesmith_trainer.report.attribution import attribute, explained
from tunesmith_trainer.report.record import WorstExample

TEXT = "the flight was great but late"

WORDS = (
    "a and but crew felt flight had in is it late great lines my one seat smile spaces text that the two was we with"
)


@pytest.fixture(scope="module")
def pieces():
    """A WordPiece tokenizer of a few whole words and all letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    vocabulary = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *"0123456789,.?!", *WORDS.split()]
    numbers = {token: at for at, token in enumerate(dict.fromkeys(vocabulary))}
    base = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    base.normalizer = normalizers.BertNormalizer(lowercase=True)
    base.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, base.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    base.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def bert(pieces, labels=3):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=pieces.pad_token_id, num_labels=labels, initializer_range=0.15,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama(pieces, labels=3):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=pieces.pad_token_id, num_labels=labels, initializer_range=0.15,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def with_adapters(pieces):
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(pieces), config)


def learn(model, pieces, rows, steps=30):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = pieces([text for text, _ in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in rows])
    model.train()
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("build", [bert, llama, with_adapters])
def test_scores_add_up_to_the_difference_between_text_and_blank(pieces, build):
    model = build(pieces).eval()
    scores = attribute(model, pieces, TEXT, 1, steps=64)
    encoding = pieces(TEXT, return_tensors="pt", return_special_tokens_mask=True)
    special = encoding.pop("special_tokens_mask").bool()
    # the embedding of padding is zero here
    blank = torch.where(special, encoding["input_ids"], torch.full_like(encoding["input_ids"], pieces.unk_token_id))
    embed = model.get_input_embeddings()
    others = {name: value for name, value in encoding.items() if name != "input_ids"}
    with torch.no_grad():
        full = model(inputs_embeds=embed(encoding["input_ids"]), **others).logits[0, 1]
        empty = model(inputs_embeds=embed(blank), **others).logits[0, 1]
    assert abs(float(full - empty)) > 0.01
    assert sum(score for _, score in scores) == pytest.approx(float(full - empty), rel=0.05, abs=0.005)


@pytest.mark.parametrize("build", [bert, llama])
def test_the_word_that_decides_has_the_highest_score(pieces, build):
    starts = ("the flight was", "a crew that is", "we had", "my seat felt")
    ends = ("", "and it was", "with my seat", "in the flight")
    rows = [
        (f"{start} {word} {end}", label)
        for start in starts
        for end in ends
        for word, label in (("great", 1), ("late", 0))
    ]
    model = learn(build(pieces, labels=2), pieces, rows)
    text = "my crew is great and it was in the flight"
    great, late = (dict(attribute(model, pieces, text, target)) for target in (1, 0))
    assert max(great, key=lambda piece: great[piece]) == " great"
    assert great[" great"] > late[" great"]


def test_without_a_target_the_models_own_choice_is_explained(pieces):
    model = bert(pieces).eval()
    encoding = pieces(TEXT, return_tensors="pt")
    with torch.no_grad():
        first = int(model(**encoding).logits[0].argmax())
    assert attribute(model, pieces, TEXT) == attribute(model, pieces, TEXT, first)
    assert attribute(model, pieces, TEXT) != attribute(model, pieces, TEXT, (first + 1) % 3)


@pytest.mark.parametrize("text", ["  Two  spaces,\nand a line ", "smile 😀😀 ünïcode", "one"])
def test_the_pieces_are_the_text(pieces, tokenizer, text):
    assert "".join(piece for piece, _ in attribute(bert(pieces), pieces, text, 0, steps=2)) == text
    tokenizer.pad_token = "</s>"
    byte_level = "".join(piece for piece, _ in attribute(llama(tokenizer), tokenizer, text, 0, steps=2))
    assert byte_level == text


def test_of_a_pair_both_texts_are_scored(pieces):
    scores = attribute(bert(pieces), pieces, "was it late?", 0, pair="it was great", steps=2)
    assert "".join(piece for piece, _ in scores) == "was it late?\nit was great"
    assert all(score != 0 for piece, score in scores if piece.strip())


def test_a_long_text_is_looked_at_up_to_its_limit(pieces):
    scores = attribute(bert(pieces), pieces, "late " * 100, 0, steps=2, max_length=16)
    assert scores[-1] == (" …", 0.0)
    assert "".join(piece for piece, _ in scores[:-1]) == ("late " * 14).rstrip()


def test_the_model_is_left_as_it_was(pieces):
    model = bert(pieces).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attribute(model, pieces, TEXT, 0, steps=2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_examples_are_explained_until_the_time_is_used_up(pieces, monkeypatch):
    examples = [WorstExample(text=f"{TEXT} {number}", expected="a", predicted="b", loss=1.0) for number in range(3)]
    model = bert(pieces)
    done = explained(model, pieces, examples)
    assert [bool(example.attributions) for example in done] == [True, True, True]
    clock = iter([0.0, 1.0, 40.0, 41.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    late = explained(model, pieces, examples, budget_seconds=30.0)
    assert [bool(example.attributions) for example in late] == [True, False, False]
    assert [example.text for example in late] == [example.text for example in examples]


def test_a_model_that_cannot_be_explained_is_told_and_the_examples_come_back(pieces):
    model, lines = bert(pieces), []
    model.forward = lambda **inputs: pytest.fail("never again") if lines else 1 / 0
    examples = [WorstExample(text=TEXT, expected="a", predicted="b", loss=1.0)] * 2
    assert explained(model, pieces, examples, log=lines.append) == tuple(examples)
    assert lines == ["warning: the report does without token attributions: division by zero"]
    assert explained(model, object(), examples) == tuple(examples)
