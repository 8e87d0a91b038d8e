"""`python -m bench [--runs N] [--steps N] [FIGURE…]`: measure, tell progress, end with one JSON object."""

from __future__ import annotations

import argparse
from functools import partial

from bench.runs import measure_all, show_verdicts
from bench.trainer import FIGURES, opened

REACH = {
    "step_time_vs_torchrun": ("≤", 1.03),
    "tokens_vs_hf_trainer": ("≥", 1.5),
    "tokens_vs_trl_packed": ("≥", 1.0),
    "loss_gap_percent": ("≤", 1.0),
    "checkpoint_stall_percent": ("≤", 2.0),
    "upload_vs_multipart": ("≥", 0.8),
    "restore_vs_multipart": ("≥", 0.8),
    "peak_memory_vs_plain": ("≤", 1.10),
    "fsdp_memory_vs_ddp": ("≤", 0.6),
    "seconds_to_first_step": ("≤", 30.0),
}


def main() -> int:
    """Measure what was asked for, or all of it."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each measurement (default 5)")
    parser.add_argument("--steps", type=int, default=4, help="steps that count in each run (default 4)")
    parser.add_argument("figures", nargs="*", help="measure these only; see bench/trainer.py for the names")
    chosen = parser.parse_args()
    known = {figure.__name__: figure for figure in FIGURES}
    if unknown := set(chosen.figures) - set(known):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    with opened(chosen.runs, chosen.steps) as bench:
        wanted = {name: partial(figure, bench) for name, figure in known.items() if name in (chosen.figures or known)}
        return measure_all(wanted, show_verdicts(REACH))


if __name__ == "__main__":
    raise SystemExit(main())
