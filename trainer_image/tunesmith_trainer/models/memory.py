"""How much memory a training process will need, by arithmetic on the model's files: no torch, nothing is loaded.

`assembly` logs it before the first step and `parallel.choose` picks the strategy by it. It is an upper bound in the
number of tokens (every example is taken to be maxLength long) and an estimate in all else; the test beside it holds it
against what processes were seen to use. The counts of activations follow Korthikanti et al. (2022, "Reducing Activation
Recomputation"), section 4, adapted to what PyTorch keeps of transformers' layers with fused attention.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import LoraConfig, MethodType
from tunesmith_api.v1alpha1.task import Task
from tunesmith_api.v1alpha1.training import Optim, Strategy
from tunesmith_trainer.models.files import ModelFacts

__all__ = ["MemoryEstimate", "estimate"]

FLOAT = 4
"""Bytes of a float32: trained weights, gradients and optimizer state."""
RUNTIME = 700 << 20
"""Bytes of Python, torch and transformers themselves, or of a GPU's context and workspaces."""
QUANTIZED = 0.5
"""Bytes of a 4-bit weight."""
CONSTANTS = 4 / 64
"""Bytes beside it: each 64 share a float32 constant, which every rank keeps."""
QUANTIZED_CONSTANTS = 1 / 64 + 4 / (64 * 256)
"""The same where those constants are held in 8 bits (Dettmers et al., 2023: QLoRA, section 3)."""

_WITH_VOCABULARY = {Task.CHAT_SFT, Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ, Task.DPO}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per training process at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """The output of the head, its log-probabilities and their gradient."""
    runtime: int = RUNTIME

    @property
    def total(self) -> int:
        """All of it."""
        return sum(int(getattr(self, field.name)) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {_gibibytes(getattr(self, field.name))}" for field in fields(self))
        return f"about {_gibibytes(self.total)} ({parts})"


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.0f} MiB"


def estimate(
    facts: ModelFacts, plan: TrainingPlan, bytes_per_activation: int, strategy: Strategy = Strategy.DDP
) -> MemoryEstimate:
    """Estimate what one process needs. `strategy` Auto counts as DDP. A teacher of a distillation is left out.

    With FSDP weights, gradients and optimizer state are shared out over all of them, with HSDP over a worker's; with tensor parallelism over
    those that share a replica.
    """
    over = {Strategy.FSDP: plan.world_size // plan.tensor_parallel, Strategy.HSDP: plan.processes_per_worker}
    shares = max(1, over.get(strategy, 1)) * plan.tensor_parallel
    trained = _trained(facts, plan)
    weights = _weights(facts, plan, trained, bytes_per_activation)
    state = {Optim.ADAMW_TORCH: 2 * FLOAT, Optim.ADAMW_8BIT: 2, Optim.SGD: FLOAT if plan.training.adam_beta1 else 0}
    if shares > 1:
        # one layer at a time is gathered whole, and the embeddings
        gathered = facts.vocabulary * facts.hidden + sum(matrix.size for matrix in facts.matrices) // facts.layers
        constants = _constants(facts, plan)
        weights = (weights - constants) / shares + constants
        weights += gathered * bytes_per_activation if strategy.is_sharded else 0
    tokens = _tokens(facts, plan)
    return MemoryEstimate(
        weights=int(weights),
        gradients=int(trained * FLOAT / shares),
        optimizer=int(trained * state[plan.training.optim] / shares),
        activations=int(_activations(facts, plan, tokens, bytes_per_activation) / plan.tensor_parallel),
        logits=_logits(facts, plan, tokens, bytes_per_activation),
    )


def _trained(facts: ModelFacts, plan: TrainingPlan) -> int:
    """Return the number of trained parameters."""
    if plan.method.type is MethodType.FULL:
        return facts.parameters
    lora = plan.method.lora or LoraConfig()
    targets = [
        matrix
        for matrix in facts.matrices
        if "all-linear" in lora.target_modules or matrix.name.rpartition(".")[2] in lora.target_modules
    ]
    total = sum(lora.r * (matrix.rows + matrix.columns) for matrix in targets)
    if plan.method.type is MethodType.DORA:
        total += sum(matrix.rows for matrix in targets)
    return total


def _weights(facts: ModelFacts, plan: TrainingPlan, trained: int, bytes_per_activation: int) -> float:
    method = plan.method
    matrices = sum(matrix.size for matrix in facts.matrices)
    if method.type is MethodType.QLORA:
        rest = (facts.parameters - matrices + trained) * FLOAT
        return matrices * QUANTIZED + _constants(facts, plan) + rest
    if method.has_adapters:
        short = facts.stored_bytes == bytes_per_activation == 2
        return facts.parameters * (2 if short else FLOAT) + trained * FLOAT
    total = float(facts.parameters * FLOAT)
    if method.qat is not None:
        total += matrices * FLOAT  # rounded weights, kept for the backward pass
    if method.pruning is not None:
        total += matrices * (FLOAT + 1)  # masked weights and masks
    if plan.task is Task.DPO:
        total += facts.parameters * (2 if facts.stored_bytes == bytes_per_activation == 2 else FLOAT)  # reference
    return total


def _constants(facts: ModelFacts, plan: TrainingPlan) -> float:
    """Return the bytes of what a 4-bit base keeps beside its weights."""
    if plan.method.type is not MethodType.QLORA:
        return 0.0
    twice = plan.method.quantized_base is None or plan.method.quantized_base.use_double_quant
    return sum(matrix.size for matrix in facts.matrices) * (QUANTIZED_CONSTANTS if twice else CONSTANTS)


def _tokens(facts: ModelFacts, plan: TrainingPlan) -> int:
    """Return the most tokens of a micro-batch."""
    training = plan.training
    share = -(-training.global_batch_size // max(1, plan.world_size // plan.tensor_parallel))
    length = min(training.max_length, facts.positions or training.max_length)
    if plan.task is Task.IMAGE_CLASSIFICATION and facts.positions:
        length = facts.positions
    sides = 2 if plan.task in {Task.DPO, Task.REWARD} else 1
    return min(training.micro_batch_size, share) * length * sides


def _activations(facts: ModelFacts, plan: TrainingPlan, tokens: int, width: int) -> float:
    """Return the bytes that a forward pass keeps.

    Of a layer: the inputs of its two norms and of the matrices behind them, queries, keys, values and the output of
    attention; and of the feed-forward part both factors of the gate's product, the gate before its activation, and the
    product. Norms are computed in float32 whatever the precision.
    """
    feed_forward = 4 if facts.is_gated else 2
    narrow = 2 * facts.hidden + 2 * facts.attention + 2 * facts.key_value + feed_forward * facts.intermediate
    layer = narrow * width + 4 * facts.hidden * FLOAT
    if plan.training.gradient_checkpointing:
        return float(tokens * (facts.layers * facts.hidden * width + layer))
    return float(tokens * facts.layers * layer)


def _logits(facts: ModelFacts, plan: TrainingPlan, tokens: int, width: int) -> int:
    """Return the bytes of logits, log-probabilities and the gradient in float32, and of the head's own output."""
    if plan.task not in _WITH_VOCABULARY:
        return 0
    return tokens * facts.vocabulary * (3 * FLOAT + (width if width < FLOAT else 0))
