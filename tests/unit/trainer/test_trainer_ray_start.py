"""What `ray_start` leans on inside Ray's Python."""

import importlib
import inspect
import shlex

import pytest

from tunesmith_trainer.pod.ray_start import AGENTS, without_agents

ray = pytest.importorskip("ray")
from ray._private import services  # noqa: E402
from ray._private.node import Node  # noqa: E402
from ray._private.parameter import RayParams  # noqa: E402


def test_this_ray_starts_its_agents_through_the_command_of_the_raylet():
    source = inspect.getsource(services.start_raylet)
    for agent in AGENTS:
        assert f'"{agent}{{}}".format(' in source
    assert "process_info = start_ray_process(\n        command," in source
    assert "wait_for_persisted_port" in inspect.getsource(importlib.import_module("ray._private.node"))


def test_this_ray_has_what_is_overridden_and_called():
    assert {"start_api_server", "start_raylet"} <= set(vars(Node))
    assert "self.start_api_server(" in inspect.getsource(Node.start_head_processes)
    assert "self.start_raylet(" in inspect.getsource(Node.start_ray_processes)
    assert {"head", "shutdown_at_exit", "spawn_reaper"} <= set(inspect.signature(Node.__init__).parameters)
    parameters = inspect.signature(RayParams.__init__).parameters
    assert {"min_worker_port", "max_worker_port"} <= set(parameters)
    # a free port for each raylet: none may get what was meant for the one before it
    assert not parameters["node_manager_port"].default
    assert not parameters["object_manager_port"].default
    raylet = importlib.import_module("ray._raylet")
    for name in ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN", "RUNTIME_ENV_AGENT"):
        assert hasattr(raylet, f"{name}_PORT_NAME")
    assert callable(raylet.persist_port)


def test_agents_are_replaced_by_a_process_that_ignores_what_it_is_told():
    command = ["raylet", "--node_id=1", *(f"{agent}python agent.py --port=7" for agent in AGENTS), "--head"]
    found = without_agents(command)
    assert [found[0], found[1], found[-1]] == ["raylet", "--node_id=1", "--head"]
    for agent, argument in zip(AGENTS, found[2:4], strict=True):
        # the raylet adds an option of its own
        assert shlex.split(argument.removeprefix(agent) + " --more") == ["sh", "-c", "exec sleep infinity", "--more"]
