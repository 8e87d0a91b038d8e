"""Ray Train with less around it: one worker per rank, the driver, and nothing else.

Used by `driver` alone. Around a TorchTrainer Ray Train starts five more actors: its controller, a cleaner of placement
groups, an autoscaling coordinator, a data set manager and a barrier for `report()`; and it imports torch in the driver.
Each is a Python process of 200 MB that imports everything, together 15 to 20 seconds of CPU at every start, on the pod
that trains. Here the controller runs in the driver (whose death frees its placement group), and what nobody uses is
left out. This leans on hooks inside Ray Train V2: `tests/unit/trainer/test_trainer_ray_train.py` says whether a new
Ray still has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import RayTrainError, UserExceptionWithTraceback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from tunesmith_api.keys import Reason
from tunesmith_store.errors import Failure, Retryable, UserError
from tunesmith_trainer.errors import Interrupted, SmallerMicroBatch
from tunesmith_trainer.group.handover import ProcessLost, announce_address, pick_address

__all__ = ["InProcessTrainer", "RestartPolicy", "cause_of"]


def _unwrapped(error: BaseException) -> BaseException:
    return error._base_exc if isinstance(error, UserExceptionWithTraceback) else error


def cause_of(error: BaseException) -> BaseException:
    """Return the failure behind Ray Train's error that says most.

    That is a user's error before any other, then an interruption, then a lack of memory, then a lost process (which
    explains whatever its peers ran into), then a bug, and lost connections last.
    """
    if isinstance(error, ControllerError):
        return error.controller_failure
    if not isinstance(error, WorkerGroupError):
        return error

    def rank(failure: BaseException) -> int:
        kinds = (UserError, Interrupted, SmallerMicroBatch, RayActorError | ProcessLost, RayTrainError)
        known = next((number for number, kind in enumerate(kinds) if isinstance(failure, kind)), None)
        return len(kinds) + isinstance(failure, Retryable) if known is None else known

    return min((_unwrapped(failure) for failure in error.worker_failures.values()), key=rank)


class RestartPolicy(FailurePolicy):
    """Restart the group where that helps.

    After a lost process, peer or store, a bounded number of times; after an interruption without counting it, nor after
    a micro-batch that was too big, which can't go on for ever. A user's error or a bug would only come again: end.
    """

    def __init__(self, config: FailureConfig, restarted: Callable[[int, str, Reason | None], None]) -> None:
        """`restarted` is told the number of restarts so far, the cause, and its reason where it has one."""
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
        if not isinstance(cause, Interrupted | SmallerMicroBatch):
            self._counted += 1
            if 0 <= self.failure_config.max_failures < self._counted:
                return FailureDecision.RAISE
        self._all += 1
        text = cause.message if isinstance(cause, Failure) else f"a worker process was lost ({type(cause).__name__})"
        self._restarted(self._all, text, cause.reason if isinstance(cause, Failure) else None)
        return FailureDecision.RETRY


class _NoBarrier:
    """Stands for the actor behind report() and Ray Train's collectives, which training here does without."""

    @classmethod
    def options(cls, **_: Any) -> _NoBarrier:
        return cls()

    def remote(self, **_: Any) -> _NoBarrier:
        return self


worker_group.SynchronizationActor = _NoBarrier
state._shutdown_sync_actor = lambda barrier: None


class _WorkerGroup(WorkerGroup):
    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        # the variables that Ray Train would pass on are in every pod's environment; without a runtime environment
        # no agent is asked for it, and a worker fits that was started beforehand
        return {}

    def _init_train_context_on_workers(
        self, workers: Any, sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        # as in the base class, but for the two actors that aren't there
        tasks = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=None,
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


class _FixedGroup(ScalingPolicy):
    """The pods are there already: nothing to ask of an autoscaler."""

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.num_workers)

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision:
        config = self.scaling_config
        return ResizeDecision(
            num_workers=config.num_workers, resources_per_worker=config._resources_per_worker_not_none
        )

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        return NoopDecision()

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register nothing."""

    async def before_controller_shutdown(self) -> None:
        """Nothing was registered."""

    def before_controller_abort(self) -> None:
        """Nothing was registered."""


class _Rendezvous(Backend):
    """Tells every rank where rank 0 listens."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        worker_group.execute(announce_address, worker_group.execute_single(0, pick_address))


class _RendezvousConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _Rendezvous


class InProcessTrainer(DataParallelTrainer):
    """A DataParallelTrainer whose controller runs in this process. `fit()` blocks; call it from the main thread."""

    def __init__(self, *args: Any, restarted: Callable[[int, str, Reason | None], None], **kwargs: Any) -> None:
        super().__init__(*args, backend_config=_RendezvousConfig(), **kwargs)
        self._restarted = restarted

    def _create_default_callbacks(self) -> list[Any]:
        unused = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["failure_policy"] = RestartPolicy(self.run_config.failure_config, self._restarted)
        kwargs["scaling_policy"] = _FixedGroup(self.scaling_config)

        async def run() -> Any:
            controller = _Controller(**kwargs)
            await controller.run()
            return controller.get_result()

        return asyncio.run(run())
