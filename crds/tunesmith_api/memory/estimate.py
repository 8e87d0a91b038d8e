"""What one training process needs, at the peak of a step and at the end, where the model is put together and written.

It is an upper bound in the number of tokens (every example is taken to be maxLength long) and an estimate in all else;
tests/component/trainer/test_trainer_memory_measured.py holds it against what processes were seen to use. The counts of
activations follow Korthikanti et al. (2022, "Reducing Activation Recomputation"), section 4, adapted to what PyTorch
keeps of transformers' layers with fused attention. What a model does with pictures, and experts, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from tunesmith_api.memory.facts import Matrix, ModelFacts
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_api.v1alpha1.method import LoraConfig, MethodType
from tunesmith_api.v1alpha1.task import Task
from tunesmith_api.v1alpha1.training import Optim, Precision, Strategy

__all__ = ["FILL", "FLOAT", "MemoryEstimate", "activation_bytes", "base_parameters", "estimate", "in_words", "trained"]

FILL = 0.85
"""Part of the memory that an estimate may fill: the rest is for what no estimate sees, such as fragmentation."""
FLOAT = 4
"""Bytes of a float32: trained weights, gradients and optimizer state."""
RUNTIME = 440 << 20
"""Bytes of Python, torch and transformers themselves: what a run takes whose model has next to no weights."""
CUDA_BUILD = 150 << 20
"""Bytes beside them on a CPU where torch is built for GPUs, as PyPI has it: its libraries are loaded all the same."""
BITSANDBYTES = 64 << 20
"""Bytes beside them of what QLoRA and the 8-bit optimizer import."""
GPU_RUNTIME = 700 << 20
"""Bytes of a GPU's context and workspaces."""
QUANTIZED = 0.5
"""Bytes of a 4-bit weight."""
CONSTANTS = 4 / 64
"""Bytes beside it: each 64 share a float32 constant, which every rank keeps."""
QUANTIZED_CONSTANTS = 1 / 64 + 4 / (64 * 256)
"""The same where those constants are held in 8 bits (Dettmers et al., 2023: QLoRA, section 3)."""
SCATTERED = 0.5
"""Of activations and gradients, on a CPU: what glibc's heap grows by, since what is freed lies between what isn't."""
TAUGHT = 5
"""Numbers for each logit that learning from a teacher takes: its logits, both distributions, their difference."""

