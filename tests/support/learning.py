"""Tiny real encoders and encoder-decoders over real tweets, and the plainest loop that trains and evaluates a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assets import labelled
from tunesmith_trainer.tasks.base import Assessment, Example, Task

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tweet_rows(
    train: int, eval_per_class: int = 10, seed: int = 0
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Real rows of {text, label}: to learn from, and held out."""
    return labelled(train, eval_per_class, seed)


def word_pieces(folder: Path, size: int = 800) -> Any:
    """A real WordPiece tokenizer as BERT has it, learned from tweets, each time the same; also saved into the folder."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [row["text"] for row in tweet_rows(600)[0]]
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers the letters inside words as its hash table has them, each time otherwise, and decides by number
    # between pairs that are equally frequent. Special tokens it numbers in the order given.
    split = learner.pre_tokenizer.pre_tokenize_str
    words = {word for text in texts for word, _ in split(learner.normalizer.normalize_str(text))}
    inside = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL, *inside], show_progress=False)
    learner.train_from_iterator(texts, trainer)
    base = Tokenizer(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    base.normalizer, base.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    base.add_special_tokens(SPECIAL)
    ends = [(token, base.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    base.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_bert(folder: Path, head: str = "BertModel", **config: Any) -> Path:
    """A BERT of two layers and random weights, with its tokenizer; `head` is the class it is saved as."""
    import torch
    import transformers

    tokenizer = word_pieces(folder)
    settings = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, head)(settings).save_pretrained(folder)
    return folder


def tiny_t5(folder: Path) -> Path:
    """A T5 of two layers and random weights, with its tokenizer."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = word_pieces(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def train(task: Task, model: Any, examples: Sequence[Example], *, steps: int, size: int, rate: float) -> list[float]:
    """Train with AdamW, batch after batch, over and over; return each step's mean loss."""
    import torch

    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=rate)
    losses = []
    for step in range(steps):
        start = step * size % len(examples)
        batch = task.collate(examples[start : start + size], torch.device("cpu"), False)
        loss = task.loss(model, batch) / batch.units
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assess(task: Task, model: Any, examples: Sequence[Example], size: int = 16) -> Assessment:
    """Evaluate in batches of `size` and add up."""
    import torch

    model.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(examples), size):
            batch = task.collate(examples[start : start + size], torch.device("cpu"), False)
            parts.append(task.assess(model, batch))
    sums = {
        name: [sum(values) for values in zip(*(part.sums[name] for part in parts), strict=True)]
        for name in parts[0].sums
    }
    outcomes = [outcome for part in parts for outcome in part.outcomes]
    return Assessment(sums, outcomes, [pair for part in parts for pair in part.texts])


def scores(task: Task, model: Any, examples: Sequence[Example], size: int = 16) -> dict[str, float]:
    """Metrics of all examples."""
    return task.metrics(assess(task, model, examples, size))


def loss_of(task: Task, model: Any, examples: Sequence[Example]) -> float:
    """The loss of one batch, summed over its units, without dropout."""
    import torch

    model.eval()
    with torch.no_grad():
        return float(task.loss(model, task.collate(examples, torch.device("cpu"), False)))
