"""What a run finds on this machine, and what it hands to the trainer."""

import os
import socket
from pathlib import Path

import pytest

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_cli import machine
from tunesmith_cli.errors import Refused
from tunesmith_cli.launch import environment_of
from tunesmith_cli.run import local_plan
from tunesmith_trainer.pod.environment import PodEnvironment


def job(**workers):
    return FineTuneJob.model_validate(
        {
            "metadata": {"name": "sentiment"},
            "spec": {
                "model": {"uri": "s3://models/base"}, "dataset": {"train": {"uri": "s3://data/train.jsonl"}},
                "checkpoint": {"uri": "s3://checkpoints/x"}, "output": {"uri": "s3://models/x"}, "workers": workers,
            },
        }
    )  # fmt: skip


@pytest.mark.parametrize(("visible", "found"), [("0,1", 2), ("", 0), ("-1", 0), ("GPU-a", 1)])
def test_gpus_are_those_that_a_child_would_see(visible, found):
    assert machine.gpus({"CUDA_VISIBLE_DEVICES": visible}) == found


def test_without_the_variable_the_driver_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "NVIDIA_GPUS", tmp_path / "gpus")
    monkeypatch.setattr(machine, "DEVICES", tmp_path / "dev")
    assert machine.gpus({}) == 0
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    assert machine.gpus({}) == 2
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert machine.gpus({}) == 1


def test_too_few_gpus_are_told_with_both_ways_out():
    with pytest.raises(Refused) as refused:
        machine.check_gpus(job(replicas=4, gpusPerWorker=1).spec, 2)
    assert "this machine has 2" in str(refused.value)
    assert "--set spec.workers.replicas=2" in str(refused.value)
    assert "--set spec.workers.gpusPerWorker=0" in str(refused.value)
    machine.check_gpus(job(replicas=2, gpusPerWorker=1).spec, 2)
    machine.check_gpus(job(replicas=8).spec, 0)


@pytest.mark.parametrize(
    ("replicas", "found", "way_out"),
    [
        (
            3,
            5,
            "replicas with 2 GPUs each; this machine has 5. Use fewer (--set spec.workers.replicas=2), or the CPU (",
        ),
        (1, 1, "(--set spec.workers.replicas=1 --set spec.workers.gpusPerWorker=1), or the CPU ("),
        (1, 0, "this machine has 0. Use the CPU ("),
    ],
)
def test_with_several_gpus_in_a_worker_the_ways_out_fit_the_machine(replicas, found, way_out):
    with pytest.raises(Refused) as refused:
        machine.check_gpus(job(replicas=replicas, gpusPerWorker=2).spec, found)
    assert way_out in str(refused.value)
    machine.check_gpus(job(replicas=2, gpusPerWorker=2).spec, 4)


def test_free_ports_differ_and_can_be_had():
    first, second = machine.free_ports(2)
    assert first != second
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", first))


def test_scratch_is_new_each_time_and_gone_afterwards(tmp_path):
    with machine.scratch_folder(tmp_path / "work") as one, machine.scratch_folder(tmp_path / "work") as other:
        assert one.folder != other.folder
        assert one.folder.parent == tmp_path / "work"
    assert list((tmp_path / "work").iterdir()) == []


def test_of_a_scratch_that_explains_a_failure_the_files_are_kept_and_the_copies_go(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    with machine.scratch_folder(tmp_path) as scratch:
        scratch.kept = True
        (scratch.folder / "trainer.log").touch()
        (scratch.folder / "model").mkdir()
        (scratch.folder / "volumes").mkdir()
        (scratch.folder / "volumes" / "local").symlink_to(tmp_path / "precious")
    assert [path.name for path in scratch.folder.iterdir()] == ["trainer.log"]
    assert (tmp_path / "precious" / "file").exists()


def test_a_long_path_gets_a_short_name_for_ray(tmp_path):
    with machine.scratch_folder(tmp_path / ("long" * 20)) as scratch:
        assert len(str(scratch.short)) <= machine.MAX_SCRATCH
        assert scratch.short.resolve() == scratch.folder
    assert not scratch.short.is_symlink()


def test_a_work_dir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="--work-dir"), machine.scratch_folder(tmp_path / "file" / "below"):
        pass


def environment(tmp_path, replicas=2, cores=8, processes=None, **environ):
    plan = local_plan(job(replicas=replicas, processesPerWorker=processes))
    environ = {"HOME": str(tmp_path), **environ}
    return environment_of(plan, Path("/tmp/ts-1"), Path("/tmp/ts-1/volumes"), cores, (4001, 4002), environ)


def test_all_workers_are_in_one_pod_that_reads_back_what_it_is_told(tmp_path):
    pod = PodEnvironment.read(environment(tmp_path))
    assert (pod.index, pod.ip, pod.listen_ip) == (0, "127.0.0.1", "127.0.0.1")
    assert (pod.processes, pod.progress_port, pod.gcs_port) == (2, 4001, 4002)
    assert pod.threads == 4, "the cores are shared out"
    assert pod.plan_path == Path("/tmp/ts-1/plan.json")
    assert len(pod.token) == 32
    assert pod.token != PodEnvironment.read(environment(tmp_path)).token


def test_the_processes_of_all_workers_are_in_the_one_pod(tmp_path):
    pod = PodEnvironment.read(environment(tmp_path, replicas=2, processes=3, cores=12))
    assert (pod.processes, pod.threads) == (6, 2)


def test_more_processes_than_cores_have_a_thread_each(tmp_path):
    assert PodEnvironment.read(environment(tmp_path, replicas=8, cores=2)).threads == 1


def test_the_plan_is_the_operators_for_one_host():
    plan = local_plan(job(replicas=3))
    assert (plan.name, plan.replicas, plan.attempt, plan.head_host) == ("sentiment", 3, 1, "127.0.0.1")


def test_the_users_own_credentials_are_found_although_the_trainers_home_is_elsewhere(tmp_path):
    assert not {"AWS_SHARED_CREDENTIALS_FILE", "HF_TOKEN"} & environment(tmp_path).keys()
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").touch()
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("hf_abc\n")
    found = environment(tmp_path)
    assert found["AWS_SHARED_CREDENTIALS_FILE"] == str(tmp_path / ".aws" / "credentials")
    assert "AWS_CONFIG_FILE" not in found
    assert found["HF_TOKEN"] == "hf_abc"
    assert environment(tmp_path, HF_TOKEN="mine")["HF_TOKEN"] == "mine"
    assert environment(tmp_path, AWS_ACCESS_KEY_ID="k")["AWS_ACCESS_KEY_ID"] == "k"
    assert found[keys.ENV_VOLUMES] == "/tmp/ts-1/volumes"


def test_cores_are_those_of_this_process():
    assert machine.cores() == len(os.sched_getaffinity(0))
