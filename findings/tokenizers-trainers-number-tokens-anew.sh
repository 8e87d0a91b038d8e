#!/usr/bin/env bash
# tokenizers 0.23.3: training WordPiece or Unigram twice on the same text gives the same tokens other numbers; BPE does not.
#
# One would guess: training has no seed and one input, so it has one output. BpeTrainer keeps that promise.
# What happens: in each process WordPieceTrainer and UnigramTrainer order tokens of equal rank differently, even on one thread. The
#   vocabularies hold the same tokens, so every text is cut alike and nothing looks wrong: the numbers differ.
# Seen: 4 processes, 1 thread each: BPE 1 vocabulary, WordPiece 4 and Unigram 4 with 1 set of tokens.
# What follows: a tokenizer that was trained again does not fit the model that was trained with the first; a cache key made
#   from its file changes with each build. Keep the file, or sort the vocabulary and number it yourself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
cat >"$work/train.py" <<'PYTHON'
import hashlib
import random

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

draw = random.Random(0)
syllables = ["ka", "lo", "mi", "ru", "ten", "sor", "vi", "pa", "zu", "ne"]
words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(4000)]
text = [" ".join(words[start : start + 8]) for start in range(0, len(words), 8)]


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


for model, trainer in (
    (models.BPE(), trainers.BpeTrainer(vocab_size=300, show_progress=False)),
    (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=300, show_progress=False)),
    (models.Unigram(), trainers.UnigramTrainer(vocab_size=300, show_progress=False)),
):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(text, trainer)
    vocabulary = tokenizer.get_vocab()
    print(type(trainer).__name__, digest(sorted(vocabulary.items())), digest(sorted(vocabulary)))
PYTHON
for _ in 1 2 3 4; do
  RAYON_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false "$work/venv/bin/python" "$work/train.py"
done >"$work/seen"
count() { grep "^$1" "$work/seen" | cut -d' ' -f"$2" | sort -u | wc -l; }
for trainer in BpeTrainer WordPieceTrainer UnigramTrainer; do
  echo "$trainer: $(count "$trainer" 2) numberings of $(count "$trainer" 3) set of tokens in 4 processes"
done
[ "$(count BpeTrainer 2)" = 1 ] || { echo "BPE differs by now"; exit 1; }
for trainer in WordPieceTrainer UnigramTrainer; do
  [ "$(count "$trainer" 3)" = 1 ] && [ "$(count "$trainer" 2)" -gt 1 ] || { echo "$trainer numbers alike by now"; exit 1; }
done
