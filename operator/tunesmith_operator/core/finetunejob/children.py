"""Plan → manifests: one plain function for each child of a FineTuneJob."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tunesmith_api import keys
from tunesmith_api.model import digest_of
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobSpec
from tunesmith_api.v1alpha1.common import PodTemplate
from tunesmith_api.v1alpha1.finetunejob import Workers
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.finetunejob.observed import child_name, owner_of, service_name
from tunesmith_operator.core.finetunejob.training_plan import training_plan
from tunesmith_operator.core.finetunejob.uris import claims
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.resources import JOB, NETWORK_POLICY, SECRET, SERVICE
from tunesmith_operator.core.kubernetes.workloads import JOB_FIELDS, pod_failure_policy
from tunesmith_operator.core.pods.spec import Workload, env, hub_env, plan_config_map, pod_spec, secret_env
from tunesmith_operator.core.pods.startup import STORAGE_SECRET, SecretUse

__all__ = ["ANNOTATION_FIXED_HASH", "ANNOTATION_RESTARTS_BEFORE", "ChildManifests", "build", "secret_uses"]

ANNOTATION_FIXED_HASH: Final = f"{keys.GROUP}/fixed-hash"
"""On a Job: hash of all in it that Kubernetes never lets change."""
ANNOTATION_RESTARTS_BEFORE: Final = f"{keys.GROUP}/restarts-before"
"""On a Job: how often training had been resumed before this Job was created. Keeps the count across a deleted Job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildManifests:
    """What to write for the children of one attempt, in the order in which they are written."""

    service: Manifest
    network_policy: Manifest
    config_map: Manifest
    secret: Manifest
    job: Manifest


def _labels(attempt: int) -> dict[str, str]:
    return {keys.LABEL_COMPONENT: keys.COMPONENT_TRAINER, keys.LABEL_ATTEMPT: str(attempt)}


def _queue_labels(job: FineTuneJob) -> dict[str, str]:
    """Of the Job alone: where its pods had them, Kueue would queue each by itself."""
    return {name: job.metadata.labels[name] for name in keys.QUEUE_LABELS if job.metadata.labels.get(name)}


def _secret_name(job: FineTuneJob, attempt: int) -> str:
    # the uid keeps a job from finding the Secret of a deleted one of the same name: the operator can't read Secrets
    return f"{child_name(job, attempt)}-ray-{job.metadata.uid[:5]}"


def service(job: FineTuneJob) -> Manifest:
    """The headless Service that gives the pods their names, ready or not."""
    owner = owner_of(job)
    ports = [("gcs", keys.PORT_RAY_GCS), ("progress", keys.PORT_PROGRESS)]
    spec: JSON = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {keys.LABEL_FINETUNEJOB: owner.name, keys.LABEL_COMPONENT: keys.COMPONENT_TRAINER},
        "ports": [{"name": name, "port": port, "targetPort": port, "protocol": "TCP"} for name, port in ports],
    }
    return owner.manifest(SERVICE, service_name(job), {"spec": spec}, {keys.LABEL_COMPONENT: keys.COMPONENT_TRAINER})


def network_policy(job: FineTuneJob, config: Config) -> Manifest:
    """The job's pods reach each other; the operator reaches their progress; nobody else gets in."""
    owner = owner_of(job)
    progress: JSON = {"ports": [{"port": keys.PORT_PROGRESS, "protocol": "TCP"}]}
    if config.operator_namespace:
        home = {"kubernetes.io/metadata.name": config.operator_namespace}
        progress["from"] = [{"namespaceSelector": {"matchLabels": home}}]
    peers: JSON = {"from": [{"podSelector": {"matchLabels": {keys.LABEL_FINETUNEJOB: owner.name}}}]}
    spec: JSON = {
        "podSelector": {"matchLabels": {keys.LABEL_FINETUNEJOB: owner.name}},
        "policyTypes": ["Ingress"],
        "ingress": [peers, progress],
    }
    return owner.manifest(
        NETWORK_POLICY, service_name(job), {"spec": spec}, {keys.LABEL_COMPONENT: keys.COMPONENT_TRAINER}
    )


def secret_uses(job: FineTuneJob) -> tuple[SecretUse, ...]:
    """The Secrets without which the pods can't start."""
    storage, hub = job.spec.storage.secret_ref, job.spec.hugging_face.secret_ref
    found = [SecretUse(STORAGE_SECRET.field, STORAGE_SECRET.keys, storage.name)] if storage is not None else []
    found += [SecretUse("huggingFace.secretRef", keys.HUB_SECRET_KEYS, hub.name)] if hub is not None else []
    return tuple(found)


