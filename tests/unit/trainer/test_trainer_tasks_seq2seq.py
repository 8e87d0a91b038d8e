"""Seq2Seq: rows, each family's decoder inputs, exact losses, scores of written texts, and learning."""

import pytest
import torch
from torch.nn import functional

from support.learning import assess, loss_of, scores, train, tweet_rows, word_pieces
from support.plans import training_plan
from tunesmith_store.errors import UserError
from tunesmith_trainer.tasks import task_for
from tunesmith_trainer.tasks.base import IGNORE, BadRow, Example
from tunesmith_trainer.tasks.seq2seq import text_scores

CPU = torch.device("cpu")
SMALL = {"d_model": 32, "vocab_size": 60, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
LAYERS = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
    "dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip


def t5(**settings):
    from transformers import T5Config, T5ForConditionalGeneration

    values = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, **settings}
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A T5 of two layers and random weights, with a tokenizer that ends a text as T5's does."""
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("t5")
    tokenizer = word_pieces(folder, 500)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A [SEP]", None, [("[SEP]", tokenizer.sep_token_id)]
    )
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    t5(
        vocab_size=len(tokenizer),
        pad_token_id=0,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=0,
    ).save_pretrained(folder)
    return folder


def task_of(folder, training=None, **generation):
    task = task_for(
        training_plan(task="Seq2Seq", training={"max_length": 32, **(training or {})}, generation=generation)
    )
    if folder is not None:
        task.load_processor(folder)
    return task


def rows(count=8):
    """Real tweets and a sentence about each."""
    made = []
    for row in tweet_rows(count)[0]:
        first = "".join(letter for letter in row["text"].split()[0].lower() if letter.isalnum())
        made.append({"source": row["text"], "target": f"{first} is {row['label']}"})
    return made


def encoded(task, data):
    return [example for row in data for example in task.encode(row)]


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_row_needs_both_texts(side):
    row = {"source": "a", "target": "b"}
    del row[side]
    with pytest.raises(BadRow, match=rf"has no field '{side}' .* set spec.dataset.columns.{side}"):
        task_of(None).check_row(row)
    with pytest.raises(BadRow, match=f"field '{side}' is empty"):
        task_of(None).check_row({"source": "a", "target": "b", side: ""})


def test_a_folder_without_a_tokenizer_is_told_so(tmp_path):
    with pytest.raises(UserError, match=r"spec.model.uri: the tokenizer can't be loaded"):
        task_of(None).load_processor(tmp_path)


def test_long_texts_are_cut_but_keep_their_end(folder):
    task = task_of(folder, {"max_length": 8})
    (example,) = task.encode({"source": "word " * 50, "target": "yes"})
    end = task.processor.eos_token_id
    assert example.truncated
    assert len(example.features["input_ids"]) == 8
    assert example.features["input_ids"][-1] == example.features["labels"][-1] == end
    assert example.units == len(example.features["labels"])
    assert not task.encode({"source": "yes", "target": "yes"})[0].truncated


def families():
    import transformers

    return {
        "T5": lambda: t5(**SMALL | {"d_model": 64}),
        "Bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL, **LAYERS)),
        "Marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**SMALL, **LAYERS)),
        "MBart": lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**SMALL, **LAYERS)),
        # shifts its labels inside and says nothing of it
        "M2M100": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**SMALL, **LAYERS)),
    }


@pytest.mark.parametrize("family", ["T5", "Bart", "Marian", "MBart", "M2M100"])
def test_the_loss_is_each_familys_own_and_the_sum_over_its_examples(folder, family):
    torch.manual_seed(0)
    model = families()[family]().eval()
    task = task_of(folder)
    task.processor.pad_token_id = 1
    draw = torch.Generator().manual_seed(1)
    examples = []
    for source, target in ((5, 3), (9, 6), (2, 8)):
        ids, labels = (torch.randint(5, 60, (size,), generator=draw).tolist() for size in (source, target))
        examples.append(Example({"input_ids": [*ids, 2], "labels": [*labels, 2]}, source + target + 2, target + 1.0))
    batch = task.collate(examples, CPU, False)
    with torch.no_grad():
        own = float(model(**batch.inputs, labels=batch.labels).loss) * batch.units
    assert batch.units == 20
    assert loss_of(task, model, examples) == pytest.approx(own, rel=1e-5)
    assert sum(loss_of(task, model, [example]) for example in examples) == pytest.approx(own, rel=1e-5)


def test_smoothing_is_torchs_and_only_for_training(folder):
    task = task_of(folder, {"label_smoothing_factor": 0.1})
    model, examples = task.load_model(folder, dtype=torch.float32).eval(), encoded(task, rows())
    batch = task.collate(examples, CPU, False)
    with torch.no_grad():
        logits = model(**batch.inputs, labels=batch.labels).logits.flatten(0, 1)
    targets = batch.labels.flatten()
    smooth = functional.cross_entropy(logits, targets, ignore_index=IGNORE, label_smoothing=0.1)
    plain = functional.cross_entropy(logits, targets, ignore_index=IGNORE)
    assert loss_of(task, model, examples) / batch.units == pytest.approx(float(smooth), rel=1e-5)
    assert scores(task, model, examples)["loss"] == pytest.approx(float(plain), rel=1e-5)


