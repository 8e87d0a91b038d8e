"""Which revision the spec asks for where its gate has a fallback: its own, or the one that stands in for it.

`decide` asks. The answer follows from the history alone, so an operator that restarts gives the same one, and a
fallback that fails, too, has no other after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.deploymentstatus import Revision
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.modeldeployment.gate import Outcome, held_back, judge
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.modeldeployment.template import Template, template_of

__all__ = ["with_fallback"]


def with_fallback(
    asked: Template, deployment: ModelDeployment, source: SourceModel, config: Config, revisions: Sequence[Revision]
) -> Template:
    """The template of the revision that is to be the newest: `asked`, unless the gate holds that back."""
    spec = deployment.spec
    if spec.gate is None or spec.gate.fallback_method is None:
        return asked
    tried = next((it for it in reversed(revisions) if it.hash == asked.hash), None)
    if tried is not None:
        # by the limits as they are now: a revision that they let pass is tried again
        needed = held_back(tried) and judge(spec.gate, tried.evaluation).outcome is Outcome.FAILED
    else:
        # the history is bounded: the one that was tried may be forgotten, and its stand-in remembers
        needed = bool(revisions) and revisions[-1].stands_in_for == asked.hash
    if not needed:
        return asked
    quantization = spec.quantization.model_copy(update={"method": spec.gate.fallback_method})
    other = deployment.model_copy(update={"spec": spec.model_copy(update={"quantization": quantization})})
    fallback = replace(template_of(other, source, config), deployment=deployment, stands_in_for=asked.hash)
    return fallback if tried is not None or revisions[-1].hash == fallback.hash else asked