def _account_env(spec: FineTuneJobSpec) -> list[JSON]:
    """Credentials of the Hub and of the tracking server, by reference."""
    found = hub_env(spec.hugging_face)
    mlflow = spec.tracking.mlflow
    if mlflow is not None and mlflow.secret_ref is not None:
        name = mlflow.secret_ref.name
        found += [secret_env(key, name, key, optional=True) for key in keys.MLFLOW_SECRET_OPTIONAL_KEYS]
    return found


def _processes_env(workers: Workers) -> list[JSON]:
    # left out for one, the default: Jobs of an operator that knew of no others stay as they are
    return [env(keys.ENV_PROCESSES, str(workers.processes))] if workers.processes > 1 else []


def _workload(job: FineTuneJob, config: Config, attempt: int) -> Workload:
    workers = job.spec.workers
    probe: JSON = {
        "httpGet": {"path": keys.PATH_HEALTH, "port": "progress"},
        "periodSeconds": 2,
        "timeoutSeconds": 2,
        "failureThreshold": 3,
    }
    return Workload(
        container=keys.TRAINER_CONTAINER,
        module="tunesmith_trainer",
        image=workers.image or config.trainer_image,
        plan_name=child_name(job, attempt),
        resources=workers.resources,
        storage=job.spec.storage,
        gpus=workers.gpus_per_worker,
        gpu_resource=workers.gpu.resource_name,
        node_selector=workers.node_selector,
        tolerations=workers.tolerations,
        priority_class_name=workers.priority_class_name,
        template=workers.pod_template,
        env=[
            env("RAY_TMPDIR", keys.SCRATCH_DIRECTORY),
            env("RAY_AUTH_MODE", "token"),
            secret_env(keys.ENV_RAY_TOKEN, _secret_name(job, attempt), keys.RAY_TOKEN_KEY),
            env(keys.ENV_VOLUMES, keys.VOLUMES_DIRECTORY),
            *_processes_env(workers),
            *_account_env(job.spec),
        ],
        claims=claims(job.spec),
        container_fields={
            "ports": [
                {"name": "progress", "containerPort": keys.PORT_PROGRESS, "protocol": "TCP"},
                {"name": "gcs", "containerPort": keys.PORT_RAY_GCS, "protocol": "TCP"},
            ],
            "readinessProbe": probe,
        },
        pod_fields={"subdomain": service_name(job)},
        shared_memory=True,
    )


def _template_metadata(template: PodTemplate, own: dict[str, str]) -> JSON:
    # own labels last: Services and NetworkPolicies select by them
    metadata: JSON = {"labels": template.labels | own}
    return metadata | ({"annotations": template.annotations} if template.annotations else {})


def trainer_job(job: FineTuneJob, config: Config, attempt: int, restarts_before: int = 0) -> Manifest:
    """The Indexed Job whose pods form the Ray cluster. Index 0 decides: when it succeeds, the others are stopped."""
    owner, spec = owner_of(job), job.spec
    labels, queue = _labels(attempt), _queue_labels(job)
    fields: JSON = {
        "completionMode": "Indexed",
        "completions": spec.workers.replicas,
        "parallelism": spec.workers.replicas,
        # not backoffLimitPerIndex: with it the Job controller keeps its finalizer on a failed pod until that is
        # replaced, which a namespace that is being deleted never allows, and the namespace would stay for ever
        "backoffLimit": spec.failure_policy.backoff_limit,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": pod_failure_policy(keys.TRAINER_CONTAINER, (keys.ExitCode.INTERRUPTED,)),
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
        # a queued Job waits until Kueue admits it, and `suspend` is Kueue's from then on
        "suspend": spec.suspend or keys.LABEL_QUEUE in queue,
        "template": {
            "metadata": _template_metadata(spec.workers.pod_template, owner.selector | labels),
            "spec": pod_spec(_workload(job, config, attempt), config),
        },
    }
    if spec.active_deadline_seconds is not None:
        fields["activeDeadlineSeconds"] = spec.active_deadline_seconds
    fixed = {name: value for name, value in fields.items() if name not in JOB_FIELDS}
    annotations = {ANNOTATION_FIXED_HASH: digest_of(fixed)[:16]}
    if restarts_before:
        annotations[ANNOTATION_RESTARTS_BEFORE] = str(restarts_before)
    return owner.manifest(JOB, child_name(job, attempt), {"spec": fields}, labels | queue, annotations)


def build(job: FineTuneJob, config: Config, attempt: int, restarts_before: int = 0) -> ChildManifests:
    """The manifests of all children of an attempt."""
    owner, labels, name = owner_of(job), _labels(attempt), child_name(job, attempt)
    return ChildManifests(
        service=service(job),
        network_policy=network_policy(job, config),
        config_map=plan_config_map(owner, name, training_plan(job, attempt), labels),
        secret=owner.manifest(SECRET, _secret_name(job, attempt), {"type": "Opaque"}, labels),
        job=trainer_job(job, config, attempt, restarts_before),
    )
