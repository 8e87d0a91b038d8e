"""English synonyms from WordNet, through nltk's reader. Called by `augment`; `preflight` asks whether it is there.

Nothing is downloaded at run time: the files come with the image (Debian's package wordnet-base).
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError

__all__ = ["Synonyms", "find_wordnet"]

PLACES = ("/usr/share/wordnet", "/usr/share/nltk_data/corpora/wordnet", "/usr/local/share/nltk_data/corpora/wordnet")
LEXICOGRAPHER_FILES = 45
"""How many WordNet 3.0 was written in, lexnames(5WN)."""


def find_wordnet() -> Path:
    """Return the folder with WordNet's files (index.noun, data.noun, …).

    Raises:
        UserError: there is none.
    """
    named = [
        os.environ.get("WNSEARCHDIR"),
        os.environ.get("NLTK_DATA") and f"{os.environ['NLTK_DATA']}/corpora/wordnet",
    ]
    for place in [*filter(None, named), *PLACES]:
        if (Path(place) / "index.noun").is_file():
            return Path(place)
    message = (
        "spec.dataset.augmentation.synonymReplacement: this image has no WordNet; take one with Debian's package "
        "wordnet-base, name a folder with its files in WNSEARCHDIR, or remove the field"
    )
    raise UserError(Reason.INVALID_SPEC, message)


class Synonyms:
    """Looks up single words. Opening it takes seconds and some 60 MB."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self.of = lru_cache(1 << 16)(self._look_up)
        """Word in lower case → its synonyms, sorted; of one word each, and none where the word isn't in WordNet."""

    @classmethod
    def open(cls) -> Synonyms:
        """Open the installed WordNet.

        Raises:
            UserError: there is none.
        """
        return cls(_reader(find_wordnet()))

    def _look_up(self, word: str) -> Sequence[str]:
        found: set[str] = set()
        for synset in self._reader.synsets(word):
            names = [name.lower() for name in synset.lemma_names()]
            # a synset that has the word in another form only ("ran": run) would give one that doesn't fit in
            if word in names:
                found.update(name for name in names if "_" not in name and name != word)
        return tuple(sorted(found))


def _reader(folder: Path) -> Any:
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        """nltk's, for files as Debian ships them: without `lexnames`, and not in nltk's own folder."""

        def open(self, file: str) -> Any:
            if file == "lexnames" and not (folder / file).is_file():
                return io.StringIO("".join(f"{number:02d}\tunnamed\t0\n" for number in range(LEXICOGRAPHER_FILES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Maps to other versions of WordNet: none is wanted."""

    # nltk reads below these folders only
    nltk.data.path.append(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of multilingual functions, which are not there
        return Reader(str(folder), None)
