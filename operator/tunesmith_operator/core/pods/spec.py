"""The pod that both kinds run: restricted Pod Security, the plan as a file, storage credentials by reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tunesmith_api import keys
from tunesmith_api.model import Contract
from tunesmith_api.plan import StoragePlan
from tunesmith_api.v1alpha1 import Resources, Storage, Toleration
from tunesmith_api.v1alpha1.common import PodTemplate
from tunesmith_api.v1alpha1.finetunejob import HuggingFace
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest, Owner
from tunesmith_operator.core.kubernetes.resources import CONFIG_MAP

__all__ = [
    "Workload",
    "claim_of",
    "env",
    "hub_env",
    "plan_config_map",
    "pod_spec",
    "secret_env",
    "storage_env",
    "storage_plan",
]

USER_ID = 65532
GRACE_SECONDS = 60
PVC = "pvc://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One of Tunesmith's containers and what it needs around it."""

    container: str
    module: str
    image: str
    plan_name: str
    resources: Resources
    storage: Storage
    gpus: int = 0
    gpu_resource: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: Sequence[Toleration] = ()
    priority_class_name: str | None = None
    template: PodTemplate = field(default_factory=PodTemplate)
    restart_policy: str = "Never"
    env: Sequence[JSON] = ()
    claims: Mapping[str, bool] = field(default_factory=dict)
    """PersistentVolumeClaims to mount below VOLUMES_DIRECTORY, and whether they are written to."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Secrets to mount, by the folder where their entries appear. One that is missing leaves the folder empty."""
    config_maps: Mapping[str, str] = field(default_factory=dict)
    """ConfigMaps to mount beside the plan, likewise."""
    container_fields: JSON = field(default_factory=dict)
    pod_fields: JSON = field(default_factory=dict)
    shared_memory: bool = False


def env(name: str, value: str) -> JSON:
    """An environment variable."""
    return {"name": name, "value": value}


def secret_env(name: str, secret: str, key: str, optional: bool = False) -> JSON:
    """An environment variable from a Secret."""
    reference: JSON = {"name": secret, "key": key}
    if optional:
        reference["optional"] = True
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def storage_env(storage: Storage) -> list[JSON]:
    """The object store's credentials where a Secret is named, and its certificate authorities where a ConfigMap is."""
    found = (
        [env(keys.ENV_CA_BUNDLE, f"{keys.CA_DIRECTORY}/{keys.CA_FILE}")] if storage.ca_bundle_ref is not None else []
    )
    if storage.secret_ref is None:
        return found
    secret = storage.secret_ref.name
    found += [secret_env(key, secret, key) for key in keys.STORAGE_SECRET_KEYS]
    return found + [secret_env(key, secret, key, optional=True) for key in keys.STORAGE_SECRET_OPTIONAL_KEYS]


def hub_env(hub: HuggingFace) -> list[JSON]:
    """The Hub's credentials, where a Secret is named."""
    if hub.secret_ref is None:
        return []
    return [secret_env(key, hub.secret_ref.name, key) for key in keys.HUB_SECRET_KEYS]


def claim_of(uri: str) -> str:
    """Name of the PersistentVolumeClaim of a `pvc://` URI; empty for other URIs."""
    return uri.removeprefix(PVC).partition("/")[0] if uri.startswith(PVC) else ""


def storage_plan(storage: Storage) -> StoragePlan:
    """The part of the storage settings that isn't secret."""
    return StoragePlan(
        endpoint_url=storage.endpoint_url, region=storage.region, addressing_style=storage.addressing_style
    )


def plan_config_map(
    owner: Owner, name: str, plan: Contract, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None
) -> Manifest:
    """The ConfigMap that a pod reads its plan from."""
    return owner.manifest(CONFIG_MAP, name, {"data": {keys.PLAN_FILE: plan.to_json()}}, labels, annotations)


def _common_env(workload: Workload) -> list[JSON]:
    def downward(path: str) -> JSON:
        return {"fieldRef": {"fieldPath": path}}

    cpu = {"containerName": workload.container, "resource": "limits.cpu", "divisor": "1m"}
    return [
        {"name": keys.ENV_POD_NAME, "valueFrom": downward("metadata.name")},
        {"name": keys.ENV_POD_IP, "valueFrom": downward("status.podIP")},
        {"name": keys.ENV_CPU_LIMIT, "valueFrom": {"resourceFieldRef": cpu}},
        env(keys.ENV_PLAN, f"{keys.PLAN_DIRECTORY}/{keys.PLAN_FILE}"),
        env(keys.ENV_SCRATCH, keys.SCRATCH_DIRECTORY),
        env(keys.ENV_TERMINATION_LOG, keys.TERMINATION_LOG),
        env("HOME", keys.SCRATCH_DIRECTORY),
        env("TMPDIR", keys.SCRATCH_DIRECTORY),
        env("PYTHONUNBUFFERED", "1"),
        *workload.env,
        *storage_env(workload.storage),
    ]


