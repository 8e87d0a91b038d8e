"""Load models by transformers, from files or from config.json alone. Called by `assembly`, the tasks and `methods`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType, QuantizedBase
from tunesmith_store import pretrained
from tunesmith_store.errors import UserError
from tunesmith_trainer.models.numerics import Numerics

__all__ = [
    "from_config",
    "load_options",
    "load_pretrained",
    "new_modules",
    "stored_dtype",
]

# transformers imports torchao, which tells everybody of CUDA extensions that it couldn't load, and of its own enums
for _logger in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_logger).setLevel(logging.ERROR)


def load_options(plan: TrainingPlan, numerics: Numerics, stored: torch.dtype) -> dict[str, Any]:
    """Return the options that a task passes to `from_pretrained`: number format and, for QLoRA, the 4-bit base."""
    options: dict[str, Any] = {"dtype": numerics.weights_dtype(plan.method.type, stored)}
    if plan.method.type is MethodType.QLORA:
        from transformers import BitsAndBytesConfig

        base = plan.method.quantized_base or QuantizedBase()
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=base.quant_type.value,
            bnb_4bit_use_double_quant=base.use_double_quant,
            bnb_4bit_compute_dtype=numerics.compute_dtype,
        )
        options["device_map"] = {"": numerics.device}
    return options


def load_pretrained(auto_class: Any, folder: Path, **options: Any) -> nn.Module:
    """Load a model by one of transformers' Auto classes. `options` go to `from_pretrained`.

    The names of modules that the folder had no weights for (a new head) are kept: see `new_modules`.

    Raises:
        UserError: transformers can't load it.
    """
    model, found = pretrained.load_model(auto_class, folder, "spec.model.uri: the model can't be loaded", **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else bitsandbytes rearranges 4-bit weights in the first evaluation, and no gradient passes them any more
            module.support_avx512bf16_for_cpu = False
    changed = [name for name, *_ in found.get("mismatched_keys", ())]
    _prepare(model, [*found["missing_keys"], *changed])
    loaded: nn.Module = model
    return loaded


def from_config(auto_class: Any, folder: Path, seed: int, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """Make a model of random weights from a folder's config.json, with some of its fields changed.

    The weights are a function of the seed alone: the same on every rank.

    Raises:
        UserError: transformers doesn't know such a model.
    """
    from transformers import AutoConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changes)
            model: nn.Module = auto_class.from_config(config, dtype=dtype)
        except Exception as error:  # whatever a broken folder makes transformers raise
            raise UserError(Reason.MODEL_INVALID, f"spec.model.uri: config.json is no good: {error}") from error
    _prepare(model, [name for name, _ in model.named_parameters()])
    return model


def _prepare(model: Any, new_parameters: list[str]) -> None:
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    model.tunesmith_new = tuple(sorted({name.rpartition(".")[0] for name in new_parameters}))


def new_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules of a loaded model whose weights are random, not those of the folder."""
    return tuple(getattr(model, "tunesmith_new", ()))


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the number format of the weights on disk, or else of config.json: the tuned model is saved in the same."""
    from safetensors import safe_open

    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                kind = tensors.get_slice(key).get_dtype()
                if kind in names:
                    return names[kind]
    config = json.loads((folder / "config.json").read_text())
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return named if named in names.values() else torch.float32
