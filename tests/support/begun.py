"""Worlds in which something is under way already: a job that trains, a deployment that quantizes or answers."""

from __future__ import annotations

from typing import Any

from support import make
from support.world import World
from tunesmith_api.keys import MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_operator.core.kubernetes.workloads import JOB_FIELDS

REPAIRED = ("Warning", "Repaired")


def training() -> World:
    """A job with two workers at work."""
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    world.pod("sentiment-1", 0, ready=True)
    world.pod("sentiment-1", 1, ready=True)
    world.wait(5)
    return world


def quantizing(**spec: Any) -> World:
    """A deployment whose first revision is being quantized."""
    world = World()
    world.cluster.put(make.modeldeployment(**spec))
    world.reconcile()
    return world


def quantize(world: World, revision: str = "r1") -> None:
    """The quantize Job of that revision ends well."""
    model = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)
    report = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=model)
    world.ends(world.pod(f"sentiment-{revision}-quantize"), 0, report)
    world.job_is(f"sentiment-{revision}-quantize", "Complete")
    world.reconcile()


def serving(**spec: Any) -> World:
    """A deployment that answers."""
    world = quantizing(**spec)
    quantize(world)
    world.rolls_out("sentiment-r1")
    world.wait(5)
    return world


def edit(world: World, kind: str = MODELDEPLOYMENT_KIND, **spec: Any) -> None:
    """Somebody changes the spec."""
    world.cluster.change(kind, "sentiment", {"spec": spec})
    world.reconcile()


def condition(world: World, type_: str) -> tuple[str, str, str]:
    """A condition of the deployment: status, reason, message."""
    return world.condition(type_, MODELDEPLOYMENT_KIND)


def selected(world: World) -> str:
    """The revision that the deployment's Service leads to."""
    selector = world.cluster.get("Service", "sentiment")["spec"]["selector"]
    return str(selector["tunesmith.dev/revision"])


def own_fields(world: World, kind: str, name: str) -> dict[str, Any]:
    """A child's spec or data, with a Job's defaults."""
    raw = world.cluster.get(kind, name)
    assert raw is not None
    defaults = JOB_FIELDS if kind == "Job" else {}
    return {field: {**defaults, **raw[field]} for field in ("spec", "data") if field in raw}
