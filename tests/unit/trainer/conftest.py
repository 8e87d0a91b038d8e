"""A byte-level tokenizer for the trainer's unit tests: every character is a token, so spans are easy to read."""

import pytest


@pytest.fixture
def tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>"), AddedToken("</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", additional_special_tokens=["<|im_end|>"])
