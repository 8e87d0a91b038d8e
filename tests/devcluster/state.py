"""What is written down about a running cluster, so that another process can find, use or remove it."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from devcluster import paths
from devcluster.processes import ProcessId, boot_id
from devcluster.spec import ClusterSpec

FILE = "state.json"


@dataclass
class NodeState:
    """One node's processes, as far as it runs."""

    number: int
    slot: str
    """Folder that holds its image store."""
    init: ProcessId | None = None
    kubelet: ProcessId | None = None


@dataclass
class State:
    """A cluster, whoever started it."""

    id: str
    spec: ClusterSpec
    boot: str
    owner: ProcessId
    init: ProcessId | None = None
    api_port: int = 0
    binaries: str = ""
    ready: bool = False
    nodes: list[NodeState] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The cluster's own folder."""
        return paths.clusters() / self.id

    @property
    def running(self) -> bool:
        """Whether the cluster is up, or is being started, by or for somebody who is still there."""
        if self.boot != boot_id():
            return False
        if self.spec.keep and self.ready:
            return self.init is not None and self.init.alive
        return self.owner.alive

    def write(self) -> None:
        """Replace the file in one step."""
        text = json.dumps(asdict(self), indent=1, default=dict) + "\n"
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as scratch:
            scratch.write(text)
        Path(scratch.name).rename(self.folder / FILE)


def create(identifier: str, spec: ClusterSpec) -> State:
    """A new cluster's folder, with the state in it from its first moment on; ``FileExistsError`` where it exists."""
    state = State(identifier, spec, boot_id(), ProcessId.of(os.getpid()))
    paths.clusters().mkdir(parents=True, exist_ok=True)
    state.folder.mkdir(mode=0o700)
    state.write()
    return state


def read(folder: Path) -> State | None:
    """The state in a cluster's folder; None where there is none or it is half written."""
    try:
        raw: dict[str, Any] = json.loads((folder / FILE).read_text())
        return State(
            id=raw["id"],
            spec=ClusterSpec(**raw["spec"]),
            boot=raw["boot"],
            owner=ProcessId(**raw["owner"]),
            init=_process(raw["init"]),
            api_port=raw["api_port"],
            binaries=raw["binaries"],
            ready=raw["ready"],
            nodes=[
                NodeState(node["number"], node["slot"], _process(node["init"]), _process(node["kubelet"]))
                for node in raw["nodes"]
            ],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _process(raw: dict[str, int] | None) -> ProcessId | None:
    return ProcessId(**raw) if raw else None
