"""Training texts changed anew in each epoch: words left out, swapped, replaced by synonyms (EDA, Wei & Zou 2019).

`encoded.ExampleSet` and `streaming` ask for the changed example when it is trained on. What is drawn is a pure function
of (seed, epoch, row), so that neither resuming nor the number of workers changes it. Held-out texts are never changed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from tunesmith_api.plan import TrainingPlan
from tunesmith_trainer.tasks.base import BadRow, Example, Row, Task

__all__ = ["RowAugmenter", "TextChanger", "augmenter_of"]

WORD = re.compile(r"^(\W*)(\w[\w'’-]*)(\W*)$")
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\S+",
        """
    a about above after again against all am an and any are aren't as at be because been before being below between both
    but by can cannot can't could couldn't did didn't do does doesn't doing don't down during each few for from further
    had hadn't has hasn't have haven't having he her here hers herself him himself his how i if in into is isn't it its
    itself just let's me more most mustn't my myself no nor not now of off on once only or other ought our ours
    ourselves out over own same shan't she should shouldn't so some such than that the their theirs them themselves then
    there these they this those through to too under until up very was wasn't we were weren't what when where which
    while who whom why will with won't would wouldn't you your yours yourself yourselves
    """,
    )
)
"""Words of grammar rather than of meaning. WordNet takes "a" for a vitamin and "have" for a rich person."""


class TextChanger:
    """Changes single texts."""

    def __init__(
        self, dropout: float, swap: float, synonym: float, synonyms: Callable[[str], Sequence[str]] | None
    ) -> None:
        """Take note of the chances of each word; `synonyms` gives those of a word in lower case."""
        self._dropout, self._swap, self._synonym, self._synonyms = dropout, swap, synonym, synonyms

    def change(self, text: str, rng: random.Random) -> str:
        """Return a changed text, or the same. White space stays where it is, and at least one word does."""
        pieces = re.split(r"(\s+)", text)
        words, gaps = pieces[::2], pieces[1::2]
        if self._synonyms is not None and self._synonym:
            words = [self._replaced(word, rng) if rng.random() < self._synonym else word for word in words]
        if self._swap:
            for place in range(len(words) - 1):
                if rng.random() < self._swap:
                    words[place], words[place + 1] = words[place + 1], words[place]
        kept = [
            place for place, word in enumerate(words) if not (word and self._dropout and rng.random() < self._dropout)
        ]
        if not any(words[place] for place in kept):
            return text
        return words[kept[0]] + "".join(gaps[place - 1] + words[place] for place in kept[1:])

    def _replaced(self, word: str, rng: random.Random) -> str:
        match = WORD.match(word)
        if match is None or match[2].lower() in FUNCTION_WORDS or self._synonyms is None:
            return word
        found = self._synonyms(match[2].lower())
        if not found:
            return word
        chosen = rng.choice(found)
        if match[2].isupper() and len(match[2]) > 1:
            chosen = chosen.upper()
        elif match[2][0].isupper():
            chosen = chosen[0].upper() + chosen[1:]
        return f"{match[1]}{chosen}{match[3]}"


class RowAugmenter:
    """Makes the example of a changed row."""

    def __init__(self, task: Task, changer: TextChanger, seed: int) -> None:
        self._task, self._changer, self._seed = task, changer, seed

    def changed(self, row: Row, number: int, epoch: int) -> Row | None:
        """Return the row as it is in this epoch; None where nothing in it changes. `number` is the row's own."""
        texts = self._task.texts_of(row)
        rng = random.Random(f"tunesmith-augment:{self._seed}:{epoch}:{number}")
        changed = {name: self._changer.change(text, rng) for name, text in texts.items()}
        return None if changed == dict(texts) else self._task.with_texts(row, changed)

    def example(self, row: Row, part: int, number: int, epoch: int) -> Example | None:
        """Return example `part` of the row as it is in this epoch; None where it is the one of the unchanged row."""
        changed = self.changed(row, number, epoch)
        if changed is None:
            return None
        try:
            examples = self._task.encode(changed)
        except BadRow:
            return None
        return examples[part] if part < len(examples) and examples[part].units else None


def augmenter_of(plan: TrainingPlan, task: Task) -> RowAugmenter | None:
    """Return what changes the plan's training texts; None where nothing does.

    Raises:
        UserError: synonyms are wanted, and WordNet isn't installed.
    """
    settings = plan.dataset.augmentation
    if settings is None:
        return None
    dropout, swap, synonym = settings.word_dropout, settings.word_swap, settings.synonym_replacement
    if not (dropout or swap or synonym):
        return None
    synonyms = None
    if synonym:
        from tunesmith_trainer.data.wordnet import Synonyms

        synonyms = Synonyms.open().of
    return RowAugmenter(task, TextChanger(dropout, swap, synonym, synonyms), plan.training.seed)
