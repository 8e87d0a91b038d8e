"""`python3 -m tunesmith_server.calibration.importance MODEL OUTPUT THREADS`: an importance matrix, the rows on stdin.

For each linear layer, the mean square of each of its inputs over the tokens of the rows: an input that is often large
multiplies the rounding errors of its weights, so these are worth more. It is what llama.cpp's `llama-imatrix` computes,
by transformers' own arithmetic in 32 bits. A process of its own, as PyTorch does not give its memory back.

Each row is computed by one thread, and the rows are summed up in their order: the number of threads changes no bit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith_api.keys import Reason
from tunesmith_server.calibration.texts import Content, Texts
from tunesmith_server.predict.texts import TOKENIZER
from tunesmith_server.process import answer_for, run_module
from tunesmith_store.errors import UserError
from tunesmith_store.pretrained import load_model, load_tokenizer, position_limit

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["Matrix", "importance_of"]

MOST_TOKENS = 2048
"""Of one row."""
TOKENS = "tokens"


@dataclass(frozen=True)
class Matrix:
    """Module → mean square of each of its inputs."""

    columns: Mapping[str, NDArray[np.float32]]
    tokens: int

    @property
    def digest(self) -> str:
        """Sha256 of names and numbers."""
        digest = hashlib.sha256()
        for name in sorted(self.columns):
            digest.update(f"{name}\n".encode())
            digest.update(self.columns[name].astype("<f4").tobytes())
        return digest.hexdigest()


def importance_of(model: Path, texts: Texts, output: Path, threads: int) -> Matrix:
    """Compute the matrix of a model's folder; `output` is a file for it.

    Raises:
        UserError: the model or its chat template can't read these rows, or the memory doesn't suffice.
    """
    from safetensors.numpy import load_file

    run_module(
        "tunesmith_server.calibration.importance",
        [str(model), str(output), str(threads)],
        json.dumps(texts.rows),
        output,
        out_of_memory="computing the importance matrix ran out of memory: it takes the model in 32 bits, raise "
        "spec.resources.memory above 4 bytes per weight, or leave out quantization.calibration",
        environment={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    found = load_file(output)
    return Matrix({name: found[name] for name in found if name != TOKENS}, int(found[TOKENS][0]))


class _Watch:
    """Sums up the squares of what comes into each linear layer, for each computing thread on its own."""

    def __init__(self, model: torch.nn.Module) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        self._local = threading.local()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.register_forward_pre_hook(self._hook(name))

    def start(self) -> dict[str, NDArray[np.float64]]:
        """Return the sums that this thread fills from now on."""
        sums: dict[str, NDArray[np.float64]] = {}
        self._local.sums = sums
        return sums

    def _hook(self, name: str) -> Any:
        import torch

        def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums = self._local.sums
            found = (values * values).sum(0, dtype=torch.float64).numpy()
            sums[name] = sums[name] + found if name in sums else found

        return add


def _ids(tokenizer: Any, content: Content) -> list[int]:
    if isinstance(content, str):
        return list(tokenizer(content)["input_ids"])
    if not tokenizer.chat_template:
        message = (
            "quantization.calibration: the model has no chat template to write conversations with: give rows of text"
        )
        raise UserError(Reason.DATASET_INVALID, message)
    messages = [{"role": role, "content": text} for role, text in content]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template's own complaint: roles that don't take turns
        message = f"quantization.calibration: the model's chat template can't write a conversation: {error}"
        raise UserError(Reason.DATASET_INVALID, message) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _compute(folder: Path, rows: list[Content], threads: int) -> Matrix:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(folder, TOKENIZER)
    failed = "the model can't be loaded by transformers"
    model, _ = load_model(AutoModelForCausalLM, folder, failed, dtype=torch.float32)
    model.eval()
    longest = min(MOST_TOKENS, position_limit(model.config.to_dict()) or MOST_TOKENS)
    examples = [ids for content in rows if (ids := _ids(tokenizer, content)[:longest])]
    watch = _Watch(model)

    def sums_of(ids: list[int]) -> dict[str, NDArray[np.float64]]:
        sums = watch.start()
        with torch.inference_mode():
            model(torch.tensor([ids]), use_cache=False)
        return sums

    total: dict[str, NDArray[np.float64]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for sums in pool.map(sums_of, examples):
            for name, found in sums.items():
                total[name] = total[name] + found if name in total else found
    tokens = sum(map(len, examples))
    columns = {name: (found / tokens).astype(np.float32) for name, found in sorted(total.items())}
    if broken := [name for name, found in columns.items() if not np.isfinite(found).all()]:
        message = f"what comes into {broken[0]} is not finite: the model is damaged, or its training diverged"
        raise UserError(Reason.MODEL_INVALID, message)
    return Matrix(columns, tokens)


def _main(model: Path, output: Path, threads: int) -> None:
    from safetensors.numpy import save_file

    found = json.load(sys.stdin)
    rows: list[Content] = [it if isinstance(it, str) else tuple((role, text) for role, text in it) for it in found]
    matrix = _compute(model, rows, threads)
    save_file({**matrix.columns, TOKENS: np.array([matrix.tokens])}, output)


if __name__ == "__main__":
    raise SystemExit(answer_for(lambda: _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))))