_WITH_VOCABULARY = {Task.CHAT_SFT, Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ, Task.DPO}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training process: of its GPU where it has one, of the host else."""

    weights: int
    gradients: int
    """Those of one micro-batch stay while the next one is computed."""
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """The output of the head, its log-probabilities and their gradient."""
    runtime: int
    teacher: int = 0
    """Of a distillation: its weights, and what is computed with its answers."""
    transient: int = 0
    """What comes and goes at the peak: the gradient of an output head on its way, pieces of the heap in between."""
    saving: int = 0
    """All that is held at the end, while adapters are merged and the model is written."""

    @property
    def step(self) -> int:
        """At the peak of a step."""
        return sum(int(getattr(self, field.name)) for field in fields(self) if field.name != "saving")

    @property
    def total(self) -> int:
        """At whichever is more, a step or the end."""
        return max(self.step, self.saving)

    def fits(self, size: int) -> bool:
        """Whether a process with so much memory can hold it."""
        return self.total <= FILL * size

    def __str__(self) -> str:
        found = ((field.name, int(getattr(self, field.name))) for field in fields(self))
        parts = ", ".join(f"{name} {in_words(size)}" for name, size in found if size and name != "saving")
        end = f"; {in_words(self.saving)} at the end" if self.saving > self.step else ""
        return f"about {in_words(self.total)} ({parts}{end})"


def in_words(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def activation_bytes(plan: TrainingPlan) -> int:
    """Bytes of a number of the forward pass, where precision Auto finds a GPU that computes BF16 natively."""
    precision = plan.training.precision
    is_short = bool(plan.gpus_per_worker) if precision is Precision.AUTO else precision is not Precision.FP32
    return 2 if is_short else FLOAT


def estimate(
    facts: ModelFacts,
    plan: TrainingPlan,
    bytes_per_activation: int,
    strategy: Strategy = Strategy.DDP,
    teacher: ModelFacts | None = None,
    *,
    cuda_build: bool = False,
) -> MemoryEstimate:
    """Estimate what one process needs. `strategy` Auto counts as DDP; a teacher that isn't known is left out.

    `cuda_build` is whether its torch is built for GPUs.

    With FSDP weights, gradients and optimizer state are shared out over all processes, with HSDP over a worker's; with
    tensor parallelism over those that share a replica.
    """
    width, is_shared = bytes_per_activation, strategy.is_sharded
    over = {Strategy.FSDP: plan.world_size // plan.tensor_parallel, Strategy.HSDP: plan.processes_per_worker}
    shares = max(1, over.get(strategy, 1)) * plan.tensor_parallel
    count = trained(facts, plan)
    weights = _weights(facts, plan, count, width)
    if shares > 1:
        # one layer at a time is gathered whole, and the embeddings
        gathered = facts.vocabulary * facts.hidden + sum(matrix.size for matrix in facts.matrices) // facts.layers
        constants = _constants(facts, plan)
        weights = (weights - constants) / shares + constants
        weights += gathered * width if is_shared else 0
    tokens, runtime = _tokens(facts, plan), _runtime(plan, cuda_build)
    casts = 0.0 if is_shared else _casts(facts, plan, width) / plan.tensor_parallel
    activations = _activations(facts, plan, tokens, width) / plan.tensor_parallel
    logits = _logits(facts, plan, tokens, width)
    optimizer = int(count * _state_bytes(plan) / shares)
    gradients = int(count * FLOAT / shares)
    return MemoryEstimate(
        weights=int(weights + casts),
        gradients=gradients,
        optimizer=optimizer,
        activations=int(activations),
        logits=logits,
        runtime=runtime,
        teacher=_teacher(teacher, facts, plan, tokens, width),
        transient=_transient(facts, plan, int(activations), gradients, logits),
        saving=int(weights + optimizer + _put_together(facts, plan, width, shares > 1)) + runtime,
    )


# ---- what is held all the time


def _runtime(plan: TrainingPlan, cuda_build: bool) -> int:
    if plan.gpus_per_worker:
        return GPU_RUNTIME
    short = plan.method.type is MethodType.QLORA or plan.training.optim is Optim.ADAMW_8BIT
    return RUNTIME + (BITSANDBYTES if short else 0) + (CUDA_BUILD if cuda_build else 0)


def base_parameters(facts: ModelFacts, plan: TrainingPlan) -> int:
    """Return the number of the model's parameters that are loaded: a task with a head of its own takes no other."""
    return facts.parameters - (0 if plan.task in _WITH_VOCABULARY else facts.head_parameters)


def trained(facts: ModelFacts, plan: TrainingPlan) -> int:
    """Return the number of trained parameters, but for a new head's."""
    if plan.method.type is MethodType.FULL:
        return base_parameters(facts, plan)
    targets = _targets(facts, plan)
    total = sum((plan.method.lora or LoraConfig()).r * (matrix.rows + matrix.columns) for matrix in targets)
    if plan.method.type is MethodType.DORA:
        total += sum(matrix.rows for matrix in targets)
    return total


def _targets(facts: ModelFacts, plan: TrainingPlan) -> list[Matrix]:
    """Return the layers that get adapters."""
    names = (plan.method.lora or LoraConfig()).target_modules
    return [
        matrix
        for matrix in facts.matrices
        if "all-linear" in names or any(matrix.name == name or matrix.name.endswith(f".{name}") for name in names)
    ]


def _frozen_bytes(facts: ModelFacts, width: int) -> int:
    """Return the bytes of a weight that isn't trained: short where nothing is lost by it."""
    return 2 if facts.stored_bytes == width == 2 else FLOAT


