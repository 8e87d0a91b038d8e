"""What a pod's training processes find in their environment."""

import pytest

from tunesmith_trainer.pod.ray_node import own_gpu


@pytest.mark.parametrize(
    ("environment", "gpu"), [({}, "1"), ({"CUDA_VISIBLE_DEVICES": ""}, "1"), ({"CUDA_VISIBLE_DEVICES": "4, 6,7"}, "6")]
)
def test_every_training_process_has_a_gpu_of_its_own(environment, gpu):
    assert own_gpu(1, environment) == {"CUDA_VISIBLE_DEVICES": gpu}
