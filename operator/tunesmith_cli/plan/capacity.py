"""What a worker has: its memory limit, and its GPU's memory where a name in the spec says it. `command` asks."""

from __future__ import annotations

import re

from tunesmith_api.memory.placement import Capacity
from tunesmith_api.v1alpha1.finetunejob import Workers
from tunesmith_cli.errors import Refused
from tunesmith_operator.core.text import amount

__all__ = ["capacity_of", "shown"]

_IN_NAME = re.compile(r"(?<![0-9])([0-9]{1,4})gb(?![a-z0-9])", re.IGNORECASE)
"""In the names of MIG profiles (mig-3g.40gb) and products (NVIDIA-A100-SXM4-80GB)."""
_PRODUCT, _MEMORY = "nvidia.com/gpu.product", "nvidia.com/gpu.memory"
"""Labels that NVIDIA's GPU feature discovery puts on nodes; the second in MiB."""


def capacity_of(workers: Workers, gpu_memory: str | None) -> Capacity:
    """What each worker has. `gpu_memory` is a quantity that was given on the command line, and counts before names.

    Raises:
        Refused: it is no quantity.
    """
    host = amount(workers.resources.memory)
    assert host is not None  # the API's own pattern
    return Capacity(int(host), _gpu_of(workers, gpu_memory) if workers.gpus_per_worker else None)


def _gpu_of(workers: Workers, given: str | None) -> int | None:
    if given is not None:
        found = amount(given)
        if found is None or found < 1 << 20:
            raise Refused(f"--gpu-memory {given}: give a quantity of memory, as 24Gi or 80Gi")
        return int(found)
    labelled = workers.node_selector.get(_MEMORY, "")
    if labelled.isdecimal():
        return int(labelled) << 20
    for name in (workers.gpu.resource_name, workers.node_selector.get(_PRODUCT, "")):
        if (named := _IN_NAME.search(name)) is not None:
            return int(named[1]) * 1000**3
    return None


def shown(size: int) -> str:
    """A number of bytes as a quantity, rounded up to what people write."""
    mib = -(-size // (1 << 20))
    return f"{mib}Mi" if mib < 1024 else f"{-(-mib // 1024)}Gi"
