"""The kinds of Kubernetes objects that the operator watches and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tunesmith_api import keys

__all__ = [
    "CONFIG_MAP",
    "DEPLOYMENT",
    "DISRUPTION_BUDGET",
    "EVENT",
    "FINETUNEJOB",
    "JOB",
    "MODELDEPLOYMENT",
    "NETWORK_POLICY",
    "POD",
    "SECRET",
    "SERVICE",
    "Key",
    "Resource",
]


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Names one custom resource: what the work queue holds."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind, as the API server serves it."""

    group: str
    version: str
    kind: str
    plural: str

    @property
    def api_version(self) -> str:
        """`group/version`, or the version alone in the core group."""
        return f"{self.group}/{self.version}" if self.group else self.version


FINETUNEJOB: Final = Resource(keys.GROUP, keys.VERSION, keys.FINETUNEJOB_KIND, keys.FINETUNEJOB_PLURAL)
MODELDEPLOYMENT: Final = Resource(keys.GROUP, keys.VERSION, keys.MODELDEPLOYMENT_KIND, keys.MODELDEPLOYMENT_PLURAL)
JOB: Final = Resource("batch", "v1", "Job", "jobs")
POD: Final = Resource("", "v1", "Pod", "pods")
SERVICE: Final = Resource("", "v1", "Service", "services")
CONFIG_MAP: Final = Resource("", "v1", "ConfigMap", "configmaps")
SECRET: Final = Resource("", "v1", "Secret", "secrets")
EVENT: Final = Resource("", "v1", "Event", "events")
DEPLOYMENT: Final = Resource("apps", "v1", "Deployment", "deployments")
NETWORK_POLICY: Final = Resource("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies")
DISRUPTION_BUDGET: Final = Resource("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets")
