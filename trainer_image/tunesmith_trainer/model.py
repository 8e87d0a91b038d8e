"""Load models and tokenizers; decide device and number format. Called by `assembly`, the tasks and `methods`."""

from __future__ import annotations

import json
import logging
import resource
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType, QuantizedBase
from tunesmith_api.v1alpha1.training import Precision
from tunesmith_store.errors import UserError
from tunesmith_trainer.chat import ensure_chat_template

__all__ = [
    "Numerics",
    "apply_dropout",
    "dtype_of",
    "enable_gradient_checkpointing",
    "from_config",
    "load_options",
    "load_pretrained",
    "load_tokenizer",
    "new_modules",
    "pad_id",
    "stored_dtype",
    "transformer_blocks",
]

# transformers imports torchao, which tells everybody of CUDA extensions that it couldn't load, and of its own enums
for _logger in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_logger).setLevel(logging.ERROR)

_DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


@dataclass(frozen=True)
class Numerics:
    """Where and in which number format one rank computes."""

    device: torch.device
    precision: Precision = Precision.FP32
    """Never Auto."""

    @classmethod
    def choose(cls, precision: Precision, gpus_per_worker: int) -> Numerics:
        """Resolve precision Auto: BF16 where a GPU computes it natively, else FP32.

        On a CPU without bf16 instructions BF16 works, slowly.

        Raises:
            UserError: a GPU was asked for and none is visible; or FP16 without a GPU.
        """
        if gpus_per_worker and not torch.cuda.is_available():
            message = "spec.workers.gpusPerWorker: no GPU is visible in the pod; the trainer image may lack CUDA"
            raise UserError(Reason.INVALID_SPEC, message)
        device = torch.device("cuda" if gpus_per_worker else "cpu")
        if precision is Precision.AUTO:
            native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            precision = Precision.BF16 if native else Precision.FP32
        if precision is Precision.FP16 and device.type == "cpu":
            message = "spec.training.precision FP16 needs a GPU: set it to Auto, or workers.gpusPerWorker to 1"
            raise UserError(Reason.INVALID_SPEC, message)
        return cls(device, precision)

    @property
    def name(self) -> str:
        """What logs and reports call it: bf16, fp16 or fp32."""
        return self.precision.value.lower()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The format of matrix products and activations."""
        return _DTYPES[self.precision]

    @property
    def is_short(self) -> bool:
        """Whether that has 16 bits."""
        return self.precision is not Precision.FP32

    @property
    def bytes_per_activation(self) -> int:
        """Bytes of a number of the forward pass."""
        return self.compute_dtype.itemsize

    def autocast(self) -> AbstractContextManager[Any] | None:
        """Return the context of the forward pass; None for full precision."""
        return torch.autocast(self.device.type, dtype=self.compute_dtype) if self.is_short else None

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return what keeps small gradients from vanishing in fp16 (Micikevicius et al., 2018); None elsewhere."""
        return torch.amp.GradScaler(self.device.type) if self.precision is Precision.FP16 else None

    def weights_dtype(self, method: MethodType, stored: torch.dtype) -> torch.dtype:
        """Return the format of the weights: that of frozen ones below adapters, and float32 where all are trained."""
        return torch.float32 if method is MethodType.FULL else self.frozen_dtype(stored)

    def frozen_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Return the format of weights that aren't trained: short where nothing is lost by it, else float32."""
        return stored if self.is_short and stored is self.compute_dtype else torch.float32

    def used_bytes(self) -> int:
        """Return the most memory that this process has held so far: of the GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def dtype_of(precision: Precision) -> torch.dtype:
    """Return the number format of that name; Auto has none."""
    return _DTYPES[precision]


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
    try:
        model, found = auto_class.from_pretrained(
            folder,
            **options,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a broken folder makes transformers raise
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise
        raise UserError(Reason.MODEL_INVALID, f"spec.model.uri: the model can't be loaded: {error}") from error
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


def apply_dropout(model: nn.Module, p: float) -> None:
    """Set every dropout of a bare model: its Dropout modules, and the probabilities that modules and config name.

    Attention, for one, reads `attention_dropout` as a number. Layer drop and stochastic depth leave whole layers out:
    they are no dropout and stay.
    """
    owners: list[Any] = list(model.modules())
    config: Any = getattr(model, "config", None)
    if config is not None:
        owners += [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    for owner in owners:
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            owner.p = p
        for name, value in list(vars(owner).items()):
            if _is_dropout(name) and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(owner, name, p)


def _is_dropout(name: str) -> bool:
    return any(part in name for part in ("dropout", "pdrop", "drop_prob", "drop_rate")) and "path" not in name


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Compute activations again in the backward pass. Works with frozen weights below adapters, too.

    Raises:
        UserError: transformers can't do it for this model.
    """
    bare: Any = model
    if not getattr(bare, "supports_gradient_checkpointing", False):
        message = f"spec.training.gradientCheckpointing: {type(model).__name__} doesn't offer it: set it to false"
        raise UserError(Reason.INVALID_SPEC, message)
    # the reentrant kind gives adapters no gradient unless the frozen embeddings are made to ask for one
    bare.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return a model's layers, of all its stacks, in order: what transformers says may not be split.

    Where it says nothing, the elements of the longest list of modules.
    """
    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    found = [module for module in model.modules() if type(module).__name__ in names]
    if found:
        return found
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def load_tokenizer(folder: Path, chat: bool = True) -> Any:
    """Load the tokenizer; for `chat` with a chat template (ChatML where it has none).

    Raises:
        UserError: it can't be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise UserError(Reason.MODEL_INVALID, f"spec.model.uri: the tokenizer can't be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(Reason.MODEL_INVALID, "spec.model.uri: the tokenizer has no fast form (tokenizer.json)")
    if chat and ensure_chat_template(tokenizer):
        print("the tokenizer has no chat template: using ChatML, which is saved with the model", flush=True)
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Return a token id to pad with; it is masked wherever it is used."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


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
