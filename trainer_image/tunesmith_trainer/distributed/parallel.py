"""How a model is spread over the ranks: replicas (DDP), shares (FSDP2, HSDP), layers in parts (tensor parallel).

Called by `assembly`. Whatever the way, gradients are the average over the ranks that see different examples, so `step`
knows nothing of it; `clip_grad_norm` knows how to add up a norm whose parts lie on several ranks.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn

from tunesmith_api.keys import Reason
from tunesmith_api.memory.estimate import MemoryEstimate
from tunesmith_api.memory.placement import strategy_of
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.task import Task
from tunesmith_api.v1alpha1.training import Strategy
from tunesmith_store.errors import UserError
from tunesmith_store.memory import memory_limit_bytes
from tunesmith_trainer.distributed.collectives import Group
from tunesmith_trainer.models.numerics import Numerics
from tunesmith_trainer.models.structure import transformer_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Wrapped", "choose", "held_bytes", "local_tensor", "mesh", "shard_tensors", "shards", "share_out", "wrap"]

M_MMAP_THRESHOLD = -3
"""glibc's number of that setting, from malloc.h."""
LARGE_BLOCK = 4 << 20
PIECE = 1 << 18
"""Numbers that are summed up at a time where ranks compare their weights: few enough for a cache to hold."""
DATA, TENSOR = "dp", "tp"
"""The second is what transformers and PEFT call it."""
COPIES, SHARES = "dp_replicate", "dp_shard"
"""The two levels of hybrid sharding, for which FSDP wants names."""


@dataclass(frozen=True)
class Wrapped:
    """A model that ranks train together."""

    module: nn.Module
    """What is called forward."""
    bare: nn.Module
    """The model itself: its parameters are what the optimizer has."""
    strategy: Strategy
    dp_rank: int = 0
    dp_size: int = 1
    """Ranks that see different examples; gradients are averaged over them."""
    ranks_per_replica: int = 1
    """Ranks that share each layer's matrices, and therefore see the same examples."""
    rank: int = 0
    skeleton: nn.Module | None = None
    """A copy of the model as it was before ranks shared it out, without its weights (on the meta device)."""

    @property
    def is_sharded(self) -> bool:
        """Whether ranks need each other for a forward pass: then all have to run it equally often."""
        return self.strategy.is_sharded or self.ranks_per_replica > 1

    @property
    def meets_always(self) -> bool:
        """Whether ranks meet in every micro-batch, not in a step's last one only: then all need equally many.

        DDP averages each time where it has to find out which weights a batch has left out.
        """
        return self.is_sharded or bool(getattr(self.module, "find_unused_parameters", False))

    def for_evaluation(self) -> nn.Module:
        """Return what is called forward without gradients: a replica needs no other rank for that."""
        return self.module if self.is_sharded else self.bare

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch.

        DDP averages gradients in the last one only. FSDP does in each: it would have to keep whole gradients
        otherwise, and memory is what it is chosen for. The sum is the same.
        """
        unsynced = getattr(self.module, "no_sync", None)
        if last or unsynced is None or self.meets_always:
            return nullcontext()
        context: AbstractContextManager[Any] = unsynced()
        return context

    def gathered(self, weights: torch.dtype | None = None) -> nn.Module | None:
        """Return the whole model, in one piece, on rank 0; None on all others. All ranks have to call it.

        Where ranks share it out, that is a new one on the CPU, in the number format `weights` (None: as they are). One
        parameter at a time is whole on the other ranks.
        """
        if self.skeleton is None:
            return self.bare if self.rank == 0 else None
        wholes: dict[str, nn.Parameter] = {}
        for name, parameter in self.bare.named_parameters():
            shared: Any = parameter.detach()
            whole = shared.full_tensor() if hasattr(shared, "full_tensor") else shared
            if self.rank == 0:
                copied = whole.to("cpu", dtype=weights if whole.is_floating_point() else None, copy=True)
                wholes[name] = nn.Parameter(copied, requires_grad=parameter.requires_grad)
        return _filled(self.skeleton, wholes) if self.rank == 0 else None

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale the gradients down to `max_norm` (infinity leaves them alone); return the norm before that.

        The norm is that of the whole gradient, the same on all ranks; infinite or NaN where the gradient is, which is
        then left as it is.
        """
        gradients = [parameter.grad for parameter in self.bare.parameters() if parameter.grad is not None]
        norm = _norm(gradients)
        if math.isfinite(norm) and norm > max_norm:
            scale = max_norm / (norm + 1e-6)  # as in torch.nn.utils.clip_grad_norm_
            torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], scale)
        return norm


