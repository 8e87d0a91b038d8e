"""Kueue's Workloads: why a Job is not admitted, in Kueue's own words. `adapters.kueue` reads them.

Kueue makes a Workload for each Job that has the label of a queue. It is asked for only while a Job waits: where there
is no Kueue nothing is asked, and nothing has to be installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tunesmith_operator.core.kubernetes.objects import conditions_of
from tunesmith_operator.core.kubernetes.resources import Resource

__all__ = ["WORKLOADS", "admission_words"]

WORKLOADS: Final = tuple(Resource("kueue.x-k8s.io", it, "Workload", "workloads") for it in ("v1beta2", "v1beta1"))
"""By the versions that Kueue has served, newest first."""
_STEPS: Final = ("QuotaReserved", "Admitted")


def admission_words(workloads: Sequence[Mapping[str, Any]]) -> str:
    """What keeps the newest of a Job's Workloads from being admitted; empty where Kueue has said nothing of it."""
    newest = max(workloads, key=lambda raw: raw["metadata"].get("creationTimestamp", ""), default=None)
    if newest is None:
        return ""
    if (newest.get("spec") or {}).get("active") is False:
        return f"Workload {newest['metadata']['name']} is deactivated (spec.active: false)"
    missing = [it for type_ in _STEPS for it in conditions_of(newest) if (it.type, it.status) == (type_, "False")]
    return next((it.message or it.reason for it in missing), "")
