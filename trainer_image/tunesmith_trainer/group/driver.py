"""Pod 0's driver: checks the input, has Ray Train run the group, and writes down how it ended.

A child process of `supervisor`: `python -m tunesmith_trainer.group.driver RESTARTS_SO_FAR`. The only module that knows
how Ray Train is configured. No torch here: the driver's memory and start-up count against pod 0.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
import traceback
from typing import Any

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import CheckpointRef, DatasetFacts, ModelRef, Outcome, TerminationReport, TrainerState
from tunesmith_store.errors import Failure, Retryable, UserError, is_disk_full
from tunesmith_store.router import store_of
from tunesmith_trainer.data.contents import Contents
from tunesmith_trainer.errors import Interrupted, OutOfMemory, full_disk
from tunesmith_trainer.group import preflight
from tunesmith_trainer.group.leases import held_leases
from tunesmith_trainer.loop.export import finished_model
from tunesmith_trainer.pod.environment import PodEnvironment
from tunesmith_trainer.pod.progress import ProgressPusher

__all__ = ["main"]

POLL_SECONDS = 0.2


def train_loop_per_worker(config: dict[str, str]) -> dict[str, Any]:
    """Ray Train's entry into a worker of its own."""
    from tunesmith_trainer.group import handover

    return handover.hand_over(config["run_digest"])


def main() -> int:
    """Run the job to its end; return the pod's exit code. CRASHED without a result file asks for another try."""
    logging.basicConfig(level=logging.WARNING)
    pod = PodEnvironment.read()
    plan = pod.plan()
    restarts = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    pusher = ProgressPusher(pod.ip, pod.token, pod.progress_port)
    try:
        report = _run(plan, pod, pusher, restarts)
        code = ExitCode.SUCCESS
    except Retryable as error:
        pusher.close()
        pod.retry_file.write_text(_failed(plan, error).to_json())
        return ExitCode.CRASHED
    except Failure as error:
        report, code = _failed(plan, error), error.exit_code
    except Exception as error:
        if not is_disk_full(error):
            raise
        full = full_disk(pod.scratch, error)
        report, code = _failed(plan, full), full.exit_code
        for name in ("export", "checkpoints", "model"):  # so that the result can be written
            shutil.rmtree(pod.scratch / name, ignore_errors=True)
    if not pod.stop_file.exists() or code == ExitCode.SUCCESS:
        pod.result_file.with_suffix(".new").write_text(report.to_json())
        pod.result_file.with_suffix(".new").rename(pod.result_file)
    pusher.update(
        state=TrainerState.FINISHED if code == ExitCode.SUCCESS else TrainerState.FAILED, message=report.message
    )
    pusher.close()
    return code


def _failed(plan: TrainingPlan, error: Failure) -> TerminationReport:
    return TerminationReport(
        outcome=Outcome.FAILED,
        reason=error.reason,
        message=error.message,
        attempt=plan.attempt,
        memory=error.memory if isinstance(error, OutOfMemory) else None,
    )


def _run(plan: TrainingPlan, pod: PodEnvironment, pusher: ProgressPusher, restarts: int) -> TerminationReport:
    store = store_of(plan)
    pusher.update(state=TrainerState.PREPARING, message="checking data, model and buckets")
    contents = Contents(store, plan.checkpoint_uri)
    run_digest = preflight.check(plan, store, pod.scratch, pusher.log, contents)
    pusher.phase("inputChecked")
    if finished := finished_model(store, plan, run_digest):
        model, metrics = finished
        pusher.log(f"{model.uri} already holds the finished model of this very run: nothing to do")
        steps = int(metrics.get("steps", 0))
        return _succeeded(plan, model, None, metrics, steps, restarts)
    with held_leases(store, plan, run_digest, pusher.log):
        contents.write_down(plan, run_digest)
        result = _fit(plan, pod, pusher, restarts, run_digest)
    checkpoint, model_json = result["checkpoint"], result["model"]
    return _succeeded(
        plan,
        ModelRef.from_json(model_json) if model_json else None,
        CheckpointRef.from_json(checkpoint) if checkpoint else None,
        result["metrics"],
        result["global_step"],
        max(restarts, result["restarts"]),
        DatasetFacts.from_json(result["dataset"]),
    )


