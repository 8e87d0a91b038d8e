"""What both kinds share: metadata, conditions, storage, resources, placement."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from tunesmith_api.keys import GROUP, Reason
from tunesmith_api.model import EndpointURL, Quantity, SpecModel, StatusModel, cel

__all__ = [
    "MAX_NAME_LENGTH",
    "NEVER",
    "AddressingStyle",
    "CaBundleRef",
    "Condition",
    "ConditionStatus",
    "ObjectMeta",
    "PodTemplate",
    "Resources",
    "SecretRef",
    "ServerResources",
    "Storage",
    "Toleration",
    "name_rule",
    "unseen",
]

MAX_NAME_LENGTH = 40
"""Longest name of a FineTuneJob or ModelDeployment: pod hostnames add a suffix and must stay within 63."""


def name_rule(kind: str) -> dict[str, Any]:
    """The root CEL rule that keeps names short enough for the children's DNS names."""
    return cel(
        f"self.metadata.name.size() <= {MAX_NAME_LENGTH} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        f"metadata.name of a {kind} becomes a DNS name: use at most {MAX_NAME_LENGTH} lower-case letters, digits and "
        "'-', beginning with a letter",
    )


class ObjectMeta(StatusModel):
    """The part of Kubernetes object metadata that the operator reads."""

    name: str
    namespace: str = "default"
    uid: str = ""
    generation: int = 1
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


def keyed_by(field: str) -> dict[str, Any]:
    """`json_schema_extra` of a list whose entries Kubernetes tells apart by a field: appliers own entries, not the list."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [field]}


class ConditionStatus(StrEnum):
    """Whether a condition holds."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(StatusModel):
    """One observation about the object, as in metav1.Condition."""

    type: Annotated[str, Field(max_length=316)] = Field(description="What is observed, in CamelCase.")
    status: ConditionStatus = Field(description="True, False or Unknown.")
    reason: Annotated[str, Field(max_length=1024)] = Field(
        description="Stable CamelCase cause, made for programs; explained in the runbook."
    )
    message: Annotated[str, Field(max_length=4096)] = Field(
        default="", description="What happened and what to do, made for people."
    )
    last_transition_time: str = Field(
        description="When `status` last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int = Field(
        default=0, ge=0, description="The metadata.generation that this observation is about."
    )


NEVER = "1970-01-01T00:00:00Z"
"""When a condition last changed that only the API server has set."""


def unseen(summary: str) -> dict[str, Any]:
    """`json_schema_extra` of a status: what the API server says of an object before the operator has said anything."""
    condition = Condition(
        type=summary,
        status=ConditionStatus.UNKNOWN,
        reason=Reason.PENDING,
        message="Waiting for the operator.",
        last_transition_time=NEVER,
    )
    known = condition.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return {"default": {"phase": Reason.PENDING.value, "conditions": [known]}}


OptionalTime = Annotated[str | None, Field(json_schema_extra={"format": "date-time"})]
Conditions = Annotated[list[Condition], Field(max_length=16, json_schema_extra=keyed_by("type"))]


class SecretRef(SpecModel):
    """A Secret in the same namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="Name of the Secret.")


class AddressingStyle(StrEnum):
    """Where the bucket stands in the address of an S3 request."""

    AUTO = "Auto"
    PATH = "Path"
    VIRTUAL = "Virtual"


class CaBundleRef(SpecModel):
    """A ConfigMap in the same namespace that holds certificates."""

    name: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="Name of the ConfigMap.")
    key: Annotated[str, Field(min_length=1, max_length=253)] = Field(
        default="ca.crt", description="Its key with the certificates, in PEM, one after the other."
    )


class Storage(SpecModel):
    """How to reach the S3-compatible object store behind every `s3://` URI of this object."""

    endpoint_url: EndpointURL | None = Field(
        default=None,
        alias="endpointURL",
        description="Address of the S3 API, for example http://s3.storage.svc:8333. Leave it out for AWS itself.",
    )
    region: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        default="us-east-1", description="Region that requests are signed for."
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN where "
        "needed. Leave it out where the pods get their identity otherwise or the store is open.",
    )
    addressing_style: AddressingStyle = Field(
        default=AddressingStyle.AUTO,
        description="Path: the bucket is in the path (http://store/bucket/key), Virtual: in the host name (http://bucket.store/key). Auto is Path where endpointURL is given, and AWS's own way else. Some stores (Alibaba OSS, for one) take Virtual only.",
    )
    ca_bundle_ref: CaBundleRef | None = Field(
        default=None,
        description="ConfigMap with the certificate authorities that the store's certificate is checked by, in place of the public ones.",
    )


class Resources(SpecModel):
    """Compute resources of one pod. Memory is both request and limit; CPU likewise."""

    cpu: Quantity = Field(default="1", description="CPU cores of each pod, for example 500m or 4.")
    memory: Quantity = Field(default="4Gi", description="Memory of each pod, for example 4Gi.")


class ServerResources(SpecModel):
    """Compute resources of one server pod. Memory is both request and limit; CPU likewise."""

    cpu: Quantity = Field(default="1", description="CPU cores of each pod, for example 500m or 4.")
    memory: Quantity | None = Field(
        default=None,
        description=(
            "Memory of each pod, for example 4Gi; leave it out for what the quantized model turns out to need "
            "(status.revisions[].memoryBytes). The quantize Job then has 4Gi."
        ),
    )

    @property
    def resolved(self) -> Resources:
        """Those of a Job, and of a server whose artefact says nothing of its memory."""
        return Resources.model_validate(self.model_dump(exclude_none=True))


class Toleration(SpecModel):
    """A taint that the pods may run beside, as in core/v1."""

    key: Annotated[str, Field(max_length=316)] | None = Field(
        default=None, description="Taint key; leave it out to match all keys with operator Exists."
    )
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="How `value` is compared.")
    value: Annotated[str, Field(max_length=63)] | None = Field(
        default=None, description="Taint value to match with operator Equal."
    )
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        default=None, description="Taint effect to match; leave it out to match all."
    )
    toleration_seconds: int | None = Field(default=None, ge=0, description="How long a NoExecute taint is tolerated.")


_OWN_KEYS = cel(
    f"!self.exists(key, key.startsWith('{GROUP}/'))",
    f"labels and annotations of {GROUP} are the operator's own: leave them out",
)
_LABELS: dict[str, Any] = {"x-kubernetes-validations": [_OWN_KEYS]}


class PodTemplate(SpecModel):
    """What a platform wants to see on pods: for cost reports, service meshes, autoscalers, registries."""

    labels: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] = Field(
        default_factory=dict,
        description="Labels of the pods, for example sidecar.istio.io/inject: 'false'.",
        json_schema_extra=_LABELS,
    )
    annotations: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=16)] = Field(
        default_factory=dict,
        description="Annotations of the pods, for example karpenter.sh/do-not-disrupt: 'true'.",
        json_schema_extra=_LABELS,
    )
    image_pull_secrets: Annotated[list[SecretRef], Field(max_length=8, json_schema_extra=keyed_by("name"))] = Field(
        default_factory=list,
        description="Secrets with the registry's credentials, of type kubernetes.io/dockerconfigjson.",
    )


NodeSelector = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)]
Tolerations = Annotated[list[Toleration], Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "atomic"})]
Image = Annotated[str, Field(min_length=1, max_length=512)]
