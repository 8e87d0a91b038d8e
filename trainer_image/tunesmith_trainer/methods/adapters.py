"""Low-rank adapters by PEFT: LoRA (Hu et al., 2021), DoRA (Liu et al., 2024) and QLoRA (Dettmers et al., 2023).

Adapters are float32 whatever the base is. Merging is done in float32 onto the base as it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_api.v1alpha1.method import LoraConfig, MethodType
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_store.errors import UserError
from tunesmith_store.volumes import loadable
from tunesmith_trainer.models.loading import new_modules
from tunesmith_trainer.tasks.base import Task

__all__ = ["add_adapters", "merge_adapters", "merge_into_whole_base", "save_adapter"]

# PEFT's task types; the rest has none
_TYPES = {
    TaskName.CHAT_SFT: "CAUSAL_LM",
    TaskName.CAUSAL_LM: "CAUSAL_LM",
    TaskName.DPO: "CAUSAL_LM",
    TaskName.SEQ2SEQ: "SEQ_2_SEQ_LM",
    TaskName.SEQUENCE_CLASSIFICATION: "SEQ_CLS",
    TaskName.REWARD: "SEQ_CLS",
    TaskName.TOKEN_CLASSIFICATION: "TOKEN_CLS",
}


def add_adapters(model: nn.Module, plan: TrainingPlan, task: Task) -> nn.Module:
    """Freeze the model and add trainable float32 adapters, drawn from the job's seed: the same on every rank.

    The task's head, and whatever else of the model is new, is trained whole: there is nothing to adapt.

    Raises:
        UserError: no layer is named like `targetModules`, one that is shares its weights with another, or all of the
            model is new.
    """
    from peft import get_peft_model

    if plan.model_init is Init.RANDOM:
        message = f"spec.method.type {plan.method.type} adapts weights, and model.init Random has none: set Full"
        raise UserError(Reason.INVALID_SPEC, message)
    whole = sorted({*task.head_modules(model), *_new_layers(model)})
    config = _config(plan, whole)
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise _no_target(model, config.target_modules, error) from error
    _refuse_shared(adapted)
    _draw(adapted, plan.training.seed)
    return adapted


def _draw(adapted: nn.Module, seed: int) -> None:
    """Draw the first matrix of each adapter as PEFT does (Kaiming's uniform; the second is zero), but whole.

    Where ranks share a layer, PEFT draws each part by itself: then the result would depend on their number.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, layer in adapted.named_modules():
        if not isinstance(layer, nn.Linear) or ".lora_" not in name:
            continue
        weight: Any = layer.weight
        # PEFT 0.21 leaves shared layers with the sizes of a part, where transformers reads those of the whole
        layer.out_features, layer.in_features = weight.shape
        if ".lora_A." not in name:
            continue
        whole = torch.empty(weight.shape)
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        if hasattr(weight, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
        with torch.no_grad():
            weight.copy_(whole)


def _config(plan: TrainingPlan, whole: Sequence[str]) -> Any:
    from peft import LoraConfig as PeftLora

    lora = plan.method.lora or LoraConfig()
    targets: Any = list(lora.target_modules)
    return PeftLora(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.use_rslora,
        use_dora=plan.method.type is MethodType.DORA,
        target_modules="all-linear" if "all-linear" in targets else targets,
        modules_to_save=list(whole) or None,
        bias="none",
        task_type=_TYPES.get(plan.task),
    )


def _new_layers(model: nn.Module) -> list[str]:
    """Return the layers that the base had no weights for, a pooler for example.

    An output head that shares its weights with the embeddings is not one: it would be torn from them.
    """
    bare: Any = model
    embeddings = bare.get_input_embeddings() if hasattr(bare, "get_input_embeddings") else None
    tied = None if embeddings is None else getattr(embeddings, "weight", None)
    found = []
    for name in new_modules(model):
        module = model.get_submodule(name) if name else None
        if module is None or any(True for _ in module.children()):
            continue
        if all(parameter is not tied for parameter in module.parameters()):
            found.append(name)
    return found


def _no_target(model: nn.Module, targets: object, error: ValueError) -> UserError:
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    message = (
        f"spec.method.lora.targetModules {targets}: {error}; this model's linear layers are "
        f"{', '.join(sorted(linear))} (or use all-linear)"
    )
    return UserError(Reason.INVALID_SPEC, message)


def _refuse_shared(adapted: nn.Module) -> None:
    """Refuse an adapter at one end of weights that have two, as embeddings that are the output head, too.

    It changes one end. Merged, it would change both: the model that is saved would not be the one that was trained.

    Raises:
        UserError: there is such an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders: dict[int, list[str]] = {}
    for name, module in adapted.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    plain = {name: _plain_name(name) for names in holders.values() for name in names}
    for name, module in adapted.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        mine = _plain_name(name)
        for parameter in module.get_base_layer().parameters(recurse=False):
            others = sorted({plain[holder] for holder in holders[id(parameter)]} - {mine})
            if others:
                message = (
                    f"spec.method.lora.targetModules: {mine} shares its weights with {' and '.join(others)}, and an "
                    "adapter would change one of them only: remove it from the list (all-linear leaves it out), or set "
                    "method.type: Full"
                )
                raise UserError(Reason.INVALID_SPEC, message)


def _plain_name(name: str) -> str:
    """Return the name that a module had before PEFT wrapped it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters into the base weights, in float32 and refusing NaN; return the bare model."""
    adapted: Any = model.float()
    merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    return merged


def merge_into_whole_base(model: nn.Module, plan: TrainingPlan, base: Path, task: Task) -> nn.Module:
    """Put the adapters of a model whose base is in 4 bits onto the base as it is stored, and merge them there.

    The 4-bit weights are rounded: merged into them and rounded once more, small adapters would be lost.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapted: Any = model
    adapters = {name: tensor.to("cpu") for name, tensor in get_peft_model_state_dict(model).items()}
    config = adapted.peft_config["default"]
    whole = get_peft_model(task.load_model(base, dtype=torch.float32), config)
    result = set_peft_model_state_dict(whole, adapters)
    if result.unexpected_keys:
        raise RuntimeError(f"adapters that fit nowhere: {result.unexpected_keys[:3]}")
    return merge_adapters(whole)


def save_adapter(model: nn.Module, folder: Path, plan: TrainingPlan) -> None:
    """Write the adapters alone, as PEFT does: adapter_config.json and adapter_model.safetensors.

    The base is named as `from_pretrained` takes it, so that peft's automatic classes load both, or by its URI.
    """
    adapted: Any = model
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = loadable(plan.model_uri) or plan.model_uri
        config.revision = plan.model_revision
    # PEFT would ask the Hub whether the embeddings have changed
    adapted.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an empty form, which names a folder of this pod
