"""What a cluster is asked to be. Read by every other module of the package, imports none of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
MAX_NODES = 9


@dataclass(frozen=True)
class ClusterSpec:
    """A cluster to start.

    ``nodes=0`` is a control plane alone, which is enough for everything but running pods.
    ``keep`` leaves it up after the process that started it has ended (``Cluster.attach`` finds it again); without it
    the cluster dies with its owner.
    """

    name: str = "dev"
    nodes: int = 0
    feature_gates: Mapping[str, bool] = field(default_factory=lambda: {"GenericWorkload": True})
    audit: bool = False
    node_monitor_grace_seconds: int = 12
    """Seconds without a heartbeat after which a node counts as lost."""
    eviction_seconds: int = 3
    """Seconds after that before its pods are deleted (the default tolerations of every pod)."""
    gpus_per_node: int = 0
    """Fake ``nvidia.com/gpu`` devices on each node."""
    keep: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: at most 32 lower-case letters, digits and inner hyphens")
        if not 0 <= self.nodes <= MAX_NODES:
            raise ValueError(f"nodes={self.nodes}: 0 to {MAX_NODES}")
        if self.gpus_per_node < 0 or self.node_monitor_grace_seconds < 1 or self.eviction_seconds < 0:
            raise ValueError("gpus_per_node, eviction_seconds: 0 or more; node_monitor_grace_seconds: 1 or more")

    @property
    def runtime_config(self) -> str:
        """API groups to serve beside the default ones: native gang scheduling needs its beta group."""
        return "scheduling.k8s.io/v1beta1=true" if self.feature_gates.get("GenericWorkload") else ""

    @property
    def feature_gates_flag(self) -> list[str]:
        """The ``--feature-gates`` argument, or nothing."""
        gates = ",".join(f"{gate}={str(on).lower()}" for gate, on in sorted(self.feature_gates.items()))
        return [f"--feature-gates={gates}"] if gates else []
