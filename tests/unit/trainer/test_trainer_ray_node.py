"""What a pod's training processes find in their environment."""

import json

import pytest

from support.plans import training_plan
from tunesmith_api import keys
from tunesmith_trainer.pod.environment import PodEnvironment
from tunesmith_trainer.pod.ray_node import RayNode, child_environment, own_gpu


@pytest.mark.parametrize(
    ("environment", "gpu"), [({}, "1"), ({"CUDA_VISIBLE_DEVICES": ""}, "1"), ({"CUDA_VISIBLE_DEVICES": "4, 6,7"}, "6")]
)
def test_every_training_process_has_a_gpu_of_its_own(environment, gpu):
    assert own_gpu(1, environment) == {"CUDA_VISIBLE_DEVICES": gpu}


def pod_with(processes, cores):
    return PodEnvironment.read(
        {
            keys.ENV_WORKER_INDEX: "1",
            keys.ENV_POD_IP: "127.0.0.1",
            keys.ENV_CPU_LIMIT: str(1000 * cores),
            keys.ENV_PROCESSES: str(processes),
        }
    )


@pytest.mark.parametrize(("processes", "cores", "threads"), [(1, 8, 8), (4, 8, 2), (3, 8, 2), (16, 8, 1)])
def test_the_cores_of_a_pod_are_shared_out_among_its_processes(processes, cores, threads):
    pod = pod_with(processes, cores)
    assert pod.threads == threads
    assert child_environment(pod)["OMP_NUM_THREADS"] == str(threads)


class Spawned:
    """Stands for `Children`: takes down what would be started."""

    def spawn(self, command, *_):
        self.settings = json.loads(command[-1])
        return 1


@pytest.mark.parametrize("gpus", [0, 4])
def test_a_node_offers_a_slot_for_each_process_and_a_gpu_where_there_are_any(gpus):
    children = Spawned()
    RayNode(pod_with(4, 8), training_plan(gpus_per_worker=gpus, processes_per_worker=4), children)
    assert (children.settings["cpus"], children.settings["gpus"]) == (4, gpus)
