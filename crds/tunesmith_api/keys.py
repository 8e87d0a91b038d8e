"""Every name that crosses a boundary: labels, annotations, environment, ports, paths, conditions, reasons, exit codes.

Operator, trainer, server and charts use these constants and no literals of their own, so that a rename is one change.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Final

GROUP: Final = "tunesmith.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
FINETUNEJOB_KIND: Final = "FineTuneJob"
FINETUNEJOB_PLURAL: Final = "finetunejobs"
MODELDEPLOYMENT_KIND: Final = "ModelDeployment"
MODELDEPLOYMENT_PLURAL: Final = "modeldeployments"

FIELD_MANAGER: Final = "tunesmith-operator"

# labels on every child; the operator watches children by LABEL_MANAGED_BY
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
MANAGED_BY: Final = "tunesmith"
LABEL_COMPONENT: Final = "app.kubernetes.io/component"
LABEL_FINETUNEJOB: Final = f"{GROUP}/finetunejob"
LABEL_MODELDEPLOYMENT: Final = f"{GROUP}/modeldeployment"
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
LABEL_REVISION: Final = f"{GROUP}/revision"
LABEL_ADAPTER: Final = f"{GROUP}/adapter"
ANNOTATION_SPEC_HASH: Final = f"{GROUP}/spec-hash"
ANNOTATION_REVISION_HASH: Final = f"{GROUP}/revision-hash"
ANNOTATION_STANDS_IN_FOR: Final = f"{GROUP}/stands-in-for"

# Kueue's: the queue of a FineTuneJob and its priority there, which its Job gets too; and of a Workload, whose Job it is
LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"
LABEL_QUEUE_PRIORITY: Final = "kueue.x-k8s.io/priority-class"
QUEUE_LABELS: Final = (LABEL_QUEUE, LABEL_QUEUE_PRIORITY)
LABEL_WORKLOAD_JOB: Final = "kueue.x-k8s.io/job-uid"

COMPONENT_TRAINER: Final = "trainer"
COMPONENT_QUANTIZE: Final = "quantize"
COMPONENT_ADAPTERS: Final = "adapters"
COMPONENT_SERVER: Final = "server"
COMPONENT_ACTIVATOR: Final = "activator"
TRAINER_CONTAINER: Final = "trainer"
QUANTIZE_CONTAINER: Final = "quantize"
SERVER_CONTAINER: Final = "server"
ACTIVATOR_CONTAINER: Final = "activator"

# what a pod finds
PLAN_DIRECTORY: Final = "/etc/tunesmith"
PLAN_FILE: Final = "plan.json"
SCRATCH_DIRECTORY: Final = "/scratch"
CA_DIRECTORY: Final = "/etc/tunesmith-ca"
CA_FILE: Final = "ca.crt"
API_KEYS_DIRECTORY: Final = "/etc/tunesmith-api-keys"
ADAPTERS_DIRECTORY: Final = "/etc/tunesmith-adapters"
ADAPTERS_FILE: Final = "adapters.json"
TERMINATION_LOG: Final = "/dev/termination-log"
ENV_PLAN: Final = "TUNESMITH_PLAN"
ENV_SCRATCH: Final = "TUNESMITH_SCRATCH"
ENV_CA_BUNDLE: Final = "AWS_CA_BUNDLE"
"""File of the certificate authorities of the object store; boto3 reads it."""
ENV_API_KEYS: Final = "TUNESMITH_API_KEYS"
ENV_ADAPTERS: Final = "TUNESMITH_ADAPTERS"
ENV_ACTIVATOR: Final = "TUNESMITH_ACTIVATOR"
ENV_TERMINATION_LOG: Final = "TUNESMITH_TERMINATION_LOG"
ENV_POD_IP: Final = "POD_IP"
ENV_POD_NAME: Final = "POD_NAME"
ENV_WORKER_INDEX: Final = "JOB_COMPLETION_INDEX"
ENV_RAY_TOKEN: Final = "RAY_AUTH_TOKEN"
RAY_TOKEN_KEY: Final = "token"
ENV_CPU_LIMIT: Final = "TUNESMITH_CPU_MILLICORES"
# keys of the Secret that storage.secretRef names, and the environment variables that they become
STORAGE_SECRET_KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
STORAGE_SECRET_OPTIONAL_KEYS: Final = ("AWS_SESSION_TOKEN",)
HUB_SECRET_KEYS: Final = ("HF_TOKEN",)
MLFLOW_SECRET_OPTIONAL_KEYS: Final = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
# a PersistentVolumeClaim of a pvc:// URI is mounted below this folder, by its name
VOLUMES_DIRECTORY: Final = "/mnt/tunesmith"
ENV_VOLUMES: Final = "TUNESMITH_VOLUMES"
ENV_PROCESSES: Final = "TUNESMITH_PROCESSES"
"""Training processes in this pod; 1 where it is absent."""
# where one "pod" does all the work on a machine that it shares with others (the command line): its progress port, and
# the port of Ray's head
ENV_PROGRESS_PORT: Final = "TUNESMITH_PROGRESS_PORT"
ENV_RAY_PORT: Final = "TUNESMITH_RAY_PORT"

PORT_PROGRESS: Final = 8080
PORT_SERVER: Final = 8000
PORT_ENGINE: Final = 8001  # on loopback: clients reach it through PORT_SERVER alone
PORT_HEALTH: Final = 8080  # server pods: PATH_HEALTH is 200 once a real answer was produced
PORT_RAY_GCS: Final = 6379
PATH_PROGRESS: Final = "/progress"
PATH_METRICS: Final = "/metrics"
PATH_HEALTH: Final = "/healthz"
METRIC_ADAPTERS: Final = "tunesmith_adapter_info"
"""Of a server pod, for each adapter that it serves: labels `name` and `digest`, that of its artefact."""
# the metrics by which the operator scales: of server pods, and of activators
METRIC_IN_FLIGHT: Final = "http_requests_in_flight"
METRIC_HELD: Final = "tunesmith_activator_requests_held"

CHECKPOINT_MANIFEST: Final = "manifest.json"
MODEL_MANIFEST: Final = "tunesmith-manifest.json"


class ExitCode(IntEnum):
    """Exit codes of a trainer or quantize pod. The Job's podFailurePolicy tells them apart."""

    SUCCESS = 0
    CRASHED = 1  # retried, counted against the backoff limit
    INVALID_INPUT = 40  # the user's spec, data or model: a retry can't help
    STORAGE_DENIED = 41  # a bucket is missing, unreadable or unwritable
    OUT_OF_MEMORY = 42  # accelerator or host memory: a retry needs a smaller micro-batch
    DIVERGED = 43  # loss or gradients are not finite, or spiked more often than may be rolled back
    COLLECTIVE_TIMEOUT = 45  # a worker hung in a collective operation more often than may be restarted; retried
    INTERRUPTED = 75  # SIGTERM: a checkpoint was saved; run me again


