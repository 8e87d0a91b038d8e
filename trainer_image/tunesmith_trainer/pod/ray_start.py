"""Starts Ray's own processes on one node, only those that training needs. A child of `ray_node`, done once Ray is up.

`ray start` also brings up a dashboard on the head and two agents on every node: Python processes that take three
seconds of CPU and 250 MB in each pod, and until they answer, the raylet doesn't register. They are for dashboards,
metrics and runtime environments; training here has none of these. So this makes the same calls as `ray start` does,
with a stand-in for the agents. It leans on the insides of Ray's Python: `tests/unit/trainer/test_trainer_ray_start.py`
says whether a new Ray still has them.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["NodeSettings", "main", "without_agents"]

# a raylet starts its agents itself, adds options to their commands, and ends when one of them ends
STAND_IN = subprocess.list2cmdline(["sh", "-c", "exec sleep infinity"])
AGENTS = ("--dashboard_agent_command=", "--runtime_env_agent_command=")
NO_PORT = -1
"""What Ray's own agents write where a service of theirs is switched off."""


@dataclass(frozen=True)
class NodeSettings:
    """One node, as `ray_node` wants it."""

    ip: str
    gcs_port: int
    """Where the head's GCS listens; 0 on the other nodes, which read its address from standard input."""
    cpus: int
    gpus: int
    object_store_bytes: int

    def to_json(self) -> str:
        """Return what `main` takes as its argument."""
        return json.dumps(asdict(self))


def without_agents(command: Sequence[str]) -> list[str]:
    """Return the command of a raylet with a process in place of each agent that does nothing."""
    return [
        next((agent + STAND_IN for agent in AGENTS if argument.startswith(agent)), argument) for argument in command
    ]


def _node_class() -> type[Any]:
    """Return Ray's Node without what surrounds the GCS and the raylet."""
    from ray._private import services
    from ray._private.node import Node

    raylet: Any = importlib.import_module("ray._raylet")

    start_process = services.start_ray_process

    def start(command: list[str], *args: Any, **kwargs: Any) -> Any:
        return start_process(without_agents(command), *args, **kwargs)

    services.start_ray_process = start

    class LeanNode(Node):
        def start_api_server(self, **_: Any) -> None:
            """Start no dashboard."""

        def start_raylet(self, *args: Any, **kwargs: Any) -> None:
            # the agents would write these files, and the raylet waits for them
            for name in (
                raylet.METRICS_AGENT_PORT_NAME,
                raylet.METRICS_EXPORT_PORT_NAME,
                raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME,
                raylet.RUNTIME_ENV_AGENT_PORT_NAME,
            ):
                raylet.persist_port(self._session_dir, self._node_id, name, NO_PORT)
            super().start_raylet(*args, **kwargs)

    return LeanNode


def main() -> None:
    """Start the node that the argument describes; Ray's processes stay when this one ends."""
    settings = NodeSettings(**json.loads(sys.argv[1]))
    node_class = _node_class()
    from ray._private.parameter import RayParams

    parameters = RayParams(
        node_ip_address=settings.ip,
        node_name=settings.ip,
        num_cpus=settings.cpus,
        num_gpus=settings.gpus,
        resources={},
        labels={},
        object_store_memory=settings.object_store_bytes,
        include_log_monitor=False,
        include_dashboard=False,
        no_monitor=True,
        # every port but the head's is a free one. On the same ports as a raylet that was there before, a new one gets
        # the requests meant for that one for as long as the head believes it alive, and placement can hang for good
        min_worker_port=0,
        max_worker_port=0,
    )
    if settings.gcs_port:
        parameters.gcs_server_port = settings.gcs_port
    else:
        # imported and ready before the head is: what is left to do then takes half a second
        parameters.gcs_address = sys.stdin.readline().strip()
    node_class(parameters, head=bool(settings.gcs_port), shutdown_at_exit=False, spawn_reaper=False)


if __name__ == "__main__":
    main()
