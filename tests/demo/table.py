"""The figures of a gate, from a revision's status, as lines of text: what the demo ends with."""

from __future__ import annotations

from typing import Any

WIDTHS = (18, 12, 12, 30)


def gate_table(evaluation: dict[str, Any]) -> list[str]:
    """One line for each figure of both models, with the difference and its interval."""
    one, other = evaluation["baseline"], evaluation["quantized"]
    rows = [
        ("tuned model", "unquantized", "served", "difference (95 % interval)"),
        (
            "accuracy, %",
            one["accuracyPercent"],
            other["accuracyPercent"],
            _range(evaluation["accuracyDropPercent"], "points less"),
        ),
        (
            "perplexity",
            one["perplexity"],
            other["perplexity"],
            _range(evaluation["perplexityIncreasePercent"], "% more"),
        ),
        ("answers alike", "", "", _range(evaluation["agreementPercent"], "%")),
        ("tokens/s", one["tokensPerSecond"], other["tokensPerSecond"], ""),
        ("file, MB", *(f"{it['sizeBytes'] / 1e6:.0f}" for it in (one, other)), ""),
        ("memory, MB", *(f"{it['memoryBytes'] / 1e6:.0f}" for it in (one, other)), ""),
    ]
    return ["".join(f"{cell:<{width}}" for cell, width in zip(row, WIDTHS, strict=True)).rstrip() for row in rows]


def _range(estimate: dict[str, str], unit: str) -> str:
    value, low, high = (float(estimate[it]) for it in ("value", "low", "high"))
    return f"{value:.1f} {unit} ({low:.1f} to {high:.1f})"
