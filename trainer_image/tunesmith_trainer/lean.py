"""Keeps packages out of a process that its plan has no use for. Called by `training` before transformers is imported.

transformers and PEFT import what they find installed, needed or not: torchao, bitsandbytes, scipy. On two cores that is
some five seconds of CPU for each rank, at every start.
"""

from __future__ import annotations

import sys

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.training import Optim

__all__ = ["hide_unused", "unused"]


def unused(plan: TrainingPlan) -> set[str]:
    """Return the installed packages that would only cost time."""
    packages = {"torchao", "bitsandbytes", "scipy", "sklearn"}
    if plan.method.qat is not None:
        packages.discard("torchao")
    if plan.method.type is MethodType.QLORA or plan.training.optim is Optim.ADAMW_8BIT:
        packages.discard("bitsandbytes")
    return packages


def hide_unused(plan: TrainingPlan) -> None:
    """Make the unused packages look as if they weren't installed, unless they are imported already."""
    for name in unused(plan):
        if name not in sys.modules:
            # Python's documented way to make an import fail; `find_spec` returns None for it
            sys.modules[name] = None  # type: ignore[assignment]
