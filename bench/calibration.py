"""`python -m bench.calibration`: what an importance matrix does to perplexity; the table goes to docs with `--write`.

SmolLM2-135M-Instruct is made by each method with and without; transformers then reads text of the GPL with the weights
that the file holds, in 32 bits. The matrix is of other licenses and of tweets. Unlike `bench.quantization` no server is
asked, so the figures are those of the rounding alone, and don't depend on what else the machine does.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import assets
from bench.quantization import LICENSES, put, texts
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.calibration.texts import Texts
from tunesmith_server.quantizers import quantizer_of
from tunesmith_server.quantizers.base import PLAIN, Options
from tunesmith_server.quantizers.gguf_files import opened, tensors_of

METHODS: Final = (
    QuantizationMethod.Q4_K_M,
    QuantizationMethod.Q4_0,
    QuantizationMethod.Q3_K_M,
    QuantizationMethod.Q2_K,
)
WINDOW, WINDOWS = 512, 4
ROWS: Final = 48
HEADS: Final = {"self_attn.q_proj": 9, "self_attn.k_proj": 3}
"""Of SmolLM2: llama.cpp keeps the two halves of each head's numbers interleaved."""


def original_order(values: Any, heads: int) -> Any:
    """Rows of queries or keys as transformers has them."""
    width = values.shape[0] // heads // 2
    return values.reshape(heads, width, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def perplexity(file: Path) -> float:
    """Of text of the GPL, with the weights of a GGUF file."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32).eval()
    reader = opened(file)
    there = {tensor.name: tensor for tensor in reader.tensors}
    modules = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
    for name, tensor_name in tensors_of(reader, modules).items():
        tensor = there[tensor_name]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = next((count for part, count in HEADS.items() if name.endswith(part)), 0)
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(torch.from_numpy(original_order(values, heads) if heads else values).reshape(weight.shape))
    tokens = AutoTokenizer.from_pretrained(assets.smollm2())((LICENSES / "GPL-3").read_text())["input_ids"]
    losses = []
    with torch.inference_mode():
        for start in range(0, WINDOW * WINDOWS, WINDOW):
            ids = torch.tensor([tokens[start : start + WINDOW]])
            losses.append(float(model(ids, labels=ids).loss))
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Measure, print, write."""
    rows = texts().rows
    calibrated = Options(texts=Texts(rows[:16] + rows[16 - ROWS :]))
    lines = []
    with tempfile.TemporaryDirectory() as name:
        kind = quantizer_of(EngineType.LLAMA_CPP, QuantizationMethod.NONE)
        quantizer = kind(assets.smollm2(), Path(name) / "scratch", 1)
        for method in (QuantizationMethod.NONE, *METHODS):
            found = []
            for options in (PLAIN, calibrated) if method is not QuantizationMethod.NONE else (PLAIN,):
                folder = Path(name) / "made"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                made = quantizer.make(method, folder, options)
                bits = (folder / MODEL_FILE).stat().st_size * 8 / made.weights
                found.append((bits, perplexity(folder / MODEL_FILE)))
                print(method, found[-1], file=sys.stderr, flush=True)
            (bits, plain), *more = found
            counted = f"{more[0][1]:.2f} ({more[0][0]:.2f})" if more else ""
            lines.append(f"| `{method}` | {plain:.2f} ({bits:.2f}) | {counted} |\n")
    table = (
        f"SmolLM2-135M-Instruct, perplexity of the first {WINDOW * WINDOWS} tokens of the GPL (bits per weight), by "
        f"`python -m bench.calibration --write`; the matrix is of {len(calibrated.texts.rows if calibrated.texts else ())} "
        "rows, other licenses and tweets.\n\n| `method` | without | with calibration |\n|---|---|---|\n"
    )
    if "--write" in sys.argv:
        put("calibration", table + "".join(lines))
    print(table + "".join(lines))


if __name__ == "__main__":
    main()
