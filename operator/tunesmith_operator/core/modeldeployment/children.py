"""Plan → manifests: one plain function for each child of a ModelDeployment."""

from __future__ import annotations

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.adapters import ADAPTER_ENGINES
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.resources import (
    CONFIG_MAP,
    DEPLOYMENT,
    DISRUPTION_BUDGET,
    JOB,
    NETWORK_POLICY,
    SERVICE,
)
from tunesmith_operator.core.kubernetes.workloads import pod_failure_policy
from tunesmith_operator.core.modeldeployment.adapterchildren import set_name
from tunesmith_operator.core.modeldeployment.observed import owner_of, revision_label, revision_name
from tunesmith_operator.core.modeldeployment.template import TEMPLATE_FILE, Template
from tunesmith_operator.core.pods.spec import Workload, claim_of, hub_env, pod_spec

__all__ = [
    "activator_selector",
    "config_map",
    "disruption_budget",
    "health_probe",
    "movable",
    "network_policy",
    "quantize_job",
    "selector",
    "server_deployment",
    "service",
    "spread_over_nodes",
]

STARTUP_SECONDS = 86_400
"""How long a server may load: the longest `rollout.progressDeadlineSeconds`, whatever it is. The Deployment has that
one; in the pods, an edit of it would restart them."""


def _labels(number: int, component: str) -> dict[str, str]:
    return {keys.LABEL_COMPONENT: component, keys.LABEL_REVISION: revision_label(number)}


def selector(deployment: ModelDeployment, number: int | None) -> dict[str, str]:
    """Labels of the server pods of one revision, or of all revisions, and of no other pods."""
    mine = {keys.LABEL_MODELDEPLOYMENT: deployment.metadata.name, keys.LABEL_COMPONENT: keys.COMPONENT_SERVER}
    return mine if number is None else mine | {keys.LABEL_REVISION: revision_label(number)}


def activator_selector(deployment: ModelDeployment) -> dict[str, str]:
    """Labels of the pods that hold requests while no server answers, and of no others."""
    return {keys.LABEL_MODELDEPLOYMENT: deployment.metadata.name, keys.LABEL_COMPONENT: keys.COMPONENT_ACTIVATOR}


def service(deployment: ModelDeployment, number: int | None, asleep: bool = False) -> Manifest:
    """The address that clients use; it leads to one revision, to all that have pods, or to the activator."""
    owner = owner_of(deployment)
    port: JSON = {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}
    chosen = activator_selector(deployment) if asleep else selector(deployment, number)
    spec: JSON = {"selector": chosen, "ports": [port]}
    return owner.manifest(SERVICE, owner.name, {"spec": spec}, {keys.LABEL_COMPONENT: keys.COMPONENT_SERVER})


def disruption_budget(deployment: ModelDeployment, number: int | None) -> Manifest:
    """Of the pods that clients reach, one at a time may be moved to another node, as long as the others answer.

    Where there is only one it may go: a budget that forbids that would keep its node from ever being drained.
    """
    owner, spec = owner_of(deployment), movable(selector(deployment, number))
    return owner.manifest(DISRUPTION_BUDGET, owner.name, {"spec": spec}, {keys.LABEL_COMPONENT: keys.COMPONENT_SERVER})


def movable(chosen: dict[str, str]) -> JSON:
    """Of these pods one at a time."""
    return {
        "maxUnavailable": 1,
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
        "selector": {"matchLabels": chosen},
    }


def network_policy(deployment: ModelDeployment, config: Config) -> Manifest:
    """Anyone may ask for completions; the operator reads metrics; nothing else of the pods can be reached."""
    owner = owner_of(deployment)
    health: JSON = {"ports": [{"port": keys.PORT_HEALTH, "protocol": "TCP"}]}
    if config.operator_namespace:
        home = {"kubernetes.io/metadata.name": config.operator_namespace}
        health["from"] = [{"namespaceSelector": {"matchLabels": home}}]
    spec: JSON = {
        "podSelector": {"matchLabels": {keys.LABEL_MODELDEPLOYMENT: owner.name}},
        "policyTypes": ["Ingress"],
        "ingress": [{"ports": [{"port": keys.PORT_SERVER, "protocol": "TCP"}]}, health],
    }
    return owner.manifest(NETWORK_POLICY, owner.name, {"spec": spec}, {keys.LABEL_COMPONENT: keys.COMPONENT_SERVER})


def config_map(template: Template, number: int) -> Manifest:
    """The plan of a revision. The revision hash on it lets the history be rebuilt from the children."""
    annotations = {keys.ANNOTATION_REVISION_HASH: template.hash}
    if template.stands_in_for:
        annotations[keys.ANNOTATION_STANDS_IN_FOR] = template.stands_in_for
    labels = _labels(number, keys.COMPONENT_SERVER)
    name = revision_name(template.deployment, number)
    data = {keys.PLAN_FILE: template.plan_of(number).to_json(), TEMPLATE_FILE: template.pods.to_json()}
    return owner_of(template.deployment).manifest(CONFIG_MAP, name, {"data": data}, labels, annotations)


