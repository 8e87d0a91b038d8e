"""The run's numbers for TensorBoard and MLflow, as `spec.tracking` asks. Opened by `run` on rank 0 alone.

A tracker never stops training and never holds it up: TensorBoard writes a local file, that `export` uploads beside the
model; MLflow is talked to by a thread of its own, whose queue is bounded. What goes wrong is told once, in the log.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.finetunejob import MlflowTracking
from tunesmith_trainer.report.settings import settings_of

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["MlflowSink", "TensorBoardSink", "Tracker"]

Log = Callable[[str], None]

TRAINING, EVALUATION, FINAL = "train/", "eval/", "final/"
QUEUE_SIZE = 20_000
"""Steps that wait for MLflow; the oldest are dropped."""
BATCH_METRICS, BATCH_PARAMS = 1000, 100
"""MLflow's own limits of one request."""
PARAM_LENGTH = 6000
REFUSED = "INVALID_PARAMETER_VALUE"
"""What MLflow says of a request that it will never take: trying again would block what waits behind it."""
INTERVAL_SECONDS = 2.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 60.0
FINISH_SECONDS, PAUSE_SECONDS = 30.0, 5.0
FINISH_TRIES = 3


@dataclass(frozen=True)
class _Point:
    step: int
    time_ms: int
    values: Mapping[str, float]


class _Sink(Protocol):
    """One place where numbers go."""

    def write(self, point: _Point) -> None: ...
    def rewind(self, points: Iterable[_Point]) -> None: ...
    def pause(self) -> None: ...
    def finish(self, final: _Point, report: Path | None, failed: bool) -> None: ...


