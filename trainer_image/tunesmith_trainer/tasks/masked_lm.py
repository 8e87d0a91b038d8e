"""MaskedLM: guess tokens that were taken out of a text, as BERT was trained (Devlin et al., 2019, section 3.1 and A.1).

Which tokens are taken out is a pure function of the seed, the epoch and the text. So it doesn't depend on how many
workers share a batch, a resumed run takes out the same, and an evaluation always asks the same questions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.tokenizers import padding_id, tokenize
from tunesmith_trainer.tasks.base import IGNORE, Assessment, Batch, Example, Outcome, Prediction, Row, Task
from tunesmith_trainer.tasks.classes import position_limit
from tunesmith_trainer.tasks.collator import indices_of, length_mask, pad_rows
from tunesmith_trainer.tasks.fields import shorten, text_field

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import ArrayLike, NDArray
    from torch import nn

__all__ = ["MaskedLM"]

MASKED, REPLACED = 0.8, 0.9
"""Of the tokens to guess, the first 80 % are masked, the next 10 % replaced by any token, the rest left as they are."""


class MaskedLM(Task):
    """Plain text; a part of its tokens is to be guessed from all others."""

    higher_is_better = frozenset({"accuracy"})
    pipeline_tag = "fill-mask"

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__(plan)
        self._part = plan.masked_lm.mlm_probability
        self._longest = plan.training.max_length
        self._special: NDArray[np.int64] | None = None
        self._ordinary: NDArray[np.int64] | None = None

    # ---- rows

    def check_row(self, row: Row) -> None:
        text_field(row, self.plan.dataset.columns.text, "text")

    def texts_of(self, row: Row) -> Mapping[str, str]:
        column = self.plan.dataset.columns.text
        return {column: str(row[column])}

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        import numpy as np

        from tunesmith_trainer.models.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(folder, chat=False)
        if tokenizer.mask_token_id is None:
            message = "spec.model.uri: the tokenizer has no mask token, so nothing can be masked; use task CausalLM"
            raise UserError(Reason.MODEL_INVALID, message)
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._ordinary = np.setdiff1d(np.arange(len(tokenizer), dtype=np.int64), self._special)
        self._longest = position_limit(folder, self.plan.training.max_length)
        self.processor = tokenizer
        return tokenizer

    def encode(self, row: Row) -> list[Example]:
        text = text_field(row, self.plan.dataset.columns.text, "text")
        features, _, truncated = tokenize(self.processor, text, None, self._longest)
        guesses = self._guesses(len(self._places(features["input_ids"])))
        return [Example(features, len(features["input_ids"]), float(guesses), truncated)] if guesses else []

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForMaskedLM

        from tunesmith_trainer.models.loading import from_config, load_pretrained

        if self.plan.model_init is Init.RANDOM:
            return from_config(AutoModelForMaskedLM, folder, self.plan.training.seed, options["dtype"])
        return load_pretrained(AutoModelForMaskedLM, folder, **options)

    # ---- masking

    def _places(self, ids: ArrayLike) -> NDArray[np.int64]:
        import numpy as np

        assert self._special is not None
        places: NDArray[np.int64] = np.flatnonzero(~np.isin(np.asarray(ids, dtype=np.int64), self._special))
        return places

    def _guesses(self, places: int) -> int:
        # as BERT's own create_pretraining_data.py: a fixed part of each text, and at least one token
        return max(1, math.floor(places * self._part + 0.5)) if places else 0

    def masked(self, example: Example) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Take tokens out of an example.

        Returns:
            tokens as the model sees them, and labels: IGNORE but where it has to guess; both [tokens].
        """
        import numpy as np

        assert self._ordinary is not None
        ids = np.array(example.features["input_ids"], dtype=np.int64)
        text = hashlib.blake2b(f"{self.plan.training.seed}:{example.epoch}:".encode() + ids.tobytes(), digest_size=16)
        draw = np.random.Generator(np.random.Philox(key=np.frombuffer(text.digest(), dtype=np.uint64)))
        places = self._places(ids)
        chosen = draw.permutation(places)[: self._guesses(len(places))]
        labels = np.full_like(ids, IGNORE)
        labels[chosen] = ids[chosen]
        fate = draw.random(len(chosen))
        others = draw.choice(self._ordinary, len(chosen))
        hidden = np.where(fate < MASKED, self.processor.mask_token_id, np.where(fate < REPLACED, others, ids[chosen]))
        ids[chosen] = hidden
        return ids, labels

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        masked = [self.masked(example) for example in examples]
        cpu = pad_rows([labels for _, labels in masked], IGNORE)
        owner, column = (cpu != IGNORE).nonzero(as_tuple=True)
        inputs = {
            "input_ids": pad_rows([ids for ids, _ in masked], padding_id(self.processor), device),
            "attention_mask": length_mask([len(ids) for ids, _ in masked], device),
        }
        if "token_type_ids" in examples[0].features:
            inputs["token_type_ids"] = pad_rows([example.features["token_type_ids"] for example in examples], 0, device)
        kept = owner * cpu.shape[1] + column
        extras = {"kept": kept.to(device), "owner": owner.to(device), "indices": indices_of(examples)}
        return Batch(inputs, cpu[owner, column].to(device), float(len(owner)), extras)

    # ---- computing

    def predict(self, model: nn.Module, batch: Batch) -> Prediction:
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.extras["kept"]]
        return Prediction(logits.float(), batch.labels, examples=batch.extras["owner"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.loss_of(self.predict(model, batch))

    def assess(self, model: nn.Module, batch: Batch) -> Assessment:
        from torch.nn import functional

        found = self.predict(model, batch)
        losses = functional.cross_entropy(found.logits, found.targets, reduction="none").double()
        guesses = found.logits.argmax(-1)
        sums = {
            "loss": [float(losses.sum())],
            "units": [float(len(losses))],
            "right": [float((guesses == found.targets).sum())],
        }
        outcomes = []
        for number, index in enumerate(batch.extras["indices"]):
            mine = found.examples == number
            expected, predicted = self._text(found.targets[mine]), self._text(guesses[mine])
            outcomes.append(Outcome(index, float(losses[mine].mean()), expected, predicted))
        return Assessment(sums, outcomes)

    def _text(self, tokens: torch.Tensor) -> str:
        return shorten(" ".join(self.processor.convert_ids_to_tokens(tokens[:64].tolist())))

    def metrics(self, assessment: Assessment) -> dict[str, float]:
        """Loss per guessed token in nats, its perplexity, and the part guessed right."""
        sums = {name: values[0] for name, values in assessment.sums.items()}
        units = max(1.0, sums["units"])
        loss = sums["loss"] / units
        return {"loss": loss, "perplexity": math.exp(min(loss, 50.0)), "accuracy": sums["right"] / units}
