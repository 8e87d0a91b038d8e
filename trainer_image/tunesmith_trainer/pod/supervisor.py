"""The first process of every trainer pod: starts Ray and the training process, watches them, and has the last word.

On pod 0 it also runs the driver, serves progress, and is the rendezvous: its /healthz names Ray's address and an
incarnation that changes whenever Ray is started anew, so that the other pods rejoin at once. Crashed parts are
restarted inside the living pod. SIGTERM becomes a saved checkpoint. Nothing heavy is imported here: it is up long
before the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import CheckpointRef, Outcome, ProgressReport, TerminationReport, TrainerState
from tunesmith_store.memory import memory_limit, oom_kills
from tunesmith_trainer.pod.environment import PodEnvironment
from tunesmith_trainer.pod.processes import Children, SignalPause
from tunesmith_trainer.pod.progress import ProgressUpdate
from tunesmith_trainer.pod.ray_node import RayNode, child_environment, own_gpu
from tunesmith_trainer.pod.status_server import ProgressBoard, StatusServer

__all__ = ["Supervisor", "completed_from", "main", "write_termination"]

# a process that ends wakes the supervisor at once; what it only finds by looking is awaited at the start
STARTING_TICK_SECONDS, RUNNING_TICK_SECONDS = 0.1, 1.0
# every other pod asks the head: soon at the start, seldom once it has joined, since there may be hundreds
JOINING_POLL_SECONDS, JOINED_POLL_SECONDS = 0.5, 1.0
TRAINING_PAUSE_SECONDS = 5.0  # at least from one start of a training process to the next
TRAINED_PAUSE_SECONDS = 10.0
STOP_GRACE_SECONDS = 50.0  # of the pod's 60
RESTART_PAUSE_SECONDS = (0.5, 10.0)


def say(text: str) -> None:
    """Print for people who read `kubectl logs`."""
    print(text, flush=True)


@dataclass
class _Started:
    """A training process of this pod."""

    pid: int
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None


class Supervisor:
    """One pod. `run()` returns its exit code."""

    def __init__(self, pod: PodEnvironment, plan: TrainingPlan) -> None:
        self.pod, self.plan = pod, plan
        self.children = Children()
        self.board = ProgressBoard(plan.attempt, echo=say)
        self.server = StatusServer(self.board, pod.token, self._health, pod.progress_port, pod.listen_ip)
        self.stopping = False
        self.node: RayNode | None = None
        self.driver: int | None = None
        self.training: dict[int, _Started] = {}
        self.incarnation = ""
        self.restarts = 0
        self.killed_for_memory = oom_kills()
        self._head_polled = 0.0
        self._not_before = 0.0

    # ---- the face of this pod

    def _health(self) -> tuple[bool, dict[str, Any]]:
        node = self.node
        up = self.pod.ray_file.exists() and node is not None
        return up, {"incarnation": self.incarnation, "address": node.address if node else "", "ready": up}

    def _ask_head(self) -> dict[str, Any]:
        """Return the head's health, also while its Ray isn't up; {} while it can't be reached."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        url = f"http://{self.plan.head_host}:{keys.PORT_PROGRESS}{keys.PATH_HEALTH}"
        try:
            try:
                answer = opener.open(url, timeout=2)
            except urllib.error.HTTPError as not_ready:
                answer = not_ready
            with answer:
                facts = json.load(answer)
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    # ---- life

    def run(self) -> int:
        """Supervise until the job has ended, can't go on here, or the pod is told to stop."""
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        pause = SignalPause()
        pod = self.pod
        for path in (pod.stop_file, pod.ray_file, pod.result_file, pod.retry_file, pod.interrupted_file):
            path.unlink(missing_ok=True)  # of the container's own earlier life, where it was restarted in place
        shutil.rmtree(self.pod.ranks_folder, ignore_errors=True)
        self.server.start()
        say(f"tunesmith trainer: {self.plan.namespace}/{self.plan.name} attempt {self.plan.attempt}, {self._place()}")
        try:
            while True:
                self.children.reap()
                if self.stopping:
                    return self._stop()
                code = self._out_of_memory()
                if code is None:
                    code = self._tend_head() if self.pod.is_head else self._tend_worker()
                if code is not None:
                    return code
                self._tend_training()
                pause.wait(RUNNING_TICK_SECONDS if self._is_running else STARTING_TICK_SECONDS)
        finally:
            self.children.kill_all()
            self.server.close()

    def _place(self) -> str:
        processes, plan = self.pod.processes, self.plan
        if processes > plan.processes_per_worker:
            return "all workers here"
        several = f", with {processes} processes" if processes > 1 else ""
        return f"worker {self.pod.index} of {plan.replicas}{several}"

    def _on_stop(self, *_: object) -> None:
        self.stopping = True

    @property
    def _is_running(self) -> bool:
        """Whether all that this pod has to start has been started."""
        return self.pod.ray_file.exists() and (self.driver is not None or not self.pod.is_head)

    def _tend_head(self) -> int | None:
        """Keep Ray and the driver running; return the exit code once the driver has a result."""
        if not self.incarnation:
            self._start_ray(f"{self.pod.ip}:{self.pod.gcs_port}", uuid.uuid4().hex)
        if self.driver is None:
            if time.monotonic() >= self._not_before:
                self.driver = self.children.spawn(
                    [sys.executable, "-m", "tunesmith_trainer.group.driver", str(self.restarts)],
                    child_environment(self.pod),
                )
        elif (code := self.children.exit_code(self.driver)) is not None:
            if self.pod.result_file.exists():
                return self._end(TerminationReport.from_json(self.pod.result_file.read_bytes()), code)
            self.driver = None
            return self._count_restart(f"the driver ended unexpectedly ({_how(code)})", self._cause())
        return self._tend_ray()

    def _tend_worker(self) -> int | None:
        """Follow the head: join its Ray, and join anew whenever the head has started a new one."""
        self._prepare_ray()
        pause = JOINED_POLL_SECONDS if self._is_running else JOINING_POLL_SECONDS
        if time.monotonic() - self._head_polled >= pause:
            self._head_polled = time.monotonic()
            facts = self._ask_head()
            if self.incarnation and facts.get("incarnation", self.incarnation) != self.incarnation:
                # before the new one listens: this pod's raylet would register there, and training begin with it
                say("the head starts Ray anew: joining it")
                self._stop_ray()
            if facts.get("ready") and not self.incarnation:
                self._start_ray(str(facts["address"]), str(facts["incarnation"]))
        return self._tend_ray()

    def _tend_training(self) -> None:
        """Keep training processes at hand: they import and fetch while Ray starts, and wait for Ray Train."""
        for number in range(self.pod.processes):
            started = self.training.get(number)
            if started is None or self._needs_successor(started):
                environment = child_environment(self.pod)
                if self.plan.gpus_per_worker:
                    environment |= own_gpu(number, environment)
                command = [sys.executable, "-m", "tunesmith_trainer.group.training_process", str(number)]
                log = self.pod.training_log(number)
                self.training[number] = _Started(self.children.spawn(command, environment, log))

    def _needs_successor(self, process: _Started) -> bool:
        code = self.children.exit_code(process.pid)
        if code is None:
            return False
        now = time.monotonic()
        process.ended = process.ended or now
        # after one that has trained to its end comes another only if a peer has failed at the very last
        pause = 0.0 if code else TRAINED_PAUSE_SECONDS
        return now >= max(process.ended + pause, process.began + TRAINING_PAUSE_SECONDS)

    # ---- Ray in this pod

    def _prepare_ray(self) -> RayNode | None:
        """Return the node that is or will be started here; None in the pause after a failure."""
        if self.node is None and time.monotonic() >= self._not_before:
            shutil.rmtree(self.pod.scratch / "ray", ignore_errors=True)
            self.node = RayNode(self.pod, self.plan, self.children)
        return self.node

    def _start_ray(self, address: str, incarnation: str) -> None:
        if (node := self._prepare_ray()) is not None:
            self.incarnation = incarnation
            node.start(address)

    def _stop_ray(self) -> None:
        """End Ray and with it everything that runs in this pod: nothing of it survives without Ray."""
        self.pod.ray_file.unlink(missing_ok=True)
        self.children.kill_all()
        self.node = self.driver = None
        self.training = {}
        self.incarnation = ""

    def _tend_ray(self) -> int | None:
        """Announce Ray once it is up; start it anew once it is lost."""
        node = self.node
        if node is None:
            return None
        if node.is_lost():
            reason = (
                f"Ray ended in this pod\n{node.log_tail()}" if not node.is_up() else "a Ray process of this pod ended"
            )
            self._stop_ray()
            return self._count_restart(reason)
        if not self.pod.ray_file.exists() and node.is_up():
            self.pod.ray_file.write_text(node.address)
            self.board.apply(ProgressUpdate(phases=("rayStarted",)))
        return None

    def _cause(self) -> TerminationReport | None:
        """Return what the driver that has just ended says that it lacked."""
        if not self.pod.retry_file.exists():
            return None
        cause = TerminationReport.from_json(self.pod.retry_file.read_bytes())
        self.pod.retry_file.unlink()
        return cause

    def _count_restart(self, text: str, cause: TerminationReport | None = None) -> int | None:
        """Allow another start after a pause that grows, up to maxRestarts; else return the exit code."""
        reason = Reason.WORKER_CRASHED
        if cause is not None:
            text, reason = cause.message, cause.reason
        self.restarts = max(self.restarts, self.board.report.restarts) + 1
        say(f"{text}; restart {self.restarts} of at most {self.plan.max_restarts}")
        if self.restarts > self.plan.max_restarts:
            message = f"{text}; gave up after maxRestarts ({self.plan.max_restarts}) restarts in this pod"
            report = TerminationReport(outcome=Outcome.FAILED, reason=reason, message=message)
            return self._end(report, ExitCode.CRASHED)
        shortest, longest = RESTART_PAUSE_SECONDS
        self._not_before = time.monotonic() + min(longest, shortest * 2 ** (self.restarts - 1))
        known = cause.reason if cause is not None else None
        update = ProgressUpdate(state=TrainerState.STARTING, message=text, reason=known, restarts=self.restarts)
        self.board.apply(update)
        return None

    # ---- the end

    def _out_of_memory(self) -> int | None:
        if oom_kills() <= self.killed_for_memory:
            return None
        training, processes = self.plan.training, self.pod.processes
        shared = f", which {processes} training processes share" if processes > 1 else ""
        message = (
            f"the kernel killed a process of worker {self.pod.index} at the memory limit of {memory_limit()}{shared}; "
            "raise spec.workers.resources.memory, or lower spec.training.microBatchSize "
            f"({training.micro_batch_size}) or maxLength ({training.max_length})"
        )
        report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.OUT_OF_MEMORY, message=message)
        return self._end(report, ExitCode.OUT_OF_MEMORY)

    def _live_ranks(self) -> list[int]:
        folder = self.pod.ranks_folder
        pids = [int(path.name) for path in folder.iterdir()] if folder.is_dir() else []
        return [pid for pid in pids if self.children.is_alive(pid)]

    def _saved_or_finished(self) -> bool:
        return self.pod.interrupted_file.exists() or self.pod.result_file.exists()

    def _finished(self) -> TerminationReport | None:
        """Return the driver's result if the job has succeeded; a failure would come again in the next pod."""
        if not self.pod.result_file.exists():
            return None
        report = TerminationReport.from_json(self.pod.result_file.read_bytes())
        return report if report.outcome is Outcome.SUCCEEDED else None

    def _stop(self) -> int:
        """SIGTERM: let the training processes of this pod save a checkpoint, then end."""
        ranks = self._live_ranks()
        if ranks:
            say("told to stop: saving a checkpoint first")
            self.pod.stop_file.touch()
        deadline = time.monotonic() + STOP_GRACE_SECONDS
        while ranks and time.monotonic() < deadline and not self._saved_or_finished():
            time.sleep(STARTING_TICK_SECONDS)
            ranks = self._live_ranks()
        if (finished := self._finished()) is not None:
            return self._end(finished, ExitCode.SUCCESS)
        saved = self.pod.interrupted_file.read_text() if self.pod.interrupted_file.exists() else ""
        checkpoint = CheckpointRef.from_json(saved) if saved else None
        text = f"told to stop; saved step {checkpoint.step}" if checkpoint else "told to stop"
        report = TerminationReport(
            outcome=Outcome.INTERRUPTED,
            reason=Reason.INTERRUPTED,
            message=text,
            checkpoint=checkpoint,
            global_step=checkpoint.step if checkpoint else 0,
        )
        return self._end(report, ExitCode.INTERRUPTED)

    def _end(self, report: TerminationReport, code: int) -> int:
        report = report.model_copy(update={"attempt": self.plan.attempt})
        report = completed_from(report, self.board.report, self.restarts)
        write_termination(self.pod.termination_log, report)
        say(f"{report.outcome}: {report.message or report.reason}")
        return code


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def completed_from(report: TerminationReport, progress: ProgressReport, restarts: int) -> TerminationReport:
    """Fill in what the process that ended could not tell, from the last progress it made."""
    return report.model_copy(
        update={
            "global_step": report.global_step or progress.global_step,
            "max_steps": report.max_steps or progress.max_steps,
            "restarts": max(report.restarts, progress.restarts, restarts),
            "checkpoint": report.checkpoint or progress.checkpoint,
            "dataset": report.dataset or progress.dataset,
            "phase_seconds": report.phase_seconds or progress.phase_seconds,
        }
    )


def write_termination(path: Path, report: TerminationReport) -> None:
    """Write the report, cut to what the kubelet keeps."""
    path.write_text(report.to_bounded_json())


def main() -> int:
    """Run the supervisor of this pod."""
    pod = PodEnvironment.read()
    try:
        plan = pod.plan()
    except ValueError as error:
        message = f"the plan is of another version of Tunesmith: trainer image and operator must match ({error})"
        report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.INVALID_SPEC, message=message)
        write_termination(pod.termination_log, report)
        say(message)
        return ExitCode.INVALID_INPUT
    os.makedirs(pod.scratch, exist_ok=True)
    return Supervisor(pod, plan).run()
