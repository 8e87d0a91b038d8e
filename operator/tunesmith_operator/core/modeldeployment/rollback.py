"""`rollout.rollbackTo`: an earlier revision, made anew from the template that its ConfigMap keeps.

It is level-based: as long as it names a revision, that one's template is what is asked for, and the newest revision
that has it is the one. So applying the same spec again changes nothing, and taking the field out goes back to the spec.
"""

from __future__ import annotations

from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_operator.core.kubernetes.objects import ConfigMapView
from tunesmith_operator.core.modeldeployment.observed import Children, revision_name
from tunesmith_operator.core.modeldeployment.template import Template, stored_template
from tunesmith_operator.core.reconcile.rules import Violation

__all__ = ["earlier_template", "unknown_revision"]


def earlier_template(deployment: ModelDeployment, children: Children) -> Template | None:
    """The template of the revision that `rollbackTo` names; None where it names none, or that one's is lost."""
    kept = _plans(deployment, children).get(deployment.spec.rollout.rollback_to or "")
    return stored_template(deployment, kept)


def _plans(deployment: ModelDeployment, children: Children) -> dict[str, ConfigMapView]:
    """What is kept of each revision, by its name."""
    numbered = ((label.removeprefix("r"), plan) for label, plan in children.config_maps.items())
    return {revision_name(deployment, int(digits)): plan for digits, plan in numbered if digits.isdecimal()}


def unknown_revision(deployment: ModelDeployment, children: Children) -> Violation | None:
    """What is named can't be gone back to."""
    wanted = deployment.spec.rollout.rollback_to
    if wanted is None:
        return None
    if earlier_template(deployment, children) is not None:
        return None
    plans = _plans(deployment, children).items()
    kept = [name for name, plan in plans if stored_template(deployment, plan) is not None]
    names = ", ".join(sorted(kept, key=lambda name: int(name.rpartition("-r")[2]))) or "none"
    return Violation(
        f"spec.rollout.rollbackTo names {wanted}, whose template isn't kept: name one that is ({names}), or take it out"
    )