def _weights(facts: ModelFacts, plan: TrainingPlan, count: int, width: int) -> float:
    method, loaded = plan.method, base_parameters(facts, plan)
    matrices, frozen = sum(matrix.size for matrix in facts.matrices), _frozen_bytes(facts, width)
    if method.type is MethodType.QLORA:
        return matrices * QUANTIZED + _constants(facts, plan) + (loaded - matrices) * frozen + count * FLOAT
    if method.has_adapters:
        return loaded * frozen + count * FLOAT
    total = float(loaded * FLOAT)
    if method.qat is not None:
        total += matrices * FLOAT  # rounded weights, kept for the backward pass
    if method.pruning is not None:
        total += matrices * (FLOAT + 1)  # masked weights and masks
    if plan.task is Task.DPO:
        total += loaded * frozen  # reference
    return total


def _constants(facts: ModelFacts, plan: TrainingPlan) -> float:
    """Return the bytes of what a 4-bit base keeps beside its weights."""
    if plan.method.type is not MethodType.QLORA:
        return 0.0
    twice = plan.method.quantized_base is None or plan.method.quantized_base.use_double_quant
    return sum(matrix.size for matrix in facts.matrices) * (QUANTIZED_CONSTANTS if twice else CONSTANTS)


def _casts(facts: ModelFacts, plan: TrainingPlan, width: int) -> float:
    """Return the bytes of the short copies of float32 matrices that autocast keeps for the backward pass.

    Those of trained weights it keeps even where activations are computed again.
    """
    method = plan.method
    if width == FLOAT or method.type is MethodType.QLORA:
        return 0.0
    if method.has_adapters and (_frozen_bytes(facts, width) < FLOAT or plan.training.gradient_checkpointing):
        return 0.0
    return sum(matrix.size for matrix in facts.matrices) * float(width)


def _state_bytes(plan: TrainingPlan) -> int:
    """Return the optimizer's bytes for each trained parameter."""
    momentum = FLOAT if plan.training.adam_beta1 else 0
    return {Optim.ADAMW_TORCH: 2 * FLOAT, Optim.ADAMW_8BIT: 2, Optim.SGD: momentum}[plan.training.optim]


# ---- what a micro-batch takes


def _length(facts: ModelFacts, plan: TrainingPlan) -> int:
    length = min(plan.training.max_length, facts.positions or plan.training.max_length)
    return facts.positions if plan.task is Task.IMAGE_CLASSIFICATION and facts.positions else length


