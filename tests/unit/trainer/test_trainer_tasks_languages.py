"""Seq2Seq with models of many languages: both sides carry their codes, and the tuned model writes the second one."""

import json

import pytest
import torch

from support.plans import training_plan
from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_trainer.loop.compatibility import save_model, save_processor
from tunesmith_trainer.tasks import task_for

CODES = {
    "nllb": ("deu_Latn", "fra_Latn"),
    "mbart": ("de_DE", "fr_XX"),
    "mbart50": ("de_DE", "fr_XX"),
    "m2m100": ("de", "fr"),
}
LAYERS = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def m2m100_tokenizer(folder):
    """M2M100's is made of a model of sentencepiece."""
    import sentencepiece
    from transformers import M2M100Tokenizer

    with (folder / "spm.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c a"] * 9), model_writer=file, vocab_size=8, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁b", "▁c", "▁"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    return M2M100Tokenizer(folder / "vocab.json", folder / "spm.model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import transformers

    made = {}
    for name, tokenizer, kind in (
        ("nllb", transformers.NllbTokenizer(), transformers.M2M100ForConditionalGeneration),
        ("mbart", transformers.MBartTokenizer(), transformers.MBartForConditionalGeneration),
        ("mbart50", transformers.MBart50Tokenizer(), transformers.MBartForConditionalGeneration),
        (
            "m2m100",
            m2m100_tokenizer(tmp_path_factory.mktemp("spm")),
            transformers.M2M100ForConditionalGeneration,
        ),
    ):
        made[name] = tmp_path_factory.mktemp(name)
        # M2M100 does not count its languages among its tokens
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = kind.config_class(
            **LAYERS, **ids, vocab_size=len(tokenizer) + 200, decoder_start_token_id=tokenizer.eos_token_id
        )
        torch.manual_seed(0)
        kind(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def task_of(folder, source=None, target=None):
    languages = {"source_language": source, "target_language": target} if source else None
    task = task_for(training_plan(task="Seq2Seq", translation=languages, training={"max_length": 8}))
    task.load_processor(folder)
    return task


@pytest.mark.parametrize("name", CODES)
def test_both_sides_carry_their_language_and_the_model_writes_the_second(name, folders, tmp_path):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    source, target = CODES[name]
    task = task_of(folders[name], source, target)
    tokenizer = task.processor
    end = tokenizer.eos_token_id
    heard, said = (tokenizer.convert_tokens_to_ids(f"__{code}__" if name == "m2m100" else code) for code in CODES[name])
    (example,) = task.encode({"source": "a " * 50, "target": "c"})
    inputs, labels = (list(example.features[field]) for field in ("input_ids", "labels"))
    assert len(inputs) == 8
    if name != "mbart":
        assert (inputs[0], inputs[-1], labels[0], labels[-1]) == (heard, end, said, end)
    else:
        assert (inputs[-2:], labels[-2:]) == ([end, heard], [end, said])
    model = task.load_model(folders[name], dtype=torch.float32)
    save_model(model, tmp_path)
    save_processor(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.src_lang, again.tgt_lang) == (source, target)
    asked = again("a b", return_tensors="pt")
    assert (asked["input_ids"][0] == heard).sum() == 1
    written = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generate(**asked, max_new_tokens=4)[0].tolist()
    assert written[:2].index(said) == (0 if name == "mbart" else 1)


def test_languages_that_are_missing_or_unknown_are_named_before_training(folders):
    for codes, words in (
        ((), r"spec\.translation: this model translates .* set sourceLanguage and targetLanguage \(ace_Arab, "),
        (("de", "fra_Latn"), r"spec\.translation\.sourceLanguage: .* doesn't know 'de': take one of deu_Latn"),
        (("deu_Latn", "zz_Zzzz"), r"spec\.translation\.targetLanguage: .*'zz_Zzzz'"),
    ):
        with pytest.raises(UserError, match=words) as found:
            task_of(folders["nllb"], *codes)
        assert found.value.reason is Reason.INVALID_SPEC


def test_a_model_without_languages_is_given_none(tmp_path):
    from support.learning import word_pieces

    word_pieces(tmp_path)
    with pytest.raises(UserError, match=r"spec\.translation: this model's tokenizer has no languages: remove it"):
        task_of(tmp_path, "en", "de")
