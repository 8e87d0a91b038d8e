"""Attention over examples that lie end to end in one row: no padding anywhere but inside attention itself.

`tasks.causal_lm` lays examples out and passes the `Layout` to the model as the argument `packed`; transformers hands it
on to `packed_attention`, which is registered under the name IMPLEMENTATION. Each example attends to itself alone: the
row is cut into a block of one line per example, padded on the right to the longest. Under a causal mask no real token
sees what is to its right, so the padding needs no mask and costs attention only, not the matrices around it.
Whether a model may be computed this way is not looked up in a list but tried out: `packs_exactly`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = [
    "IMPLEMENTATION",
    "Layout",
    "packed_attention",
    "packed_implementation",
    "packs_exactly",
    "plain_implementation",
]

IMPLEMENTATION = "tunesmith_packed"


@dataclass(frozen=True)
class Layout:
    """Where the examples of a packed row of `total` tokens lie.

    padded: [examples * longest], for each place of the padded block the token of the row that goes there.
    real: [total], for each token of the row its place in the block.
    """

    examples: int
    longest: int
    padded: torch.Tensor
    real: torch.Tensor
    is_padded: bool

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Layout:
        """Lay out examples of these lengths one after the other."""
        sizes = torch.tensor(lengths)
        longest = int(sizes.max())
        starts = sizes.cumsum(0) - sizes
        places = torch.arange(longest)
        inside = places[None, :] < sizes[:, None]
        padded = torch.where(inside, starts[:, None] + places[None, :], 0).flatten()
        real = inside.flatten().nonzero().squeeze(1)
        return cls(len(lengths), longest, padded.to(device), real.to(device), len(real) != len(padded))

    def to_block(self, states: torch.Tensor) -> torch.Tensor:
        """[1, heads, total, size] → [examples, heads, longest, size]."""
        _, heads, _, size = states.shape
        rows = states[0].transpose(0, 1)
        if self.is_padded:
            rows = rows.index_select(0, self.padded)
        return rows.view(self.examples, self.longest, heads, size).transpose(1, 2)

    def to_row(self, block: torch.Tensor) -> torch.Tensor:
        """[examples, heads, longest, size] → [1, total, heads, size]."""
        rows = block.transpose(1, 2).reshape(self.examples * self.longest, block.shape[1], block.shape[3])
        return (rows.index_select(0, self.real) if self.is_padded else rows).unsqueeze(0)


def _window_mask(longest: int, window: int, device: torch.device) -> torch.Tensor:
    distance = torch.arange(longest, device=device)[:, None] - torch.arange(longest, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each example of a packed row to itself.

    query: [1, heads, tokens, size]; key, value: [1, key heads, tokens, size]. Returns [1, tokens, heads, size].

    Raises:
        ValueError: the model caps its attention or gives it a sink, which no fused kernel computes.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("attention with a cap or a sink can't be packed")
    mask = None
    if sliding_window is not None and sliding_window < packed.longest:
        mask = _window_mask(packed.longest, sliding_window, query.device)
    block = functional.scaled_dot_product_attention(
        packed.to_block(query),
        packed.to_block(key),
        packed.to_block(value),
        attn_mask=mask,
        dropout_p=dropout if module.training else 0.0,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return packed.to_row(block), None


def register() -> None:
    """Make transformers know IMPLEMENTATION. No mask function goes with it: transformers then makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)


@contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def packed_implementation(model: Any, packed: bool) -> Iterator[None]:
    """Switch a bare transformers model (or one wrapped by PEFT) to packed attention for a while, where it `packed`."""
    if not packed:
        yield
        return
    register()
    with _implementation(model, IMPLEMENTATION):
        yield


@contextmanager
def plain_implementation(model: Any) -> Iterator[None]:
    """Switch back for a while, as for generation."""
    if getattr(model.config, "_attn_implementation", None) != IMPLEMENTATION:
        yield
        return
    with _implementation(model, "sdpa"):
        yield


@torch.no_grad()
def packs_exactly(model: nn.Module, tolerance: float = 2e-3) -> bool:
    """Try out whether a causal language model gives the same logits for two short examples packed as one by one.

    Models that carry a state along the row (Mamba), cap or bias attention, or know nothing of attention interfaces
    don't. The tolerance is relative to the largest logit, and wide enough for bfloat16's rounding.
    """
    bare: Any = model
    device, vocabulary = next(model.parameters()).device, int(bare.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(vocabulary, (length,), generator=generator).to(device) for length in (5, 9)]
    training = model.training
    model.eval()
    try:
        alone = [model(input_ids=example[None], use_cache=False).logits[0].float() for example in examples]
        with packed_implementation(model, True):
            together = (
                model(
                    input_ids=torch.cat(examples)[None],
                    position_ids=torch.cat([torch.arange(len(example), device=device) for example in examples])[None],
                    packed=Layout.of([len(example) for example in examples], device),
                    use_cache=False,
                )
                .logits[0]
                .float()
            )
    except Exception:  # whatever a model that can't do it raises
        return False
    finally:
        model.train(training)
    expected = torch.cat(alone)
    if together.shape != expected.shape:
        return False
    wide = max(tolerance, 4 * torch.finfo(next(model.parameters()).dtype).eps)
    return bool((together - expected).abs().max() <= wide * expected.abs().max())