def _succeeded(
    plan: TrainingPlan,
    model: ModelRef | None,
    checkpoint: CheckpointRef | None,
    metrics: dict[str, float],
    steps: int,
    restarts: int,
    dataset: DatasetFacts | None = None,
) -> TerminationReport:
    return TerminationReport(
        outcome=Outcome.SUCCEEDED,
        reason=Reason.COMPLETED,
        message=f"trained {steps} steps",
        attempt=plan.attempt,
        global_step=steps,
        max_steps=steps,
        restarts=restarts,
        checkpoint=checkpoint,
        model=model,
        dataset=dataset,
        metrics=metrics,
    )


def _fit(plan: TrainingPlan, pod: PodEnvironment, pusher: ProgressPusher, restarts: int, digest: str) -> dict[str, Any]:
    """Have Ray Train run the group; return rank 0's result.

    Raises:
        UserError: a retry can't help; also for a bug, which would only come again.
        Retryable: Ray or too many workers were lost.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from tunesmith_trainer.group.trainer import InProcessTrainer, cause_of

    pusher.phase("driverImported")
    _connect(plan, pod, pusher)

    def restarted(number: int, cause: str, reason: Reason | None) -> None:
        pusher.log(f"restarting the workers: {cause}")
        message = f"restarting: {cause}"
        pusher.update(restarts=restarts + number, state=TrainerState.STARTING, message=message, reason=reason)

    trainer = InProcessTrainer(
        train_loop_per_worker,
        train_loop_config={"run_digest": digest},
        scaling_config=ScalingConfig(
            num_workers=plan.world_size, use_gpu=plan.gpus_per_worker > 0, resources_per_worker=_worker_resources(plan)
        ),
        # Ray Train's own storage stays empty: checkpoints are ours, and nothing is handed to ray.train.report
        run_config=RunConfig(
            name=f"{plan.name}-{plan.attempt}",
            storage_path=str(pod.scratch / "ray-train"),
            failure_config=FailureConfig(max_failures=max(0, plan.max_restarts - restarts)),
        ),
        restarted=restarted,
    )
    try:
        result = trainer.fit()
    except Exception as error:
        cause = cause_of(error)
        if isinstance(cause, UserError | Interrupted):
            raise cause from error
        lost = f"the training group was lost more than maxRestarts ({plan.max_restarts}) times; the last time: {cause}"
        if isinstance(cause, Retryable):
            raise Failure(cause.reason, lost, cause.exit_code) from error
        if isinstance(cause, ray.exceptions.RayError):
            raise Failure(Reason.WORKER_CRASHED, lost, ExitCode.CRASHED) from error
        details = "".join(traceback.format_exception(cause)).strip()
        pusher.log(str(error), details)
        raise UserError(Reason.WORKER_CRASHED, f"the training code failed: {type(cause).__name__}: {cause}") from error
    return dict(result.return_value)


def _worker_resources(plan: TrainingPlan) -> dict[str, float]:
    """What Ray's worker of one rank takes of its node.

    Every node offers exactly one CPU slot for each of its training processes, whatever its number of cores: so each
    gets as many ranks as it has processes.
    """
    return {"CPU": 1.0, "GPU": 1.0} if plan.gpus_per_worker else {"CPU": 1.0}


def _connect(plan: TrainingPlan, pod: PodEnvironment, pusher: ProgressPusher) -> None:
    """Wait until Ray is up and all pods have joined."""
    import ray

    while not pod.ray_file.exists():
        time.sleep(POLL_SECONDS)
    ray.init(address=pod.ray_file.read_text(), log_to_driver=False, logging_level=logging.WARNING)
    pusher.phase("rayConnected")
    joined = -1
    while joined < plan.replicas:
        # a worker is what has its processes: on a machine that has those of all, there is one node for them
        alive = sum(pod.processes for node in ray.nodes() if node["Alive"]) // plan.processes_per_worker
        if alive != joined:
            joined = alive
            message = "" if joined >= plan.replicas else f"waiting for workers: {joined} of {plan.replicas} have joined"
            pusher.update(workers_joined=joined, message=message)
            pusher.log(f"{joined} of {plan.replicas} workers have joined")
        time.sleep(POLL_SECONDS)
    pusher.phase("workersJoined")


if __name__ == "__main__":
    raise SystemExit(main())
