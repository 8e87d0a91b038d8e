"""Manifests of what adapters need: the Job that converts one, its plan, and the list that servers have mounted."""

from __future__ import annotations

from tunesmith_api import keys
from tunesmith_api.adapters import AdapterPlan, AdapterSet
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.resources import CONFIG_MAP, JOB
from tunesmith_operator.core.kubernetes.workloads import pod_failure_policy
from tunesmith_operator.core.modeldeployment.observed import owner_of, revision_label, revision_name
from tunesmith_operator.core.modeldeployment.template import Template
from tunesmith_operator.core.pods.spec import Workload, claim_of, hub_env, pod_spec

__all__ = ["adapter_job", "adapter_plan", "adapter_set", "set_name"]


def set_name(deployment: ModelDeployment, number: int) -> str:
    """Name of the ConfigMap with the adapters of a revision's servers."""
    return f"{revision_name(deployment, number)}-adapters"


def adapter_set(deployment: ModelDeployment, number: int, adapters: AdapterSet) -> Manifest:
    """The adapters that the servers of a revision are to have."""
    labels = {keys.LABEL_COMPONENT: keys.COMPONENT_ADAPTERS, keys.LABEL_REVISION: revision_label(number)}
    data = {keys.ADAPTERS_FILE: adapters.to_json()}
    return owner_of(deployment).manifest(CONFIG_MAP, set_name(deployment, number), {"data": data}, labels)


def _name(template: Template, key: str) -> str:
    return f"{template.deployment.metadata.name}-adapter-{key}"


def _labels(key: str) -> dict[str, str]:
    return {keys.LABEL_COMPONENT: keys.COMPONENT_ADAPTERS, keys.LABEL_ADAPTER: key}


def adapter_plan(template: Template, number: int, key: str, adapter: AdapterPlan) -> Manifest:
    """What the Job is told: the adapter, and the plan of the revision whose model it has to fit."""
    plan = template.plan_of(number).model_copy(update={"adapter": adapter})
    data = {keys.PLAN_FILE: plan.to_json()}
    return owner_of(template.deployment).manifest(CONFIG_MAP, _name(template, key), {"data": data}, _labels(key))


def adapter_job(template: Template, key: str, adapter: AdapterPlan, config: Config) -> Manifest:
    """Makes the adapter's artefact in object storage, or finds it there."""
    owner, labels, pods = owner_of(template.deployment), _labels(key), template.pods
    claims = {claim_of(template.plan.model_uri): False, claim_of(adapter.uri): False}
    claims[claim_of(template.plan.artifact_uri)] = True
    workload = Workload(
        container=keys.QUANTIZE_CONTAINER,
        module="tunesmith_server.adapters",
        image=pods.image,
        plan_name=_name(template, key),
        resources=pods.resources.resolved,
        storage=pods.storage,
        node_selector=pods.node_selector,
        tolerations=pods.tolerations,
        env=hub_env(pods.hugging_face),
        claims={claim: written for claim, written in claims.items() if claim},
    )
    spec: JSON = {
        "backoffLimit": 2,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": pod_failure_policy(keys.QUANTIZE_CONTAINER),
        "template": {"metadata": {"labels": owner.selector | labels}, "spec": pod_spec(workload, config)},
    }
    return owner.manifest(JOB, _name(template, key), {"spec": spec}, labels)