def test_written_texts_are_scored_as_the_libraries_do():
    pairs = [("the cat sat on the mat", "the cat sat on a mat"), ("hello there world", "hello world")]
    found = text_scores(pairs)
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    said, true = [pair[0] for pair in pairs], [[pair[1] for pair in pairs]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, true).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, true).score)
    rouge = RougeScorer(["rougeL"])
    assert found["rougeL"] == pytest.approx(sum(rouge.score(b, a)["rougeL"].fmeasure for a, b in pairs) / 2)
    assert 0 < found["rougeL"] < 1


def test_rouge_reads_other_scripts():
    assert text_scores([("привет мир", "привет мир")])["rougeL"] == 1


def test_metrics_do_not_depend_on_how_the_data_are_cut(folder):
    task = task_of(folder, max_new_tokens=5)
    model, examples = task.load_model(folder, dtype=torch.float32), encoded(task, rows(9))
    whole, parts = assess(task, model, examples, 9), assess(task, model, examples, 2)
    assert [expected for _, expected in whole.texts] == [expected for _, expected in parts.texts]
    assert task.metrics(whole) == pytest.approx(task.metrics(parts), rel=1e-4)
    assert [outcome.expected for outcome in whole.outcomes] == [expected for _, expected in whole.texts]


def test_a_tiny_t5_learns_to_write(folder):
    task = task_of(folder, max_new_tokens=16)
    model, data = task.load_model(folder, dtype=torch.float32), rows()
    examples = encoded(task, data)
    before = scores(task, model, examples)
    losses = train(task, model, examples, steps=80, size=8, rate=1e-2)
    after = scores(task, model, examples)
    assert losses[-1] < 0.3 < 3 < losses[0]
    assert after["loss"] < before["loss"]
    assert after["tokenAccuracy"] > 0.9 > 0.1 > before["tokenAccuracy"]
    # what it writes by itself, token after token
    assert after["rougeL"] > 0.8 > 0.2 > before["rougeL"]
    assert after["bleu"] > 50 > before["bleu"]
    assert after["chrf"] > 50 > before["chrf"]


def test_generation_obeys_the_spec(folder):
    task = task_of(folder, max_new_tokens=3, num_beams=2)
    model = task.load_model(folder, dtype=torch.float32).eval()
    batch = task.collate(encoded(task, rows(2)), CPU, False)
    asked = {}
    real = model.generate

    def listen(**settings):
        asked.update(settings)
        return real(**settings)

    model.generate = listen
    with torch.no_grad():
        found = task.assess(model, batch)
    assert (asked["max_new_tokens"], asked["num_beams"], asked["do_sample"]) == (3, 2, False)
    assert len(found.texts) == 2


def test_a_model_that_ranks_share_out_writes_the_same(folder):
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard

    task = task_of(folder, max_new_tokens=5)
    model, examples = task.load_model(folder, dtype=torch.float32), encoded(task, rows(4))
    alone = assess(task, model, examples)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in [*model.encoder.block, *model.decoder.block]:
            fully_shard(block)
        fully_shard(model, reshard_after_forward=True)
        shared = assess(task, model, examples)
    finally:
        dist.destroy_process_group()
    assert shared.texts == alone.texts
    assert task.metrics(shared) == pytest.approx(task.metrics(alone), rel=1e-5)


def test_adapters_train(folder):
    from peft import LoraConfig, get_peft_model

    task = task_of(folder, max_new_tokens=8)
    model = get_peft_model(task.load_model(folder, dtype=torch.float32), LoraConfig(r=8, target_modules=["q", "v"]))
    examples = encoded(task, rows())
    losses = train(task, model, examples, steps=10, size=8, rate=3e-2)
    assert losses[-1] < losses[0] - 0.1
    assert len(assess(task, model, examples).texts) == 8


def test_marians_own_tokenizer_works_though_it_has_no_fast_form(tmp_path):
    import json

    import sentencepiece
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    text = tmp_path / "text"
    text.write_text("\n".join(row["text"] for row in tweet_rows(300)[0]))
    for side in ("source", "target"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / side), vocab_size=300, minloglevel=2,
            hard_vocab_limit=False, bos_id=-1, eos_id=0, unk_id=1,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "source.model"))
    names = [pieces.id_to_piece(number) for number in range(len(pieces))]
    (tmp_path / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate([*names, "<pad>"])}))
    folder = tmp_path / "model"
    tokenizer = MarianTokenizer(
        str(tmp_path / "source.model"), str(tmp_path / "target.model"), str(tmp_path / "vocab.json")
    )
    tokenizer.save_pretrained(folder)
    size, pad = len(names) + 1, len(names)
    ids = {"vocab_size": size, "decoder_vocab_size": size, "pad_token_id": pad, "eos_token_id": 0, "bos_token_id": 0}
    config = MarianConfig(
        d_model=32, **LAYERS, **ids, decoder_start_token_id=pad, forced_eos_token_id=0, share_encoder_decoder_embeddings=True
    )  # fmt: skip
    MarianMTModel(config).save_pretrained(folder)
    task = task_of(folder, max_new_tokens=100)
    examples = encoded(task, rows())
    model = task.load_model(folder, dtype=torch.float32)
    losses = train(task, model, examples, steps=10, size=8, rate=1e-2)
    assert losses[-1] < losses[0] - 0.5
    found = assess(task, model, examples)  # it writes to the end of its 64 positions, no further
    assert found.texts[0][1] == rows()[0]["target"]
