"""How much memory a server pod takes, from what its artefact is made of, and what follows from that.

`revisions` asks when an artefact has been made: a pod that is given less than its model takes would be killed while it
loads, again and again. `decide` asks how much a pod is given where the spec leaves that open.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from tunesmith_api.artifacts import ModelShape
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import ModelRef
from tunesmith_api.v1alpha1.deploymentstatus import Revision, RevisionPhase
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_operator.core.modeldeployment.template import Template
from tunesmith_operator.core.text import amount

__all__ = ["Need", "need_of", "with_memory", "with_need"]

MIB: Final = 1 << 20
PROGRAM: Final = 224 * MIB
"""Interpreter, libraries, the HTTP front with requests and answers on their way."""
BYTES_OF_A_WORD: Final = 512
"""Of a token in the tokenizer's tables, its merges with it."""
BYTES_OF_A_CHANCE: Final = 32
"""Of a token that may come next, in each slot."""
BYTES_OF_A_BODY: Final = 40
"""That llama.cpp takes for each byte of a prompt which turns out to be too long."""
COMPUTED_AT_ONCE: Final = 512
"""Tokens of prompts that llama.cpp computes together: its `n_ubatch`."""
CONTEXT_STEP: Final = 256
"""A slot's context is rounded up to this."""
ROOM_LEAST: Final = 256 * MIB
ROOM_SHARE: Final = 4
"""A quarter of the rest, or the above: the prompt cache, and what the server leaves free beside it."""
TORCH: Final = 512 * MIB
"""torch and transformers with nothing loaded."""
BATCH: Final = 1536 * MIB
"""The activations of a batch of long texts."""
LARGEST: Final = 2**50
USUAL: Final = 4096 * MIB
"""The default of a quantize Job, and of servers whose artefact or engine doesn't say what they take."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a server takes, by what they are for."""

    weights: int
    context: int
    rest: int
    room: int
    """Beyond what it can't answer without."""

    @property
    def least(self) -> int:
        """Without this it can't answer."""
        return self.weights + self.context + self.rest

    @property
    def whole(self) -> int:
        """What its pod should have, in whole MiB."""
        return -(-(self.least + self.room) // MIB) * MIB


def need_of(plan: ServingPlan, model: ModelRef) -> Need | None:
    """What a server of the artefact takes; None where its manifest, or its engine, doesn't say enough."""
    if plan.engine is EngineType.TRANSFORMERS:
        # weights of 16 bits are computed with in 32 on most CPUs
        return Need(model.size_bytes, 0, TORCH, model.size_bytes + BATCH)
    if plan.engine is not EngineType.LLAMA_CPP or model.shape is None:
        return None
    tokens = -(-plan.context_length // CONTEXT_STEP) * CONTEXT_STEP
    context = tokens * plan.parallel_requests * model.shape.kv_bytes_per_token
    words = model.shape.vocabulary * (BYTES_OF_A_WORD + BYTES_OF_A_CHANCE * plan.parallel_requests)
    program = PROGRAM + words + BYTES_OF_A_BODY * plan.api.max_body_bytes
    need = Need(model.size_bytes, context, program + _computing(model.shape, tokens), 0)
    return replace(need, room=max(need.least // ROOM_SHARE, ROOM_LEAST)) if need.least <= LARGEST else None


def _computing(shape: ModelShape, tokens: int) -> int:
    """Intermediate results of one batch, in 32 bits: attention over a slot with its mask, and a feed-forward layer."""
    attention = (shape.heads + 1) * tokens
    return 4 * COMPUTED_AT_ONCE * (attention + 3 * shape.feed_forward + 2 * shape.width)


def with_need(revision: Revision, template: Template | None, model: ModelRef | None, has_servers: bool) -> Revision:
    """The revision with what its servers take; failed, where the spec gives them less and there are none yet."""
    need = need_of(template.plan, model) if template is not None and model is not None else None
    if template is None or need is None:
        # of servers that are there without a report, the status that said it is lost: they stay as they are
        lost = model is None and has_servers
        return revision if lost else revision.model_copy(update={"memory_bytes": USUAL})
    sized = revision.model_copy(update={"memory_bytes": need.whole})
    return sized if has_servers else _judged(sized, template, need)


def _judged(revision: Revision, template: Template, need: Need) -> Revision:
    given = template.pods.resources.memory
    found = amount(given) if given is not None else None
    if found is None or found >= need.least:
        return revision
    plan = template.plan
    held = f", {_mib(need.context)} Mi of context ({plan.context_length} tokens x {plan.parallel_requests} requests)"
    message = (
        f"spec.resources.memory is {given}, and a server takes {_mib(need.least)} Mi at least: {_mib(need.weights)} Mi "
        f"of weights{held if need.context else ''}, {_mib(need.rest)} Mi of program and buffers. Set it to "
        f"{_quantity(need.whole)}, or leave it out{', or lower spec.engine' if need.context else ''}."
    )
    update = {"phase": RevisionPhase.FAILED, "reason": Reason.MEMORY_TOO_SMALL.value, "message": message}
    return revision.model_copy(update=update)


def with_memory(template: Template, revision: Revision) -> Template:
    """The template with the memory of its servers said: the spec's, or what the artefact turned out to need."""
    resources = template.pods.resources
    if resources.memory is not None or not revision.memory_bytes:
        return template
    derived = resources.model_copy(update={"memory": _quantity(revision.memory_bytes)})
    return replace(template, pods=template.pods.model_copy(update={"resources": derived}))


def _mib(size: int) -> int:
    return -(-size // MIB)


def _quantity(size: int) -> str:
    mib = _mib(size)
    return f"{mib}Mi" if mib % 1024 else f"{mib // 1024}Gi"