def _workload(
    template: Template, number: int, container: str, module: str, container_fields: JSON, **more: JSON
) -> Workload:
    pods = template.pods
    serves = container == keys.SERVER_CONTAINER
    gpus = pods.gpus if serves else 0
    return Workload(
        container=container,
        module=module,
        image=pods.image,
        plan_name=revision_name(template.deployment, number),
        resources=pods.resources.resolved,
        storage=pods.storage,
        node_selector=pods.node_selector,
        tolerations=pods.tolerations,
        env=hub_env(pods.hugging_face),
        claims=_claims(template, container),
        restart_policy="Always" if serves else "Never",
        container_fields=container_fields,
        pod_fields=more.get("pod_fields", {}),
        secrets=more.get("secrets", {}),
        gpus=gpus,
        gpu_resource=pods.gpu_resource,
        # vLLM's processes talk there, and those of several GPUs exchange their parts of the model
        shared_memory=serves and template.plan.engine is EngineType.VLLM,
        config_maps=more.get("config_maps", {}),
    )


def _claims(template: Template, container: str) -> dict[str, bool]:
    """The PersistentVolumeClaims of a container, by name, and whether it writes: servers only read artefacts."""
    quantizes = container == keys.QUANTIZE_CONTAINER
    uses = {claim_of(template.plan.model_uri): False} if quantizes else {}
    uses[claim_of(template.plan.artifact_uri)] = quantizes
    return {claim: written for claim, written in uses.items() if claim}


def quantize_job(template: Template, number: int, config: Config) -> Manifest:
    """Makes the revision's artefact in object storage, or finds it there."""
    owner, labels = owner_of(template.deployment), _labels(number, keys.COMPONENT_QUANTIZE)
    workload = _workload(template, number, keys.QUANTIZE_CONTAINER, "tunesmith_server.quantize", {})
    spec: JSON = {
        "backoffLimit": 2,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": pod_failure_policy(keys.QUANTIZE_CONTAINER),
        "template": {"metadata": {"labels": owner.selector | labels}, "spec": pod_spec(workload, config)},
    }
    return owner.manifest(JOB, f"{revision_name(template.deployment, number)}-quantize", {"spec": spec}, labels)


def health_probe(period: int, failures: int) -> JSON:
    """Asks the port that is for probes."""
    return {
        "httpGet": {"path": keys.PATH_HEALTH, "port": "health"},
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def spread_over_nodes(chosen: dict[str, str]) -> JSON:
    """Nodes share these pods, as far as there is room."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": chosen},
    }


def server_deployment(template: Template, number: int, replicas: int, config: Config) -> Manifest:
    """The server pods of one revision. No pod is taken away before another answers."""
    owner, labels, spec = (
        owner_of(template.deployment),
        _labels(number, keys.COMPONENT_SERVER),
        template.deployment.spec,
    )
    pod_labels = owner.selector | labels
    chosen = selector(template.deployment, number)
    api = template.plan.api
    container: JSON = {
        "ports": [
            {"name": "http", "containerPort": keys.PORT_SERVER, "protocol": "TCP"},
            {"name": "health", "containerPort": keys.PORT_HEALTH, "protocol": "TCP"},
        ],
        # a model may take minutes to load: liveness begins once it has answered for the first time
        "startupProbe": health_probe(1, STARTUP_SECONDS),
        "readinessProbe": health_probe(2, 2),
        "livenessProbe": health_probe(10, 6),
    }
    workload = _workload(
        template,
        number,
        keys.SERVER_CONTAINER,
        "tunesmith_server",
        container,
        pod_fields={
            "topologySpreadConstraints": [spread_over_nodes(chosen)],
            "terminationGracePeriodSeconds": api.termination_grace_period_seconds,
        },
        secrets={keys.API_KEYS_DIRECTORY: api.keys_secret_ref.name} if api.keys_secret_ref is not None else {},
        config_maps=(
            {keys.ADAPTERS_DIRECTORY: set_name(template.deployment, number)}
            if template.plan.engine in ADAPTER_ENGINES
            else {}
        ),
    )
    fields: JSON = {
        "replicas": replicas,
        "revisionHistoryLimit": 1,
        "progressDeadlineSeconds": spec.rollout.progress_deadline_seconds,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": chosen},
        "template": {"metadata": {"labels": pod_labels}, "spec": pod_spec(workload, config)},
    }
    annotations = {keys.ANNOTATION_REVISION_HASH: template.hash}
    return owner.manifest(DEPLOYMENT, revision_name(template.deployment, number), {"spec": fields}, labels, annotations)
