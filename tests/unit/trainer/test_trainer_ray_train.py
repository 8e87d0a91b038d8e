"""What `ray_train` leans on inside Ray Train, and when it starts the group anew."""

import inspect

import pytest

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_store.errors import Retryable, UserError
from tunesmith_trainer.errors import Interrupted, SmallerMicroBatch

ray = pytest.importorskip("ray")
from ray.exceptions import ActorDiedError  # noqa: E402
from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: E402
from ray.train.v2._internal.exceptions import (  # noqa: E402
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.controller import TrainController  # noqa: E402
from ray.train.v2._internal.execution.failure_handling import FailureDecision  # noqa: E402
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group  # noqa: E402
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer  # noqa: E402
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError  # noqa: E402

from tunesmith_trainer.group.handover import ProcessLost  # noqa: E402
from tunesmith_trainer.group.trainer import InProcessTrainer, RestartPolicy, cause_of  # noqa: E402


def test_this_ray_has_the_hooks():
    assert list(inspect.signature(WorkerGroup._init_train_context_on_workers).parameters) == [
        "self", "workers", "sync_actor", "train_context_args",
    ]  # fmt: skip
    assert isinstance(vars(WorkerGroup)["_get_worker_runtime_env"], staticmethod)
    assert list(inspect.signature(WorkerGroup._get_worker_runtime_env).parameters) == ["custom_runtime_env"]
    assert "_initialize_and_run_controller" in vars(DataParallelTrainer)
    assert "_create_default_callbacks" in vars(DataParallelTrainer)
    assert TrainController.worker_group_cls is WorkerGroup
    assert {"failure_policy", "scaling_policy"} <= set(inspect.signature(TrainController.__init__).parameters)
    assert "SynchronizationActor.options(" in inspect.getsource(worker_group)
    assert "_shutdown_sync_actor(" in inspect.getsource(state.WorkerGroupState.shutdown)


def test_only_what_is_used_is_called_back(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_METRICS_ENABLED", "0")
    trainer = InProcessTrainer(
        print,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="x", storage_path=str(tmp_path)),
        restarted=lambda number, cause, reason: None,
    )
    names = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert "BackendSetupCallback" in names
    assert not names & {"PlacementGroupCleanerCallback", "DatasetsCallback", "ControllerMetricsCallback"}


def group_error(*failures):
    wrapped = [
        UserExceptionWithTraceback(error, "trace") if not isinstance(error, ActorDiedError) else error
        for error in failures
    ]
    return WorkerGroupError("failed", dict(enumerate(wrapped)))


USER = UserError(Reason.OUT_OF_MEMORY, "too big", ExitCode.OUT_OF_MEMORY)
LOST = Retryable("lost contact with another worker")
DIED = ActorDiedError()
GONE = ProcessLost("a training process ended unexpectedly")
BUG = KeyError("oops")
STOP = Interrupted(None)
TIGHT = SmallerMicroBatch("a worker ran out of GPU memory with a micro-batch of 8: going on with 4")


@pytest.mark.parametrize(
    ("failures", "cause", "decision"),
    [
        ([LOST, USER], USER, FailureDecision.RAISE),
        ([DIED, USER], USER, FailureDecision.RAISE),
        ([LOST, DIED], DIED, FailureDecision.RETRY),
        ([LOST, GONE], GONE, FailureDecision.RETRY),
        ([BUG, GONE], GONE, FailureDecision.RETRY),
        ([BUG, DIED], DIED, FailureDecision.RETRY),
        ([LOST, BUG], BUG, FailureDecision.RAISE),
        ([LOST, LOST], LOST, FailureDecision.RETRY),
        ([LOST, STOP], STOP, FailureDecision.RETRY),
        ([DIED, TIGHT], TIGHT, FailureDecision.RETRY),
        ([TIGHT, USER], USER, FailureDecision.RAISE),
    ],
)
def test_the_failure_that_explains_most_decides(failures, cause, decision):
    error = group_error(*failures)
    assert cause_of(error) is cause
    assert RestartPolicy(FailureConfig(max_failures=1), lambda *_: None).make_decision(error) is decision


def test_restarts_are_bounded_but_interruptions_and_smaller_micro_batches_do_not_count():
    told = []
    policy = RestartPolicy(FailureConfig(max_failures=2), lambda *told_of: told.append(told_of))
    decisions = [policy.make_decision(group_error(error)) for error in (DIED, STOP, TIGHT, STOP, LOST, DIED)]
    assert decisions == [FailureDecision.RETRY] * 5 + [FailureDecision.RAISE]
    assert [number for number, _, _ in told] == [1, 2, 3, 4, 5]
    assert told[1][2] is Reason.INTERRUPTED
    assert told[0][2] is None


def test_a_group_that_waits_for_a_pod_is_tried_on_and_on():
    policy = RestartPolicy(FailureConfig(max_failures=0), lambda *_: None)
    waiting = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert {policy.make_decision(waiting) for _ in range(50)} == {FailureDecision.RETRY}
    assert policy.make_decision(ControllerError(KeyError("a bug in Ray"))) is FailureDecision.RAISE
