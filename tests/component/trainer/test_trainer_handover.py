"""A training process of its own and its assignment, without Ray: real process, real training, real store."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from support.plans import dataset
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import StoragePlan
from tunesmith_store.errors import UserError
from tunesmith_trainer.errors import SmallerMicroBatch
from tunesmith_trainer.group import handover
from tunesmith_trainer.group.handover import Assignment, ProcessLost, assign
from tunesmith_trainer.pod.environment import PodEnvironment

ROWS = 1024
PATIENCE = 120
"""Seconds for a process to end in, whatever else the machine does."""
LIMITED = """
import resource, sys
from multiprocessing.connection import Listener
from pathlib import Path

accept = Listener.accept

def limited(listener):
    # the imports are done; what they take differs between builds of torch by hundreds of megabytes
    status = Path("/proc/self/status").read_text()
    most = (int(status.partition("VmData:")[2].split()[0]) << 10) + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return accept(listener)

Listener.accept = limited
from tunesmith_trainer.group import training_process

training_process.main()
"""
"""A training process that may take so many bytes more than it has when it waits for its assignment."""
ALONE = Assignment(rank=0, world_size=1, address="", run_digest="d" * 64)


class Site:
    """A pod's scratch folder and the training process in it."""

    def __init__(self, folder: Path, store, plan) -> None:
        (folder / "scratch").mkdir(parents=True)
        plan = plan.model_copy(
            update={"storage": StoragePlan(endpoint_url=store.endpoint_url), "head_host": "127.0.0.1"}
        )
        (folder / "plan.json").write_text(plan.to_json())
        self.environment = {
            **os.environ,
            **store.environment(),
            keys.ENV_WORKER_INDEX: "0",
            keys.ENV_POD_IP: "127.0.0.1",
            keys.ENV_PLAN: str(folder / "plan.json"),
            keys.ENV_SCRATCH: str(folder / "scratch"),
            keys.ENV_TERMINATION_LOG: str(folder / "termination"),
            keys.ENV_CPU_LIMIT: "1000",
            "HF_HUB_OFFLINE": "1",
        }
        self.pod = PodEnvironment.read(self.environment)
        self.process = self.start()

    def start(self, spare_bytes: int | None = None) -> subprocess.Popen:
        """Start the training process, as the supervisor does, or with little memory; another one once it has ended."""
        command = [sys.executable, "-m", "tunesmith_trainer.group.training_process", "0"]
        if spare_bytes is not None:
            command = [sys.executable, "-c", LIMITED, "0", str(spare_bytes)]
        with self.pod.training_log(0).open("wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        return self.process

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def trains(self) -> bool:
        return self.pod.ranks_folder.is_dir() and any(self.pod.ranks_folder.iterdir())

    def wait_until_it_trains(self) -> None:
        deadline = time.monotonic() + 120
        while not self.trains():
            assert time.monotonic() < deadline, self.pod.training_log(0).read_text()
            time.sleep(0.05)


@pytest.fixture
def site(networks, pod_store):
    folder = Path(tempfile.mkdtemp(prefix="ts", dir="/tmp"))  # a socket's path must be short
    sites = []

    def make(plan) -> Site:
        sites.append(Site(folder / str(len(sites)), pod_store, plan))
        return sites[-1]

    yield make
    for made in sites:
        made.end()
    shutil.rmtree(folder, ignore_errors=True)


def test_an_assignment_is_trained_and_its_result_comes_back(site, job, make_plan, make_training):
    made = site(make_plan(job, training=make_training(max_steps=6)))
    result = assign(made.pod, 0, ALONE)  # comes long before the imports are done
    assert result["global_step"] == 6
    assert result["metrics"]["steps"] == 6
    assert made.process.wait(PATIENCE) == 0


def test_an_error_of_training_is_raised_with_its_message(site, job, make_plan):
    made = site(make_plan(job, model_uri=f"{job}/typo"))
    with pytest.raises(UserError, match=r"spec\.model\.uri") as error:
        assign(made.pod, 0, ALONE)
    assert error.value.reason is Reason.MODEL_NOT_FOUND
    assert made.process.wait(PATIENCE) == 1


def test_a_killed_training_process_is_a_lost_one(site, job, make_plan, make_training):
    made = site(make_plan(job, training=make_training(max_steps=100_000)))

    def kill() -> None:
        made.wait_until_it_trains()
        made.process.send_signal(signal.SIGKILL)

    threading.Thread(target=kill).start()
    with pytest.raises(ProcessLost, match="ended unexpectedly"):
        assign(made.pod, 0, ALONE)


def test_a_training_process_ends_with_who_gave_it_its_assignment(site, job, make_plan, make_training):
    made = site(make_plan(job, training=make_training(max_steps=100_000)))
    while not made.pod.training_socket(0).exists():
        time.sleep(0.05)
    with Client(str(made.pod.training_socket(0)), "AF_UNIX") as connection:
        connection.send(ALONE)
        made.wait_until_it_trains()
        assert made.process.poll() is None
    assert made.process.wait(PATIENCE) == 1


def test_where_no_training_process_comes_the_wait_ends(site, job, make_plan, monkeypatch):
    made = site(make_plan(job))
    made.end()
    monkeypatch.setattr(handover, "WAIT_SECONDS", 1.0)
    made.pod.training_log(0).write_text("Fatal Python error: Segmentation fault\n\n")
    with pytest.raises(ProcessLost, match="Segmentation fault"):
        assign(made.pod, 0, ALONE)


def test_where_memory_runs_out_the_micro_batch_is_halved_until_it_fits(site, job, pod_store, make_plan, make_training):
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 400}]}
    pod_store.put_json_lines([long] * ROWS, f"{job}/long.jsonl")
    training = make_training(max_steps=2, global_batch_size=ROWS, micro_batch_size=ROWS, max_length=256)
    made = site(make_plan(job, training=training, dataset=dataset(f"{job}/long.jsonl")))
    made.end()
    messages, result = [], None
    while result is None:
        made.start(spare_bytes=1536 << 20)
        try:
            result = assign(made.pod, 0, ALONE)
        except SmallerMicroBatch as error:
            messages.append(error.message)
        made.process.wait(PATIENCE)
    assert messages
    for number, message in enumerate(messages):
        assert f"with a micro-batch of {ROWS >> number}: going on with {ROWS >> number + 1}" in message
    assert result["global_step"] == 2
