"""One function per measurement; each gives the figures that its docstring names. Called by `bench.controlplane`, and by a test."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.controlplane.load import create_all, deployment, job, plain_objects
from bench.controlplane.measure import Request, percentile, writes
from bench.controlplane.observer import Observer, job_marks, status_marks
from bench.controlplane.stage import NAMESPACE, OPERATOR, ROOT, Stage, Tunesmith, opened
from bench.runs import Figures, median, say
from tunesmith_api import keys

__all__ = [
    "Settings",
    "checkout",
    "created",
    "deployments",
    "idle",
    "lifecycle",
    "plain",
    "quiet_requests",
    "start_cpu",
    "startup",
    "until_pods",
]

JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
FINETUNEJOBS = f"/apis/{keys.API_VERSION}/namespaces/{NAMESPACE}/finetunejobs"
MODELDEPLOYMENTS = f"/apis/{keys.API_VERSION}/namespaces/{NAMESPACE}/modeldeployments"
LATENCY_JOBS, LATENCY_PER_SECOND = 200, 5.0
OBJECTS_PER_JOB = 7
"""That are watched: itself, Service, ConfigMap, NetworkPolicy, Job and two pods."""
POLL_SECONDS = 3.0


@dataclass(frozen=True)
class Settings:
    """What all measurements share."""

    qps: float = 100.0
    """Of the operator, of the client that makes custom resources, and of the plain client."""
    code: Path = ROOT
    """The checkout whose operator is measured."""
    before: str = ""
    """The commit to compare start-up with."""
    runs: int = 3
    environment: Mapping[str, str] = field(default_factory=dict)
    """More settings of the operator."""

    def operator(self, stage: Stage) -> Tunesmith:
        """Start the operator."""
        return stage.operator(self.code, self.qps, **self.environment)


def _names(count: int) -> list[str]:
    return [f"job-{number:05d}" for number in range(count)]


def created(requests: list[Request], what: str) -> float:
    """When the last object of that resource was created, by whomever."""
    return max(it.done for it in requests if it.what == what and it.code == 201)


def until_pods(stage: Stage, wanted: int, seconds: float) -> list[Request]:
    """Everything asked until so many pods were created.

    Raises:
        RuntimeError: it took longer than so many seconds, or a program has ended.
    """
    requests: list[Request] = []
    pods, deadline = 0, time.monotonic() + seconds
    while pods < wanted:
        stage.check()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{pods} of {wanted} pods after {seconds:.0f} s")
        time.sleep(0.5)
        more = list(stage.audit.read())
        pods += sum(it.what == "pods" and it.code == 201 for it in more)
        requests += more
    return requests


def plain(count: int, network_policy: bool, settings: Settings) -> Figures:
    """`jobs_seconds`, `pods_seconds`: all Jobs of a plain client created, and all their pods; see `load.plain_objects`."""
    with opened() as stage:
        stage.simulator.order(run_seconds=-1)
        stage.audit.skip()
        batches = [plain_objects(name, NAMESPACE, network_policy) for name in _names(count)]
        begun, _ = create_all(stage.kubeconfig("plain", inside=False), batches, settings.qps)
        requests = until_pods(stage, 2 * count, 60.0 + count)
        return {"jobs_seconds": created(requests, "jobs") - begun, "pods_seconds": created(requests, "pods") - begun}


class Life:
    """So many FineTuneJobs from create to Succeeded on one stage; a phase a method, in this order."""

    def __init__(self, stage: Stage, count: int, settings: Settings) -> None:
        self.stage, self.settings = stage, settings
        self.names = _names(count)
        self.patience = 120.0 + max(20 * count / settings.qps, 0.4 * count)
        stage.simulator.order(run_seconds=-1)
        self.operator: Tunesmith = settings.operator(stage)
        self.observer: Observer = stage.observer({FINETUNEJOBS: status_marks, JOBS: job_marks})
        self.figures: Figures = {}
        self.writes: Counter[str] = Counter()
        self.cpu = 0.0
        stage.audit.skip()

    def create(self) -> None:
        """`jobs_seconds`, `pods_seconds` as of `plain`; `training_seconds` until the last status says Training."""
        batches = [[job(name, NAMESPACE)] for name in self.names]
        begun, _ = create_all(self.stage.kubeconfig("load", inside=False), batches, self.settings.qps)
        trained = self.observer.wait("reason:Training", set(self.names), self.patience, say)
        time.sleep(2 * POLL_SECONDS)
        requests = self._count()
        self.figures |= {
            "jobs_seconds": created(requests, "jobs") - begun,
            "pods_seconds": created(requests, "pods") - begun,
            "training_seconds": trained - begun,
            "rss_mib_live": self.operator.usage().rss_mib,
        }

    def _count(self) -> list[Request]:
        requests = list(self.stage.audit.read())
        self.writes += writes(requests, OPERATOR)
        return requests

    def latency(self) -> None:
        """`status_latency_p50_seconds` and `…_p99_…`: from a watch that shows a Job's end to one that shows it in the status.

        All jobs report a new step each second meanwhile.
        """
        self.stage.simulator.order(moving=True)
        time.sleep(20)
        chosen = self.names[:: max(1, len(self.names) // LATENCY_JOBS)][:LATENCY_JOBS]
        for number, name in enumerate(chosen):
            begun = time.monotonic()
            self.stage.simulator.order(finish=[name])
            if number + 1 < len(chosen):
                time.sleep(max(0.0, begun + 1 / LATENCY_PER_SECOND - time.monotonic()))
        self.observer.wait("good", set(chosen), self.patience, say)
        seen, shown = self.observer.first("job-succeeding"), self.observer.first("good")
        took = [shown[name] - seen[f"{name}-1"] for name in chosen]
        self.stage.simulator.order(moving=False)
        self.figures |= {
            "status_latency_p50_seconds": percentile(took, 0.5), "status_latency_p99_seconds": percentile(took, 0.99)
        }  # fmt: skip

    def restart(self) -> None:
        """`restart_seconds`: from the start after a SIGKILL until all jobs were looked at and what came meanwhile is told.

        20 jobs have ended meanwhile. `restart_shown_seconds` until that stands in their status; `restart_cpu_seconds`
        and, at most, `restart_rss_mib` by then, where the first process had needed `first_rss_mib`.
        """
        running = sorted(set(self.names) - self.observer.first("good").keys())
        chosen = set(running[:: max(1, len(running) // 20)][:20])
        ended = self.operator.kill()
        self.cpu += ended.cpu_seconds
        self.figures["first_rss_mib"] = ended.peak_mib
        self.stage.simulator.order(finish=sorted(chosen))
        self.observer.wait("job-succeeding", {f"{name}-1" for name in chosen}, self.patience)
        self.operator = self.settings.operator(self.stage)
        shown = self.observer.wait("good", chosen, self.patience, say)
        # signs of life of so many jobs keep a few in the queue at all times
        while self.operator.reconciles() < len(self.names) or self.operator.depth() > len(self.names) / 20:
            time.sleep(0.1)
        used = self.operator.usage()
        self.figures |= {
            "restart_seconds": max(shown, time.time()) - self.operator.begun, "restart_shown_seconds": shown - self.operator.begun,
            "restart_rss_mib": used.peak_mib, "restart_cpu_seconds": used.cpu_seconds,
        }  # fmt: skip

    def finish(self) -> None:
        """`all_writes_per_job`, `all_writes` by kind, progress among them; `seconds` in all, `cpu_seconds`."""
        begun = min(self.observer.first("there").values())
        self.stage.simulator.order(finish_per_second=self.settings.qps / 4)
        ended = self.observer.wait("good", set(self.names), self.patience, say)
        time.sleep(3)
        self._count()
        used = self.operator.usage()
        self.figures |= {
            "all_writes_per_job": self.writes.total() / len(self.names),
            "all_writes": {what: round(number / len(self.names), 3) for what, number in self.writes.most_common()},
            "seconds": ended - begun,
            "cpu_seconds": self.cpu + used.cpu_seconds,
        }

    def memory(self) -> None:
        """`rss_mib`: the most that it ever held."""
        self.figures["rss_mib"] = max(self.operator.usage().peak_mib, self.figures.get("first_rss_mib", 0.0))


def through(count: int, settings: Settings) -> Figures:
    """`writes_per_job`, `writes` by kind: of so many jobs that train for a few seconds each, from create to Succeeded.

    None of them trains long enough for its progress to be written.
    """
    with opened(settings.code) as stage:
        settings.operator(stage)
        observer = stage.observer({FINETUNEJOBS: status_marks})
        stage.audit.skip()
        names = _names(count)
        create_all(stage.kubeconfig("load", inside=False), [[job(name, NAMESPACE)] for name in names], settings.qps)
        observer.wait("good", set(names), 120.0 + 20 * count / settings.qps, say)
        time.sleep(3)
        found = writes(stage.audit.read(), OPERATOR)
        by_kind = {what: round(number / count, 3) for what, number in found.most_common()}
        return {"writes_per_job": found.total() / count, "writes": by_kind}


def lifecycle(
    count: int, settings: Settings, latency: bool = False, restart: bool = False, finish: bool = True
) -> Figures:
    """So many jobs; the figures of the methods of `Life`."""
    with opened(settings.code) as stage:
        life = Life(stage, count, settings)
        chosen = ((life.latency, latency), (life.restart, restart), (life.finish, finish))
        for phase in (life.create, *(phase for phase, is_wanted in chosen if is_wanted), life.memory):
            before = set(life.figures)
            phase()
            # whoever has no patience for the rest keeps what is known
            say(", ".join(f"{name} {value}" for name, value in life.figures.items() if name not in before))
        return life.figures


SETTLED_SECONDS: Final = 12.0
"""After which all that was known has been written: numbers wait for up to ten seconds."""


def quiet_requests(stage: Stage, seconds: float) -> list[Request]:
    """What the operator asks in so many seconds, but for watches, which wait, and the Lease, which is a sign of life."""
    time.sleep(SETTLED_SECONDS)
    list(stage.audit.read())
    time.sleep(seconds)
    return [it for it in stage.audit.read() if it.user == OPERATOR and it.verb != "watch" and it.what != "leases"]


def idle(count: int, settings: Settings, seconds: float = 60.0) -> Figures:
    """So many running jobs, first with a new step each second, then with nothing new but signs of life.

    `progress_seconds`: between two status writes of a running job, by its number of writes in a minute; `reads_per_reconcile` in that
    minute; `idle_requests` of the minute without news, as `quiet_requests` counts; `idle_cpu_percent` of one core.
    """
    with opened(settings.code) as stage:
        life = Life(stage, count, settings)
        life.create()
        stage.simulator.order(moving=True)
        time.sleep(12)
        list(stage.audit.read())
        before = life.operator.reconciles()
        time.sleep(seconds)
        requests = [it for it in stage.audit.read() if it.user == OPERATOR and it.what != "leases"]
        reconciles = life.operator.reconciles() - before
        progress = sum(it.what == "finetunejobs/status" for it in requests)
        reads = sum(it.verb in ("get", "list") for it in requests)
        stage.simulator.order(moving=False)
        time.sleep(15)
        used = life.operator.usage().cpu_seconds
        quiet = quiet_requests(stage, seconds)
        return {
            "progress_seconds": seconds * count / progress if progress else 0.0,
            "reads_per_reconcile": reads / max(1.0, reconciles),
            "idle_requests": float(len(quiet)),
            "idle_cpu_percent": 100 * (life.operator.usage().cpu_seconds - used) / seconds,
        }


def deployments(count: int, settings: Settings) -> Figures:
    """`writes_per_deployment`, `seconds` until all are Ready, `rss_mib`, `cpu_seconds`: ModelDeployments of one replica."""
    with opened(settings.code) as stage:
        operator = settings.operator(stage)
        observer = stage.observer({MODELDEPLOYMENTS: status_marks})
        stage.audit.skip()
        names = [f"model-{number:05d}" for number in range(count)]
        load = stage.kubeconfig("load", inside=False)
        begun, _ = create_all(load, [[deployment(name, NAMESPACE)] for name in names], settings.qps)
        ended = observer.wait("good", set(names), 120.0 + 25 * count / settings.qps, say)
        time.sleep(3)
        found = writes(stage.audit.read(), OPERATOR)
        used = operator.usage()
        return {
            "writes_per_deployment": found.total() / count,
            "writes": {what: round(number / count, 3) for what, number in found.most_common()},
            "seconds": ended - begun,
            "rss_mib": used.peak_mib,
            "cpu_seconds": used.cpu_seconds,
        }


# --- start-up ---


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A work tree of that commit in a temporary folder."""
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = Path(scratch) / "before"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(folder)], check=True)


