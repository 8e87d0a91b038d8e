"""`python -m bench.controlplane [--jobs N,…] [--deployments N] [--peer kubeflow|kuberay] [--figures NAME …]`.

Measures, tells progress on standard error, ends with one JSON object.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path

from bench.controlplane import figures, peers
from bench.controlplane.figures import Settings
from bench.runs import Figures, measure_all, say, show_verdicts

REACH = {
    "writes_per_job": ("≤", 8),
    "progress_seconds": ("≥", 10),
    "reads_per_reconcile": ("≤", 0),
    "idle_requests": ("≤", 0),
    "create_vs_plain_500": ("≤", 1.3),
    "create_vs_plain_1000": ("≤", 1.3),
    "status_latency_p99_seconds": ("≤", 2),
    "rss_mib_500": ("≤", 120),
    "rss_mib_1000": ("≤", 150),
    "rss_mib_5000": ("≤", 350),
    "restart_seconds_5000": ("≤", 60),
    "startup_cpu_vs_before": ("≤", 0.15),
    "startup_cpu_growth": ("≤", 2.2),
}
BEFORE = "264aba1"
"""The last commit before start-up was mended."""
MOST_TO_THE_END = 1000
"""Jobs whose end is waited for: of more it takes Kubernetes' own Job controller hours, on two cores."""


show = show_verdicts(REACH)


def _numbered(found: Figures, count: int, unnumbered: Collection[str] = ()) -> Figures:
    """Figures of a run of so many jobs, under the names of the table."""
    return {name if name in unnumbered else f"{name}_{count}": value for name, value in found.items()}


def jobs(counts: list[int], settings: Settings) -> Figures:
    """So many FineTuneJobs of two workers, from create to Succeeded or, of very many, to the restart.

    Each count has a control plane of its own.
    """
    results: Figures = {}
    for count in counts:
        say(f"{count} FineTuneJobs")
        once = ("status_latency_p50_seconds", "status_latency_p99_seconds")
        found = figures.lifecycle(
            count, settings, latency=count == 1000, restart=count >= 500, finish=count <= MOST_TO_THE_END
        )
        found = _numbered(found, count, once)
        if 500 <= count <= 1000:
            say(f"{count} jobs by a plain client")
            for suffix, policy in (("", True), ("_4_objects", False)):
                plain = figures.plain(count, policy, settings)
                found[f"create_vs_plain_{count}{suffix}"] = found[f"jobs_seconds_{count}"] / plain["jobs_seconds"]
                found[f"plain_jobs_seconds_{count}{suffix}"] = plain["jobs_seconds"]
                found[f"plain_pods_seconds_{count}{suffix}"] = plain["pods_seconds"]
        results |= found
        show("jobs", found)
    return results


def main() -> int:
    """Measure what was asked for, or all of it."""
    parser = argparse.ArgumentParser(prog="python -m bench.controlplane", description=__doc__)
    parser.add_argument(
        "--jobs", default="100,500,1000,5000", help="counts of FineTuneJobs (default 100,500,1000,5000)"
    )
    parser.add_argument("--deployments", type=int, default=1000, help="ModelDeployments (default 1000)")
    parser.add_argument(
        "--peer",
        choices=sorted(peers.PEERS),
        action="append",
        default=[],
        help="run the same counts up to 500 through it",
    )
    parser.add_argument(
        "--figures", nargs="*", default=["jobs", "writes", "idle", "startup", "deployments"], help="measure these only"
    )
    parser.add_argument("--qps", type=float, default=100.0, help="requests a second of every client (default 100)")
    parser.add_argument("--runs", type=int, default=3, help="starts per size (default 3)")
    parser.add_argument(
        "--operator-from",
        type=Path,
        default=Settings().code,
        help="checkout whose operator is measured (default this one)",
    )
    parser.add_argument("--before", default=BEFORE, help=f"commit to compare start-up with (default {BEFORE})")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="TUNESMITH_NAME of the operator, e.g. WORKERS=8",
    )
    chosen = parser.parse_args()
    more = {f"TUNESMITH_{name}": value for name, _, value in (it.partition("=") for it in chosen.set)}
    settings = Settings(chosen.qps, chosen.operator_from.resolve(), chosen.before, chosen.runs, more)
    counts = [int(it) for it in chosen.jobs.split(",")]
    known: dict[str, Callable[[], Figures]] = {
        "jobs": lambda: jobs(counts, settings),
        "writes": lambda: figures.through(100, settings),
        "idle": lambda: figures.idle(100, settings),
        "startup": lambda: figures.startup(settings),
        "deployments": lambda: {
            f"deployments_{name}_{chosen.deployments}": value
            for name, value in figures.deployments(chosen.deployments, settings).items()
        },
    }
    for peer in chosen.peer:
        known[peer] = lambda peer=peer: peers.measured(peer, [it for it in counts if it <= 500], settings)  # type: ignore[misc]
    if unknown := set(chosen.figures) - set(known):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(known)}")

    wanted = {name: known[name] for name in [*chosen.figures, *chosen.peer]}
    # those of the jobs are shown as they are found
    return measure_all(wanted, lambda name, found: None if name == "jobs" else show(name, found))


if __name__ == "__main__":
    raise SystemExit(main())