class Tracker:
    """All trackers of a run."""

    def __init__(self, sinks: Sequence[_Sink] = ()) -> None:
        self._sinks = sinks
        self._step = 0

    @classmethod
    def silent(cls) -> Tracker:
        """Return the tracker of all ranks but 0."""
        return cls()

    @classmethod
    def open(cls, plan: TrainingPlan, folder: Path, run_digest: str, log: Log) -> Tracker:
        """Open what the plan asks for.

        Args:
            plan: its `tracking` decides.
            folder: for TensorBoard's event files; made, and emptied, where they are asked for.
            run_digest: digest of plan and inputs, kept as a tag.
            log: takes lines for people; called from another thread too.
        """
        sinks: list[_Sink] = []
        if plan.tracking.tensor_board:
            sinks.append(TensorBoardSink(folder, settings_of(plan), log))
        if plan.tracking.mlflow is not None:
            sinks.append(MlflowSink(plan.tracking.mlflow, plan, run_digest, log))
        return cls(sinks)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of an optimizer step, by their names."""
        self._write(step, {TRAINING + name: value for name, value in values.items()})

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record an evaluation on held-out data."""
        self._write(step, {EVALUATION + name: value for name, value in metrics.items()})

    def rewind(self, history: Iterable[Mapping[str, float]], evaluations: Iterable[Mapping[str, float]]) -> None:
        """Training goes on from a checkpoint, in this process or after another: these are the steps behind it.

        TensorBoard's files are written anew with them, so that its curves neither double back nor begin in the middle.
        MLflow keeps what it has.

        Args:
            history: flat records: `step`, and numbers by name.
            evaluations: the same of evaluations.
        """
        points = [_flat(record, TRAINING) for record in history] + [_flat(record, EVALUATION) for record in evaluations]
        points.sort(key=lambda point: point.step)
        for sink in self._sinks:
            sink.rewind(points)

    def pause(self) -> None:
        """Hand over what is queued before this process ends; another goes on with the run. Takes a few seconds."""
        for sink in self._sinks:
            sink.pause()

    def finish(self, metrics: Mapping[str, float], report: Path | None = None, failed: bool = False) -> None:
        """Record the final metrics, hand over the report where the tracker keeps files, and close.

        Takes at most FINISH_SECONDS.
        """
        final = _Point(self._step, _now(), metrics)
        for sink in self._sinks:
            sink.finish(final, report, failed)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        self._step = max(self._step, step)
        point = _Point(step, _now(), values)
        for sink in self._sinks:
            sink.write(point)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _flat(record: Mapping[str, float], prefix: str) -> _Point:
    values = {prefix + name: value for name, value in record.items() if name != "step" and _is_number(value)}
    return _Point(int(record["step"]), _now(), values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- TensorBoard


class TensorBoardSink:
    """Event files in a local folder."""

    def __init__(self, folder: Path, settings: Mapping[str, str], log: Log) -> None:
        self._folder, self._settings, self._log = folder, settings, log
        self._writer: SummaryWriter | None = None
        with self._told():
            self._writer = self._open()

    def write(self, point: _Point) -> None:
        """Add the values of a step."""
        if self._writer is not None:
            with self._told():
                self._add(point.step, point.time_ms, point.values)

    def rewind(self, points: Iterable[_Point]) -> None:
        """Begin anew with these."""
        if self._writer is not None:
            with self._told():
                self._writer.close()
                self._writer = self._open()
                for point in points:
                    self._add(point.step, point.time_ms, point.values)

    def pause(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            with self._told():
                self._writer.flush()

    def finish(self, final: _Point, report: Path | None, failed: bool) -> None:
        """Add the final metrics and close the files."""
        if self._writer is not None:
            with self._told():
                self._add(final.step, final.time_ms, {FINAL + name: value for name, value in final.values.items()})
                self._writer.close()
        self._writer = None

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(self._folder, ignore_errors=True)
        writer = SummaryWriter(str(self._folder), flush_secs=30)
        rows = "\n".join(f"| {name} | {value} |" for name, value in self._settings.items())
        writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")
        return writer

    def _add(self, step: int, time_ms: int, values: Mapping[str, float]) -> None:
        assert self._writer is not None
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time_ms / 1000)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Where the disk won't have it, say so and write no more."""
        try:
            yield
        except OSError as error:
            self._writer = None
            self._log(f"warning: TensorBoard's events can't be written any more: {error}")


# ---- MLflow


class MlflowSink:
    """A run on an MLflow server, written by a thread of its own.

    The run is found again by the job's uid and attempt, so that a restarted trainer goes on with it.
    """

    def __init__(self, settings: MlflowTracking, plan: TrainingPlan, run_digest: str, log: Log) -> None:
        self._settings, self._plan, self._digest, self._log = settings, plan, run_digest, log
        self._waiting: deque[_Point] = deque()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._report: Path | None = None
        self._status: str | None = None
        """What the run ends with; None: it goes on after this process."""
        self._lost = self._sending = 0
        self._warned = False
        self._client: MlflowClient | None = None
        self._run_id = ""
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, point: _Point) -> None:
        """Queue the values of a step; returns at once."""
        with self._lock:
            self._waiting.append(point)
            self._shorten()

    def rewind(self, points: Iterable[_Point]) -> None:
        """Keep what there is: the server has the earlier steps already."""

    def pause(self) -> None:
        """Send what is queued; the run stays open."""
        self._stop(PAUSE_SECONDS)

    def finish(self, final: _Point, report: Path | None, failed: bool) -> None:
        """Send what is queued, the final metrics and the report, and end the run. Gives up after FINISH_SECONDS."""
        self.write(final)
        self._report, self._status = report, "FAILED" if failed else "FINISHED"
        self._stop(FINISH_SECONDS)

    def _stop(self, seconds: float) -> None:
        self._ending.set()
        self._thread.join(seconds)
        with self._lock:
            lost = self._lost + self._sending + len(self._waiting)
        if lost or self._thread.is_alive():
            records = f"{lost} record{'' if lost == 1 else 's'}"
            report = " and the report" if self._report is not None else ""
            self._log(f"warning: MLflow at {self._settings.tracking_uri} lacks {records}{report}")

    def _shorten(self) -> None:
        while len(self._waiting) > QUEUE_SIZE:
            self._waiting.popleft()
            self._lost += 1

    def _work(self) -> None:
        """Send what is queued, again and again, until the end."""
        pause, tries = FIRST_PAUSE_SECONDS, FINISH_TRIES
        while True:
            ending = self._ending.wait(INTERVAL_SECONDS)
            try:
                self._send_waiting()
                if ending:
                    self._end()
                    return
                pause = FIRST_PAUSE_SECONDS
            except Exception as error:  # whatever a server, a proxy or the client may come up with
                self._warn(f"can't be written to: {error}")
                tries -= ending
                if not tries:
                    return
                if ending:
                    time.sleep(1)
                elif not self._ending.wait(pause):
                    pause = min(LONGEST_PAUSE_SECONDS, 2 * pause)

    def _send_waiting(self) -> None:
        client = self._connected()
        from mlflow.exceptions import MlflowException

        while batch := self._take():
            try:
                self._send(client, batch)
            except Exception as error:
                with self._lock:
                    if isinstance(error, MlflowException) and error.error_code == REFUSED:
                        self._lost += len(batch)
                    else:
                        self._waiting.extendleft(reversed(batch))
                        self._shorten()
                raise
            finally:
                self._sending = 0

    def _take(self) -> list[_Point]:
        """Take as many of the first points as fit into one request; at least one, where there is one."""
        taken: list[_Point] = []
        metrics = 0
        with self._lock:
            while self._waiting and (not taken or metrics + len(self._waiting[0].values) <= BATCH_METRICS):
                taken.append(self._waiting.popleft())
                metrics += len(taken[-1].values)
            self._sending = len(taken)
        return taken

    def _send(self, client: MlflowClient, batch: Sequence[_Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), point.time_ms, point.step)
            for point in batch
            for name, value in point.values.items()
        ]
        client.log_batch(self._run_id, metrics=metrics)

    def _connected(self) -> MlflowClient:
        """Return the client, with the run found or made."""
        if self._client is not None:
            return self._client
        settings = self._settings
        _quieten(settings.tracking_uri)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(settings.tracking_uri)
        found = client.get_experiment_by_name(settings.experiment_name)
        experiment = found.experiment_id if found else client.create_experiment(settings.experiment_name)
        tags = {"tunesmith.uid": self._plan.uid, "tunesmith.attempt": str(self._plan.attempt)}
        wanted = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        runs = client.search_runs([experiment], wanted, max_results=1)
        if runs:
            self._run_id = runs[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = self._start(client, experiment, tags)
        self._client = client
        return client

    def _start(self, client: MlflowClient, experiment: str, tags: dict[str, str]) -> str:
        from mlflow.entities import Param

        plan = self._plan
        more = {"tunesmith.job": f"{plan.namespace}/{plan.name}", "tunesmith.digest": self._digest}
        name = plan.name if plan.attempt == 1 else f"{plan.name}-{plan.attempt}"
        run = str(client.create_run(experiment, run_name=name, tags=tags | more).info.run_id)
        params = [Param(key, value[:PARAM_LENGTH]) for key, value in settings_of(plan).items()]
        for start in range(0, len(params), BATCH_PARAMS):
            client.log_batch(run, params=params[start : start + BATCH_PARAMS])
        return run

    def _end(self) -> None:
        if self._status is None:
            return
        client = self._connected()
        if self._report is not None:
            try:
                client.log_artifact(self._run_id, str(self._report))
            except Exception as error:  # a server without a place for files is a server all the same
                self._warn(f"takes no report: {error}")
        client.set_terminated(self._run_id, self._status)

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._log(f"warning: MLflow at {self._settings.tracking_uri} {' '.join(text.split())[:300]}")


def _quieten(uri: str) -> None:
    """Set how MLflow's client behaves, before its first import; what the pod's environment says goes first."""
    wanted = {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # a trainer calls nobody that the user has not named
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }
    if uri.startswith("file:"):
        wanted["MLFLOW_ALLOW_FILE_STORE"] = "true"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