def choose(plan: TrainingPlan, estimate: MemoryEstimate, group: Group) -> Strategy:
    """Resolve strategy Auto: DDP where the estimate of a replica fits into a process's memory, else FSDP."""

    def fits() -> bool:
        return bool(group.broadcast(estimate.fits(_memory_bytes(group))))

    return strategy_of(plan, group.world_size, fits)


def shards(plan: TrainingPlan, strategy: Strategy) -> int:
    """Return how many neighbours share a copy of the model out; 0: all that see different examples."""
    return plan.processes_per_worker if strategy is Strategy.HSDP else 0


def _memory_bytes(group: Group) -> int:
    """Return how much memory a process has: its GPU's, or its share of its container's or its machine's."""
    if group.device.type == "cuda":
        return int(torch.cuda.get_device_properties(group.device).total_memory)
    shared = memory_limit_bytes() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return shared // group.local_world_size


def mesh(plan: TrainingPlan, group: Group) -> DeviceMesh | None:
    """Lay the ranks out as [data, tensor]: neighbours share layers. None without tensor parallelism.

    Ray Train numbers the ranks pod by pod: so those that share layers lie in one pod, if it has as many processes.

    Raises:
        UserError: the workers can't be divided so, or method or task don't go with it.
    """
    size = plan.tensor_parallel
    _check(plan, group)
    if size == 1:
        return None
    return group.mesh({DATA: group.world_size // size, TENSOR: size})


def _check(plan: TrainingPlan, group: Group) -> None:
    size, method = plan.tensor_parallel, plan.method
    problem = None
    if size > 1:
        name = f"spec.parallelism.tensorParallel {size}"
        if group.world_size % size:
            problem = f"{name} is no divisor of the {group.world_size} training processes"
        elif plan.strategy is Strategy.DDP and group.world_size > size:
            problem = f"{name} with several replicas of the model needs strategy FSDP or Auto, not DDP"
        elif method.type not in {MethodType.FULL, MethodType.LORA}:
            problem = f"{name} goes with method.type Full and LoRA only, not {method.type}"
        elif method.qat is not None or method.pruning is not None:
            problem = f"{name} can't be combined with method.qat or method.pruning: set it to 1"
        elif plan.task is Task.DPO and method.type is MethodType.FULL:
            problem = f"{name} with task DPO needs method.type LoRA: set that, or tensorParallel 1 and strategy FSDP"
    if problem:
        raise UserError(Reason.INVALID_SPEC, problem)


def shard_tensors(model: nn.Module, mesh: DeviceMesh | None, weights: torch.dtype = torch.float32) -> nn.Module:
    """Split a loaded model's matrices over the tensor ranks, by the model's own plan in transformers.

    What is left to a rank gets the number format `weights`. Parameters that the plan leaves out stay whole on each rank
    and get the same gradient there. Called before adapters are added, which PEFT splits likewise.

    Raises:
        UserError: transformers has no plan for the model, or its heads can't be shared out so.
    """
    if mesh is None:
        return model
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    bare: Any = model
    name, size = type(model).__name__, mesh[TENSOR].size()
    if not getattr(bare, "supports_tp_plan", False):
        message = f"spec.parallelism.tensorParallel: transformers has no plan for {name}: set it to 1, strategy to FSDP"
        raise UserError(Reason.INVALID_SPEC, message)
    config = bare.config.get_text_config()
    found = (getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    heads = {int(count) for count in found if count is not None}
    if any(count % size for count in heads):
        numbers = ", ".join(str(count) for count in sorted(heads))
        message = f"spec.parallelism.tensorParallel {size}: the model's attention heads ({numbers}) can't be divided so"
        raise UserError(Reason.INVALID_SPEC, message)
    settings = DistributedConfig(tp_size=size, tp_plan="auto")
    plan, _, _ = bare._resolve_parallel_plans(settings)
    _untie(model)
    apply_tensor_parallelism(model, mesh[TENSOR], plan)
    bare.tie_weights()
    if weights is torch.float32:
        model.float()
    # PEFT looks here for how to split adapters
    bare._device_mesh, bare.config.distributed_config = mesh[TENSOR], settings
    return model


def _untie(model: nn.Module) -> None:
    """Make parameters that are one two, on the same memory: transformers splits each by its name, then ties them."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
            seen.add(id(parameter))


def wrap(
    bare: nn.Module,
    group: Group,
    strategy: Strategy,
    numerics: Numerics,
    mesh: DeviceMesh | None = None,
    weights: torch.dtype = torch.float32,
    within: int = 0,
) -> Wrapped:
    """Make the ranks of a group train a model together. Before the optimizer is made: FSDP replaces parameters.

    `within` is as for `share_out`; `weights` is the number format to train in, which the model may not have yet where
    ranks share it out.
    """
    tensor_ranks = mesh[TENSOR].size() if mesh is not None else 1
    data_ranks = group.world_size // tensor_ranks
    is_shared = tensor_ranks > 1 or (strategy.is_sharded and data_ranks > 1)
    skeleton = _skeleton(bare) if is_shared else None
    if group.world_size > 1:
        _start_alike(bare, group)
    if data_ranks == 1:
        return Wrapped(bare, bare, Strategy.DDP, 0, 1, tensor_ranks, group.rank, skeleton)
    data_rank = mesh[DATA].get_local_rank() if mesh is not None else group.rank
    if strategy.is_sharded:
        share_out(bare, group, numerics, mesh, weights, within)
        return Wrapped(bare, bare, strategy, data_rank, data_ranks, tensor_ranks, group.rank, skeleton)
    from torch.nn.parallel import DistributedDataParallel

    module = DistributedDataParallel(
        bare,
        device_ids=[numerics.device] if numerics.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        # DDP sends the whole model from rank 0 to all: _start_alike sends what differs
        init_sync=False,
        find_unused_parameters=_may_leave_out(bare),
    )
    return Wrapped(module, bare, Strategy.DDP, data_rank, data_ranks, rank=group.rank)


def _may_leave_out(model: nn.Module) -> bool:
    """Whether some batches use only a part of the weights: a model that sees doesn't look at texts."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "vision_config", None) is not None


def share_out(
    model: nn.Module,
    group: Group,
    numerics: Numerics,
    mesh: DeviceMesh | None,
    weights: torch.dtype,
    within: int = 0,
) -> None:
    """Apply FSDP2 (Zhao et al., 2023; `fully_shard`) in place: to each transformer block, and to what is left.

    Over all data ranks; or over each `within` neighbours, and the others have copies (hybrid sharding): what is
    gathered layer by layer then stays in a pod, and gradients alone go across.

    Trained weights, gradients and optimizer state are float32; what is gathered for computing is short where the
    precision is. Weights get the number format `weights` one block at a time: a rank never holds more in it than its
    share and one block.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    short = numerics.compute_dtype if numerics.is_short else None
    policy = MixedPrecisionPolicy(param_dtype=short, reduce_dtype=torch.float32 if short else None)
    if numerics.device.type == "cpu":
        _give_memory_back()
    if mesh is not None:
        ranks = mesh[DATA]
    elif within:
        ranks = group.mesh({COPIES: group.world_size // within, SHARES: within})
    else:
        ranks = group.mesh({SHARES: group.world_size})
    for block in transformer_blocks(model):
        fully_shard(_in_format(block, weights, numerics.device), mesh=ranks, mp_policy=policy)
    # without it a forward pass alone, as evaluation's, would leave whole embeddings behind for checkpoints to find
    fully_shard(_in_format(model, weights, numerics.device), mesh=ranks, mp_policy=policy, reshard_after_forward=True)
    if hasattr(model, "generate"):  # adapters' models go round the outermost forward there
        register_fsdp_forward_method(model, "generate")


def _give_memory_back() -> None:
    """Have glibc take large blocks from the kernel one by one, and give them back as soon as they are free.

    On a CPU, FSDP allocates and frees a gathered layer at a time. glibc's heap, which can't move what lies in between,
    would grow by as much as is saved. It costs time, and memory is what FSDP is chosen for.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc only
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _in_format(module: nn.Module, weights: torch.dtype, device: torch.device) -> nn.Module:
    """Make all floating-point numbers float32, on the device, where that is the format of the weights."""
    for each in module.modules() if weights is torch.float32 else ():
        for tensor in (*each.parameters(recurse=False), *each.buffers(recurse=False)):
            if tensor.is_floating_point() and tensor.dtype is not torch.float32:
                tensor.data = tensor.data.to(device).float()  # half of what a float32 would be is sent
    return module


def _skeleton(model: nn.Module) -> nn.Module:
    """Copy a model without its weights, and without what tensor parallelism has put around its layers."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    meshes = {id(each) for each in (getattr(module, "_device_mesh", None) for module in model.modules()) if each}
    memo |= dict.fromkeys(meshes)  # process groups can't be copied: None takes their place
    copied = copy.deepcopy(model, memo)
    for module in copied.modules() if meshes else ():
        module.__dict__.pop("forward", None)
        config: Any = getattr(module, "config", None)
        if config is not None:
            config.distributed_config = None
    return copied


def _filled(skeleton: nn.Module, wholes: dict[str, nn.Parameter]) -> nn.Module:
    """Put weights into a skeleton; parameters that were one stay one."""
    new = {id(parameter): wholes[name] for name, parameter in skeleton.named_parameters()}
    for module in skeleton.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, new[id(parameter)])
    return skeleton.to("cpu")


def _start_alike(model: nn.Module, group: Group) -> None:
    """Send from rank 0 what isn't the same on all ranks: weights that different CPUs drew, or different files.

    Weights that all ranks read from the same files are the rule, and a comparison of sums costs no time.
    """
    tensors = [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]
    tensors = [tensor for tensor in tensors if not hasattr(tensor, "to_local")]
    sums = torch.stack([_fingerprint(tensor).to(group.device) for tensor in tensors])
    most, least = sums.clone(), sums.clone()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    for tensor, same in zip(tensors, (most == least).tolist(), strict=True):
        if not same:
            # a model that is yet to be shared out is still on the CPU, where NCCL can't reach it
            sent = tensor.detach().to(group.device)
            dist.broadcast(sent, src=0)
            tensor.data.copy_(sent)


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor up in float64, piece by piece: torch makes a float64 copy of what it sums."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for number, piece in enumerate(tensor.detach().flatten().split(PIECE), 1):
        # weights that were only exchanged have the same sum: what comes later counts more
        total += number * (piece.sum(dtype=torch.float64) + piece[len(piece) // 2 :].sum(dtype=torch.float64))
    return total


def _norm(gradients: Sequence[torch.Tensor]) -> float:
    """Return the norm of all gradients together, the same on all ranks.

    Gradients are put together by how they are shared out: the squares of parts are added up over the ranks that have
    the other parts, those of whole ones are not.
    """
    together: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for gradient in gradients:
        together.setdefault(tuple(_groups_of_parts(gradient)), []).append(local_tensor(gradient))
    total = 0.0
    for groups, parts in together.items():
        norms = torch.stack([norm.double() for norm in torch._foreach_norm(parts)])
        square = norms.square().sum()
        for parted in groups:
            dist.all_reduce(square, group=parted)
        total += float(square)
    return math.sqrt(total)


def _groups_of_parts(tensor: torch.Tensor) -> Iterable[Any]:
    """Return the process groups over which a tensor's parts lie."""
    layout: Any = tensor
    for dimension, placement in enumerate(getattr(layout, "placements", ())):
        if not placement.is_replicate():
            yield layout.device_mesh.get_group(dimension)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of weights and optimizer state that this rank holds."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    # shared storages (tied embeddings, bitsandbytes' tables) count once
    parts = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in map(local_tensor, tensors)}
    return sum(parts.values())


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor that ranks share out (a view), or the tensor itself."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
