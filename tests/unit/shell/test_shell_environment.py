"""Settings from the environment, and logs."""

import json
import logging
import sys

import pytest

from tunesmith_operator.shell.environment import InvalidEnvironment, config_from
from tunesmith_operator.shell.logs import JsonFormatter

BASE = {"TUNESMITH_TRAINER_IMAGE": "trainer:1"}


def test_one_image_is_enough():
    config = config_from(BASE)
    assert config.server_image == "trainer:1"
    assert (config.vllm_image, config.vllm_gpu_image) == ("", "")
    assert config.namespaces == ()
    assert config.image_pull_policy == "IfNotPresent"


def test_everything_can_be_set():
    config = config_from(
        BASE
        | {
            "TUNESMITH_NAMESPACES": "a, b,",
            "TUNESMITH_SERVER_IMAGE": "s:2",
            "TUNESMITH_VLLM_IMAGE": "v:3",
            "TUNESMITH_VLLM_GPU_IMAGE": "g:4",
            "TUNESMITH_QPS": "5",
            "TUNESMITH_WORKERS": "2",
        }
    )
    assert config.namespaces == ("a", "b")
    assert (config.server_image, config.qps, config.workers) == ("s:2", 5.0, 2)
    assert (config.vllm_image, config.vllm_gpu_image) == ("v:3", "g:4")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("TUNESMITH_TRAINER_IMAGE", "", "TUNESMITH_TRAINER_IMAGE is not set"),
        ("TUNESMITH_IMAGE_PULL_POLICY", "Sometimes", "Always, IfNotPresent, Never"),
        ("TUNESMITH_WORKERS", "many", "a number is wanted"),
        ("TUNESMITH_WORKERS", "0", "at least 1"),
        ("TUNESMITH_LOG_LEVEL", "loud", "TUNESMITH_LOG_LEVEL"),
    ],
)
def test_a_slip_is_named(name, value, words):
    with pytest.raises(InvalidEnvironment, match=words):
        config_from(BASE | {name: value})


def test_a_log_line_is_one_json_object_with_its_key():
    record = logging.LogRecord("x", logging.WARNING, __file__, 1, "lost %s", ("it",), None)
    record.key = "FineTuneJob/ml/a"
    entry = json.loads(JsonFormatter().format(record))
    assert (entry["level"], entry["message"], entry["key"]) == ("warning", "lost it", "FineTuneJob/ml/a")


def test_an_exception_is_in_the_line():
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "failed", (), sys.exc_info())
    assert "ValueError: boom" in json.loads(JsonFormatter().format(record))["exception"]
