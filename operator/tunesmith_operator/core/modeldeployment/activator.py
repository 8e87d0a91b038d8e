"""The activator of a deployment that may be scaled to zero: pods that hold requests until a server answers.

The deployment's Service leads to them while no server answers. They reach servers through a Service of their own, know
the API keys, and hold no Kubernetes token: the operator asks them how many requests they hold, as it asks servers.
Once made, its Service, NetworkPolicy and PodDisruptionBudget stay as long as the deployment: the operator can delete
none, and they cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith_api import keys
from tunesmith_api.activation import ActivatorSettings
from tunesmith_api.v1alpha1 import ModelDeployment, Resources, Storage
from tunesmith_api.v1alpha1.api import Api
from tunesmith_api.v1alpha1.autoscaling import Autoscaling
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.resources import DEPLOYMENT, DISRUPTION_BUDGET, NETWORK_POLICY, SERVICE
from tunesmith_operator.core.modeldeployment.children import (
    activator_selector,
    health_probe,
    movable,
    spread_over_nodes,
)
from tunesmith_operator.core.modeldeployment.observed import Children, owner_of
from tunesmith_operator.core.pods.spec import Workload, env, pod_spec
from tunesmith_operator.core.reconcile.children import Keeper
from tunesmith_operator.core.reconcile.decision import Action, Delete

__all__ = ["Activation", "activator_actions"]

REPLICAS = 2
"""One of them may be moved to another node."""
LABELS = {keys.LABEL_COMPONENT: keys.COMPONENT_ACTIVATOR}
LEAST_BYTES = 32 * 1024 * 1024
"""Bodies that one activator holds together, or more where one alone may be larger."""
OWN_BYTES = 128 * 1024 * 1024
"""What the program itself takes, with room."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What the activator is made of; None of it in `autoscaling` means that there is to be none."""

    autoscaling: Autoscaling | None
    api: Api
    parallel_requests: int


def activator_actions(
    deployment: ModelDeployment,
    activation: Activation,
    servers: dict[str, str],
    asleep: bool,
    children: Children,
    keeper: Keeper,
    config: Config,
) -> Iterator[Action]:
    """Keep it as it should be, where there is to be one; `servers` are the labels of the pods that it leads to.

    One that is needed no longer goes when no requests do: not before the Service leads elsewhere.
    """
    found = children.activator
    if activation.autoscaling is None:
        child = found.deployment
        if child is not None and not (child.deleting or asleep or children.asleep):
            yield Delete(DEPLOYMENT, child.namespace, child.name, child.uid)
        return
    yield from keeper.keep(_network_policy(deployment), found.network_policy)
    yield from keeper.keep(_servers(deployment, servers), found.service)
    yield from keeper.keep(_deployment(deployment, activation, activation.autoscaling, config), found.deployment)
    yield from keeper.keep(_disruption_budget(deployment), found.disruption_budget)


def _name(deployment: ModelDeployment) -> str:
    return f"{deployment.metadata.name}-activator"


def _servers_name(deployment: ModelDeployment) -> str:
    return f"{deployment.metadata.name}-servers"


def _servers(deployment: ModelDeployment, servers: dict[str, str]) -> Manifest:
    """The way from the activator to the servers, whoever the deployment's own Service leads to."""
    port: JSON = {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}
    spec: JSON = {"selector": servers, "ports": [port]}
    return owner_of(deployment).manifest(SERVICE, _servers_name(deployment), {"spec": spec}, LABELS)


def _network_policy(deployment: ModelDeployment) -> Manifest:
    """It may ask for names and talk to the servers of its deployment. Who may reach it, that of the servers says."""
    servers = {
        keys.LABEL_MODELDEPLOYMENT: deployment.metadata.name,
        keys.LABEL_COMPONENT: keys.COMPONENT_SERVER,
    }
    dns: JSON = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
    way: JSON = {
        "to": [{"podSelector": {"matchLabels": servers}}],
        "ports": [{"port": keys.PORT_SERVER, "protocol": "TCP"}],
    }
    spec: JSON = {
        "podSelector": {"matchLabels": activator_selector(deployment)},
        "policyTypes": ["Egress"],
        "egress": [dns, way],
    }
    return owner_of(deployment).manifest(NETWORK_POLICY, _name(deployment), {"spec": spec}, LABELS)


def _disruption_budget(deployment: ModelDeployment) -> Manifest:
    spec = movable(activator_selector(deployment))
    return owner_of(deployment).manifest(DISRUPTION_BUDGET, _name(deployment), {"spec": spec}, LABELS)


def _settings(deployment: ModelDeployment, activation: Activation, autoscaling: Autoscaling) -> ActivatorSettings:
    api, meta = activation.api, deployment.metadata
    return ActivatorSettings(
        servers_url=f"http://{_servers_name(deployment)}.{meta.namespace}.svc",
        # as many as the first server takes in
        most_requests=activation.parallel_requests + api.max_waiting_requests,
        most_bytes=max(LEAST_BYTES, api.max_body_bytes),
        max_body_bytes=api.max_body_bytes,
        hold_seconds=autoscaling.hold_seconds,
        asks_keys=api.keys_secret_ref is not None,
        grace_seconds=max(api.termination_grace_period_seconds, autoscaling.hold_seconds + 10),
    )


def _deployment(
    deployment: ModelDeployment, activation: Activation, autoscaling: Autoscaling, config: Config
) -> Manifest:
    owner, settings = owner_of(deployment), _settings(deployment, activation, autoscaling)
    chosen, secret = activator_selector(deployment), activation.api.keys_secret_ref
    memory = str(OWN_BYTES + 2 * settings.most_bytes)
    mounts: list[JSON] = [{"name": "keys", "mountPath": keys.API_KEYS_DIRECTORY, "readOnly": True}] if secret else []
    volumes: list[JSON] = (
        [{"name": "keys", "secret": {"secretName": secret.name, "optional": True}}] if secret is not None else []
    )
    workload = Workload(
        container=keys.ACTIVATOR_CONTAINER,
        module="tunesmith_server.activator",
        image=config.activator_image or config.server_image,
        plan_name="",
        resources=Resources(),
        storage=Storage(),
        restart_policy="Always",
        container_fields={
            "ports": [
                {"name": "http", "containerPort": keys.PORT_SERVER, "protocol": "TCP"},
                {"name": "health", "containerPort": keys.PORT_HEALTH, "protocol": "TCP"},
            ],
            "env": [env(keys.ENV_ACTIVATOR, settings.to_json()), env("PYTHONUNBUFFERED", "1")],
            # it waits, nearly always: little is reserved, and a storm of requests may take what is there
            "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": memory}},
            "volumeMounts": mounts,
            "startupProbe": health_probe(1, 120),
            "readinessProbe": health_probe(2, 2),
            "livenessProbe": health_probe(10, 6),
        },
        pod_fields={
            "volumes": volumes,
            "topologySpreadConstraints": [spread_over_nodes(chosen)],
            "terminationGracePeriodSeconds": settings.grace_seconds,
        },
    )
    spec: JSON = {
        "replicas": REPLICAS,
        "revisionHistoryLimit": 1,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
        "selector": {"matchLabels": chosen},
        "template": {"metadata": {"labels": owner.selector | LABELS}, "spec": pod_spec(workload, config)},
    }
    return owner.manifest(DEPLOYMENT, _name(deployment), {"spec": spec}, LABELS)