def start_cpu(stage: Stage, code: Path, runs: int) -> Figures:
    """`cpu` seconds that a start takes until all that is there is reconciled and nothing happens any more; `rss` by then."""
    # nobody is polled meanwhile
    settings = {"TUNESMITH_POLL_INTERVAL_SECONDS": "3600"}
    found = []
    for _ in range(runs):
        operator = stage.operator(code, 1000.0, **settings)
        took = operator.settle(300)
        used = operator.kill()
        found.append((used.cpu_seconds, used.peak_mib, took))
        say(f"a start took {used.cpu_seconds:.2f} s of CPU, {took:.1f} s, {used.peak_mib:.0f} MiB")
    return {"cpu": median([it[0] for it in found]), "rss": median([it[1] for it in found])}


def start_costs(code: Path, sizes: list[int], runs: int) -> dict[int, float]:
    """CPU seconds of a start by the number of objects that are there, beyond those of a start with none.

    The objects are those of live jobs, each made by the same operator.
    """
    found = {}
    with opened(code) as stage:
        stage.simulator.order(run_seconds=-1, addresses=False)
        empty = start_cpu(stage, code, runs)["cpu"]
        observer = stage.observer({JOBS: job_marks})
        load = stage.kubeconfig("load", inside=False)
        names: list[str] = []
        for size in sizes:
            more = [f"job-{number:05d}" for number in range(len(names), size // OBJECTS_PER_JOB)]
            names += more
            operator = stage.operator(code, 1000.0)
            create_all(load, [[job(name, NAMESPACE)] for name in more], 100.0)
            observer.wait("job", {f"{name}-1" for name in names}, 300, say)
            operator.settle(300)
            operator.kill()
            found[size] = start_cpu(stage, code, runs)["cpu"] - empty
            say(f"{size} objects: {found[size]:.2f} s of CPU, beside {empty:.2f} s without any")
    return found


def startup(settings: Settings, objects: int = 2100) -> Figures:
    """`startup_cpu_vs_before`: CPU seconds to index that many objects of live jobs, against an earlier commit's.

    `startup_cpu_growth`: what twice as many cost, against that many.
    """
    ours = start_costs(settings.code, [objects, 2 * objects], settings.runs)
    figures: Figures = {"startup_cpu_seconds": ours[objects], "startup_cpu_growth": ours[2 * objects] / ours[objects]}
    if settings.before:
        with checkout(settings.before) as folder:
            theirs = start_costs(folder, [objects], 1)
        figures |= {
            "startup_cpu_seconds_before": theirs[objects],
            "startup_cpu_vs_before": ours[objects] / theirs[objects],
        }
    return figures