def _container(workload: Workload, config: Config) -> JSON:
    amounts = {"cpu": workload.resources.cpu, "memory": workload.resources.memory}
    if workload.gpus:
        amounts[workload.gpu_resource] = str(workload.gpus)
    mounts: list[JSON] = [
        {"name": "plan", "mountPath": keys.PLAN_DIRECTORY, "readOnly": True},
        {"name": "scratch", "mountPath": keys.SCRATCH_DIRECTORY},
    ]
    if workload.storage.ca_bundle_ref is not None:
        mounts.append({"name": "ca", "mountPath": keys.CA_DIRECTORY, "readOnly": True})
    if workload.shared_memory:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - the pod's, not this process's
    mounts += [
        {"name": volume, "mountPath": f"{keys.VOLUMES_DIRECTORY}/{claim}"} | ({} if written else {"readOnly": True})
        for volume, claim, written in _claims(workload)
    ]
    mounts += [
        {"name": volume, "mountPath": folder, "readOnly": True}
        for volume, folder, _ in (*_secret_volumes(workload), *_config_map_volumes(workload))
    ]
    return {
        "name": workload.container,
        "image": workload.image,
        "imagePullPolicy": config.image_pull_policy,
        "command": ["python3", "-m", workload.module],
        "env": _common_env(workload),
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "volumeMounts": mounts,
        # where a crash leaves no report, the end of the log says why
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        **workload.container_fields,
    }


def _claims(workload: Workload) -> list[tuple[str, str, bool]]:
    # numbered, as a claim's name may be longer than a volume's
    return [(f"claim-{number}", claim, written) for number, (claim, written) in enumerate(workload.claims.items())]


def _secret_volumes(workload: Workload) -> list[tuple[str, str, str]]:
    return [(f"secret-{number}", folder, name) for number, (folder, name) in enumerate(workload.secrets.items())]


def _config_map_volumes(workload: Workload) -> list[tuple[str, str, str]]:
    return [(f"config-{number}", folder, name) for number, (folder, name) in enumerate(workload.config_maps.items())]


def pod_spec(workload: Workload, config: Config) -> JSON:
    """A pod spec that passes the restricted Pod Security Standard and holds no Kubernetes token."""
    volumes: list[JSON] = [
        {"name": "plan", "configMap": {"name": workload.plan_name}},
        {"name": "scratch", "emptyDir": {}},
    ]
    if (ca := workload.storage.ca_bundle_ref) is not None:
        # optional, as Secrets are
        items = [{"key": ca.key, "path": keys.CA_FILE}]
        volumes.append({"name": "ca", "configMap": {"name": ca.name, "items": items, "optional": True}})
    if workload.shared_memory:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    for volume, claim, written in _claims(workload):
        source: JSON = {"claimName": claim} if written else {"claimName": claim, "readOnly": True}
        volumes.append({"name": volume, "persistentVolumeClaim": source})
    for volume, _, name in _secret_volumes(workload):
        # optional: where it is missing the program says so in its report, which a pod that waits for it can't
        volumes.append({"name": volume, "secret": {"secretName": name, "optional": True}})
    for volume, _, name in _config_map_volumes(workload):
        # optional: it comes when there is something to say
        volumes.append({"name": volume, "configMap": {"name": name, "optional": True}})
    spec: JSON = {
        "restartPolicy": workload.restart_policy,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(workload, config)],
        "volumes": volumes,
        # said where they are empty too: where pods run is the spec's to say
        "nodeSelector": dict(workload.node_selector),
        "tolerations": [
            entry.model_dump(mode="json", by_alias=True, exclude_none=True) for entry in workload.tolerations
        ],
        **workload.pod_fields,
    }
    if workload.priority_class_name:
        spec["priorityClassName"] = workload.priority_class_name
    if workload.template.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret.name} for secret in workload.template.image_pull_secrets]
    return spec