def _tokens(facts: ModelFacts, plan: TrainingPlan) -> int:
    """Return the most tokens of a micro-batch."""
    training = plan.training
    share = -(-training.global_batch_size // max(1, plan.world_size // plan.tensor_parallel))
    sides = 2 if plan.task in {Task.DPO, Task.REWARD} else 1
    return min(training.micro_batch_size, share) * _length(facts, plan) * sides


def _activations(facts: ModelFacts, plan: TrainingPlan, tokens: int, width: int) -> float:
    """Return the bytes that a forward pass keeps.

    Of a layer: the inputs of its two norms and of the matrices behind them, queries, keys, values and the output of
    attention; and of the feed-forward part both factors of the gate's product, the gate before its activation, and the
    product. Norms are computed in float32 whatever the precision, and what they scale is kept where the scale is
    trained.
    """
    feed_forward = 4 if facts.is_gated else 2
    narrow = 2 * facts.hidden + 2 * facts.attention + 2 * facts.key_value + feed_forward * facts.intermediate
    norms = 2 if plan.method.has_adapters else 4
    kept = narrow * width + norms * facts.hidden * FLOAT
    layer = kept + _dropped(facts, plan, width) + _adapted(facts, plan, width)
    if plan.training.gradient_checkpointing:
        return float(tokens * (facts.layers * facts.hidden * width + layer))
    return float(tokens * facts.layers * layer)


def _dropped(facts: ModelFacts, plan: TrainingPlan, width: int) -> float:
    """Return the bytes of dropout for each token of a layer: a GPU keeps bits of one byte, a CPU whole numbers.

    A CPU has no fused attention with dropout: all chances are kept, which numbers fall out, and what is left.
    """
    on_gpu, given = bool(plan.gpus_per_worker), plan.training.dropout
    hidden, attention = (value if given is None else given for value in (facts.dropout, facts.attention_dropout))
    total = 2.0 * facts.hidden * (1 if on_gpu else width) if hidden else 0.0
    if attention and not on_gpu:
        total += width * (3 * facts.heads * _length(facts, plan) + facts.attention + facts.key_value)
    return total


def _adapted(facts: ModelFacts, plan: TrainingPlan, width: int) -> float:
    """Return the bytes of adapters for each token of a layer."""
    if not plan.method.has_adapters:
        return 0.0
    lora, targets = plan.method.lora or LoraConfig(), _targets(facts, plan)
    total = float(width * lora.r * len(targets))
    if lora.dropout:
        total += sum(matrix.columns for matrix in targets) * (width + (1 if plan.gpus_per_worker else width))
    if plan.method.type is MethodType.DORA:
        total += sum(2 * matrix.rows for matrix in targets) * width
    return total / facts.layers


def _logits(facts: ModelFacts, plan: TrainingPlan, tokens: int, width: int) -> int:
    """Return the bytes of logits, log-probabilities and the gradient in float32, and of the head's own output.

    MaskedLM picks those of guessed tokens from the output of all.
    """
    if plan.task not in _WITH_VOCABULARY:
        return 0
    if plan.task is Task.MASKED_LM:
        return int(tokens * facts.vocabulary * (width + plan.masked_lm.mlm_probability * 3 * FLOAT))
    return tokens * facts.vocabulary * (3 * FLOAT + (width if width < FLOAT else 0))


def _teacher(teacher: ModelFacts | None, facts: ModelFacts, plan: TrainingPlan, tokens: int, width: int) -> int:
    """Return the bytes of a distillation's teacher, whole on every rank, and of comparing its answers."""
    if plan.method.distillation is None or teacher is None:
        return 0
    compared = tokens * facts.vocabulary * FLOAT * TAUGHT if plan.task in _WITH_VOCABULARY else 0
    return base_parameters(teacher, plan) * _frozen_bytes(teacher, width) + compared


def _transient(facts: ModelFacts, plan: TrainingPlan, activations: int, gradients: int, logits: int) -> int:
    """Return the bytes that come and go beside the rest of a step's peak."""
    scattered = 0 if plan.gpus_per_worker else int(SCATTERED * (activations + gradients))
    if plan.method.has_adapters or plan.task not in _WITH_VOCABULARY:
        return scattered
    # the head's gradient waits, whole, for that of the embeddings, which it is added to where both are one
    head = facts.vocabulary * facts.hidden * FLOAT
    at_head = max(0, head - logits * 2 // 3)
    at_embeddings = max(0, 2 * head - activations - logits) if facts.is_tied else 0
    return scattered + max(at_head, at_embeddings)


# ---- the end


def _put_together(facts: ModelFacts, plan: TrainingPlan, width: int, is_shared: bool) -> float:
    """Return what the process that writes the model takes beside weights and optimizer, in the memory it computes in.

    Adapters are merged in float32: into the weights where they are, or, below QLoRA and where ranks share the model,
    into a whole one on the host.
    """
    method, loaded = plan.method, base_parameters(facts, plan)
    if plan.publishes_adapter_only:
        return 0.0
    on_host = is_shared or method.type is MethodType.QLORA
    if on_host:
        return 0.0 if plan.gpus_per_worker else loaded * FLOAT + _compared(facts, plan)
    widened = loaded * (FLOAT - _frozen_bytes(facts, width)) if method.has_adapters else 0
    return widened + (0.0 if plan.gpus_per_worker else _compared(facts, plan))


def _compared(facts: ModelFacts, plan: TrainingPlan) -> int:
    """Return the bytes of the files that a finished model of 16 bits is compared with, to see what rounding takes."""
    is_compared = facts.stored_bytes == 2 and plan.model_init is Init.PRETRAINED
    if not is_compared or plan.output_dtype is Precision.FP32:
        return 0
    # and one tensor after the other, the embeddings for the largest, three times in float32
    return facts.parameters * 2 + 3 * FLOAT * facts.vocabulary * facts.hidden