TERMINAL_EXIT_CODES: Final = (
    ExitCode.INVALID_INPUT,
    ExitCode.STORAGE_DENIED,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.DIVERGED,
)


class JobCondition(StrEnum):
    """Condition types of a FineTuneJob. `Succeeded` sums up: Unknown while it may still happen."""

    ACCEPTED = "Accepted"
    CHILDREN_APPLIED = "ChildrenApplied"
    WORKERS_READY = "WorkersReady"
    CHECKPOINT_AVAILABLE = "CheckpointAvailable"
    SUCCEEDED = "Succeeded"


class DeploymentCondition(StrEnum):
    """Condition types of a ModelDeployment. `Ready` sums up."""

    ACCEPTED = "Accepted"
    ARTIFACT_READY = "ArtifactReady"
    QUALITY_HELD = "QualityHeld"
    CHILDREN_APPLIED = "ChildrenApplied"
    ADAPTERS_READY = "AdaptersReady"
    PROGRESSING = "Progressing"
    AVAILABLE = "Available"
    READY = "Ready"


class Reason(StrEnum):
    """Stable reasons of conditions, events and termination reports. Each has an entry in docs/runbook."""

    # accepted or refused
    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    APPLIED = "Applied"
    APPLY_FAILED = "ApplyFailed"
    REPAIRED = "Repaired"
    # a pod that can't start
    PENDING = "Pending"
    QUOTA_PENDING = "QuotaPending"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    SECRET_NOT_FOUND = "SecretNotFound"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    POD_REJECTED = "PodRejected"
    STARTUP_TIMEOUT = "StartupTimeout"
    # a job under way
    STARTING = "Starting"
    TRAINING = "Training"
    WORKERS_READY = "WorkersReady"
    WORKERS_MISSING = "WorkersMissing"
    RESTARTING = "Restarting"
    SUSPENDED = "Suspended"
    CHECKPOINT_SAVED = "CheckpointSaved"
    NO_CHECKPOINT = "NoCheckpointYet"
    # how a job ends
    COMPLETED = "Completed"
    DATASET_INVALID = "DatasetInvalid"
    DATASET_NOT_FOUND = "DatasetNotFound"
    MODEL_INVALID = "ModelInvalid"
    MODEL_NOT_FOUND = "ModelNotFound"
    STORAGE_UNREADABLE = "StorageUnreadable"
    STORAGE_UNWRITABLE = "StorageUnwritable"
    STORAGE_UNREACHABLE = "StorageUnreachable"
    OUTPUT_EXISTS = "OutputExists"
    FOLDER_IN_USE = "FolderInUse"
    OUT_OF_MEMORY = "OutOfMemory"
    DIVERGED = "Diverged"
    COLLECTIVE_TIMEOUT = "CollectiveTimeout"
    DISK_FULL = "DiskFull"
    WORKER_CRASHED = "WorkerCrashed"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    BUDGET_EXCEEDED = "BudgetExceeded"
    INTERRUPTED = "Interrupted"
    JOB_DELETED = "JobDeleted"
    # a deployment
    SOURCE_NOT_FOUND = "SourceNotFound"
    SOURCE_NOT_READY = "SourceNotReady"
    QUANTIZING = "Quantizing"
    QUANTIZED = "Quantized"
    QUANTIZATION_FAILED = "QuantizationFailed"
    QUALITY_GATE_PASSED = "QualityGatePassed"
    QUALITY_GATE_FAILED = "QualityGateFailed"
    NOT_EVALUATED = "NotEvaluated"
    ROLLING_OUT = "RollingOut"
    ROLLED_OUT = "RolledOut"
    PAUSED = "Paused"
    ROLLED_BACK = "RolledBack"
    ABORTED = "Aborted"
    SUPERSEDED = "Superseded"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    REPLICAS_AVAILABLE = "ReplicasAvailable"
    REPLICAS_UNAVAILABLE = "ReplicasUnavailable"
    SCALED_TO_ZERO = "ScaledToZero"
    WAKING = "Waking"
    SCALING_UP = "ScalingUp"
    SERVER_FAILED = "ServerFailed"
    ADAPTERS_SERVED = "AdaptersServed"
    ADAPTERS_LOADING = "AdaptersLoading"
    ADAPTER_INVALID = "AdapterInvalid"
    MEMORY_TOO_SMALL = "MemoryTooSmall"
