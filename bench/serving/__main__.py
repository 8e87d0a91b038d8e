"""`python -m bench.serving [--runs N] [FIGURE…]`: measure, tell progress, end with one JSON object.

A figure that can't be measured here is `{"skipped": why}` in it.
"""

from __future__ import annotations

import argparse
from functools import partial

from bench.runs import measure_all, show_verdicts
from bench.serving.figures import DIFFERENT_PROMPTS, FIGURES, Bench

REACH = {
    "decode_vs_engine": ("≥", 0.97),
    "decode_vs_transformers_fp32": ("≥", 6.0),
    "bandwidth_fraction": ("≥", 0.55),
    "requests_vs_engine_1": ("≥", 0.95),
    "requests_vs_engine_8": ("≥", 0.95),
    "requests_vs_engine_32": ("≥", 0.95),
    "requests_8_vs_1": ("≥", 1.0),
    "p95_vs_engine_8": ("≤", 1.05),
    "requests_vs_vllm_cpu_8": ("≥", 1.5),
    "shared_prefix_ttft_ratio": ("≤", 0.2),
    "rss_bound_ratio": ("≤", 1.0),
    "classifier_int8_vs_fp32": ("≥", 2.0),
    "classifier_accuracy_delta": ("±", 1.0),
    "seconds_to_first_answer": ("≤", 15.0),
}


def main() -> int:
    """Measure what was asked for, or all of it."""
    known = {figure.__name__: figure for figure in FIGURES}
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each measurement (default 5)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=DIFFERENT_PROMPTS,
        help=f"different prompts of the figure rss_bound_ratio (default {DIFFERENT_PROMPTS})",
    )
    parser.add_argument("figures", nargs="*", help=f"measure these only: {', '.join(known)}")
    chosen = parser.parse_args()
    if unknown := set(chosen.figures) - set(known):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    bench = Bench(chosen.runs, chosen.prompts)
    wanted = {name: partial(figure, bench) for name, figure in known.items() if name in (chosen.figures or known)}
    return measure_all(wanted, show_verdicts(REACH))


if __name__ == "__main__":
    raise SystemExit(main())
