"""Models that translate between many languages: which two a run is about. Called by `seq2seq`.

Their tokenizers put a code of the language beside the text, and the decoder begins with the target's: NLLB, M2M100 and
mBART-50 are forced to write it first, mBART starts from it. Without codes all of them take both sides for English.
"""

from __future__ import annotations

import re
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.task import Translation
from tunesmith_store.errors import UserError

__all__ = ["begin_in", "has_languages", "set_languages", "tail_length"]

CODE = re.compile(r"[a-z]{2,3}_[A-Za-z]{2,4}")
"""How NLLB and mBART write a language among their special tokens."""
NAMED = 5


def has_languages(tokenizer: Any) -> bool:
    """Whether texts of a tokenizer are marked by their language."""
    return hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "set_tgt_lang_special_tokens")


def set_languages(tokenizer: Any, languages: Translation | None) -> None:
    """Set the languages of both sides.

    Raises:
        UserError: the model needs them and none are given, or the other way round, or it doesn't know them.
    """
    if not has_languages(tokenizer):
        if languages is not None:
            message = "spec.translation: this model's tokenizer has no languages: remove it"
            raise UserError(Reason.INVALID_SPEC, message)
        return
    known = _known(tokenizer)
    if languages is None:
        message = (
            "spec.translation: this model translates between many languages and has to be told which: set "
            f"sourceLanguage and targetLanguage ({_some(known)})"
        )
        raise UserError(Reason.INVALID_SPEC, message)
    for field, code in (("sourceLanguage", languages.source_language), ("targetLanguage", languages.target_language)):
        if code not in known:
            near = [name for name in known if name.startswith(code[:2].lower())] or known
            message = (
                f"spec.translation.{field}: the model's tokenizer doesn't know {code!r}: take one of {_some(near)}"
            )
            raise UserError(Reason.INVALID_SPEC, message)
    tokenizer.src_lang, tokenizer.tgt_lang = languages.source_language, languages.target_language


def tail_length(tokenizer: Any) -> int:
    """Return how many special tokens end a text, which must stay where one is cut."""
    return max(1, len(getattr(tokenizer, "suffix_tokens", ())))


def begin_in(model: Any, tokenizer: Any) -> None:
    """Have a model begin what it writes in the target language: here, and wherever it is loaded once it is saved."""
    if not has_languages(tokenizer):
        return
    code = _number(tokenizer, tokenizer.tgt_lang)
    if code in tokenizer(text_target="a")["input_ids"][:1]:
        model.generation_config.forced_bos_token_id = code
    else:
        model.generation_config.decoder_start_token_id = code


def _known(tokenizer: Any) -> list[str]:
    codes = getattr(tokenizer, "lang_code_to_id", None)
    return sorted(codes or (token for token in tokenizer.all_special_tokens if CODE.fullmatch(token)))


def _number(tokenizer: Any, code: str) -> int:
    codes = getattr(tokenizer, "lang_code_to_id", None)
    return int(codes[code] if codes else tokenizer.convert_tokens_to_ids(code))


def _some(codes: list[str]) -> str:
    more = f" and {len(codes) - NAMED} more" if len(codes) > NAMED else ""
    return ", ".join(codes[:NAMED]) + more
