"""Ray Train with less around it: the controller in the driver's own process, and restarts only where they help.

Used by `driver` alone. Ray Train's TorchTrainer runs its controller as one more actor, has another actor clean up
placement groups and imports torch in the driver; each of these is a Python process that imports everything, seconds
of CPU at every start. Here the controller lives and dies with the driver (whose death frees its placement group), so
neither is needed. This leans on hooks inside Ray Train V2; `tests/unit/trainer/test_trainer_ray_hooks.py` says
whether a new Ray still has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import RayTrainError, UserExceptionWithTraceback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from tunesmith_store.errors import Failure, Retryable, UserError
from tunesmith_trainer.errors import Interrupted

__all__ = ["InProcessTrainer", "RestartPolicy", "cause_of"]


def _unwrapped(error: BaseException) -> BaseException:
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else error


def cause_of(error: BaseException) -> BaseException:
    """Return the failure behind Ray Train's error that says most.

    That is a user's error before any other, then an interruption, then a lost process (which explains whatever its
    peers ran into), then a bug, and lost connections last.
    """
    if isinstance(error, ControllerError):
        return error.controller_failure
    if not isinstance(error, WorkerGroupError):
        return error

    def rank(failure: BaseException) -> int:
        kinds: list[type[BaseException]] = [UserError, Interrupted, RayActorError, RayTrainError]
        known = next((number for number, kind in enumerate(kinds) if isinstance(failure, kind)), len(kinds))
        return known + isinstance(failure, Retryable)

    return min((_unwrapped(failure) for failure in error.worker_failures.values()), key=rank)


class RestartPolicy(FailurePolicy):
    """Restart the group where that helps.

    After a lost process, peer or store, a bounded number of times; after an interruption without counting it. A user's
    error or a bug would only come again: end.
    """

    def __init__(self, config: FailureConfig, restarted: Callable[[int, str], None]) -> None:
        """`restarted` is told the number of restarts so far and the cause."""
        super().__init__(config)
        self._counted = 0
        self._all = 0
        self._restarted = restarted

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Decide about one failure of the group or of its start."""
        cause = cause_of(training_failed_error)
        if isinstance(training_failed_error, ControllerError):
            # the group couldn't be placed or started, for example since a pod is being replaced: Kubernetes bounds that
            return FailureDecision.RETRY if isinstance(cause, RayTrainError | RayError) else FailureDecision.RAISE
        if not isinstance(cause, Interrupted | Retryable | RayActorError | RayTrainError):
            return FailureDecision.RAISE
        if not isinstance(cause, Interrupted):
            self._counted += 1
            if 0 <= self.failure_config.max_failures < self._counted:
                return FailureDecision.RAISE
        self._all += 1
        text = cause.message if isinstance(cause, Failure) else f"a worker process was lost ({type(cause).__name__})"
        self._restarted(self._all, text)
        return FailureDecision.RETRY


class _WorkerGroup(WorkerGroup):
    def _init_train_context_on_workers(
        self, workers: Any, sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        # as in the base class, but there is no controller actor that a worker could call (only report() would)
        tasks = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(tasks)


class _Controller(TrainController):
    worker_group_cls = _WorkerGroup


class InProcessTrainer(DataParallelTrainer):
    """A DataParallelTrainer whose controller runs in this process. `fit()` blocks; call it from the main thread."""

    def __init__(self, *args: Any, restarted: Callable[[int, str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._restarted = restarted

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["failure_policy"] = RestartPolicy(self.run_config.failure_config, self._restarted)

        async def run() -> Any:
            controller = _Controller(**kwargs)
            await controller.run()
            return controller.get_result()

        return asyncio.run(run())
