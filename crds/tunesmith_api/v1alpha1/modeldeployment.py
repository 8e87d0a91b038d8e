"""ModelDeployment: long-running service of a model, quantized first, rolled out by revisions."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from tunesmith_api import keys
from tunesmith_api.model import SpecModel, StatusModel, WritableUri, cel
from tunesmith_api.v1alpha1.adapters import Adapters, adapter_rules, name_of_the_base
from tunesmith_api.v1alpha1.api import Api
from tunesmith_api.v1alpha1.autoscaling import Autoscaling
from tunesmith_api.v1alpha1.common import (
    Image,
    NodeSelector,
    ObjectMeta,
    ServerResources,
    Storage,
    Tolerations,
    name_rule,
    unseen,
)
from tunesmith_api.v1alpha1.deploymentstatus import ModelDeploymentStatus
from tunesmith_api.v1alpha1.engine import Engine, pairing_rules
from tunesmith_api.v1alpha1.finetunejob import HuggingFace
from tunesmith_api.v1alpha1.gate import EvaluationSpec, Gate
from tunesmith_api.v1alpha1.quantization import Quantization
from tunesmith_api.v1alpha1.rollout import Rollout
from tunesmith_api.v1alpha1.source import Source

__all__ = ["ModelDeployment", "ModelDeploymentSpec"]


_UNCALIBRATED = "!has(self.quantization) || !has(self.quantization.calibration) || has(self.source.fineTuneJobRef) || "
_CALIBRATION_RULES = (
    cel(
        _UNCALIBRATED + "has(self.quantization.calibration.dataset)",
        "quantization.calibration needs a dataset: only a FineTuneJob brings one (dataset.train), a uri does not",
    ),
    cel(
        _UNCALIBRATED + "!has(self.quantization.calibration.dataset) || has(self.storage)",
        "quantization.calibration.dataset needs storage: say where that s3:// URI lives (storage.endpointURL, or "
        "storage: {} for AWS)",
    ),
)


class ModelDeploymentSpec(SpecModel):
    """Which model to serve, and how."""

    source: Source = Field(description="The model to serve.")
    adapters: Adapters = Field(
        default_factory=list,
        description="LoRA adapters of that model, served beside it; adding or removing one restarts nothing.",
    )
    quantization: Quantization = Field(default_factory=Quantization, description="How the weights are made smaller.")
    evaluation: EvaluationSpec | None = Field(
        default=None,
        description="Compare the quantized model with the unquantized one on held-out rows before it is rolled out; {} takes those of the FineTuneJob.",
    )
    gate: Gate | None = Field(
        default=None, description="What a new revision must keep to before it gets traffic; leave it out for no gate."
    )
    engine: Engine = Field(default_factory=Engine, description="The server that answers.")
    api: Api = Field(default_factory=Api, description="Who may use the servers, and how much one request may take.")
    replicas: int = Field(
        default=1,
        ge=0,
        le=1000,
        description="Number of server pods; 0 stops them. With autoscaling it means nothing else.",
    )
    autoscaling: Autoscaling | None = Field(
        default=None,
        description="Have the number of server pods follow the requests; leave it out where replicas says it, or an autoscaler of yours does (HPA, KEDA) through the scale subresource.",
    )
    resources: ServerResources = Field(
        default_factory=ServerResources,
        description="CPU and memory of each server pod; the server uses as many threads as it has cores.",
    )
    artifacts_uri: WritableUri | None = Field(
        default=None,
        alias="artifactsURI",
        description=(
            "Folder for the quantized files, s3://bucket/key or pvc://claim/path; leave it out for `quantized/` below "
            "the model. Pods on several nodes read a claim that allows it (ReadWriteMany)."
        ),
    )
    hugging_face: HuggingFace = Field(
        default_factory=HuggingFace, description="The Hugging Face Hub behind an hf:// source."
    )
    storage: Storage | None = Field(
        default=None, description="The object store behind the s3:// URIs; leave it out to use that of the FineTuneJob."
    )
    rollout: Rollout = Field(default_factory=Rollout, description="How a new revision takes over.")
    revision_history_limit: int = Field(
        default=5,
        ge=1,
        le=20,
        description="How many revisions the status lists, each with what is needed to go back to it.",
    )
    node_selector: NodeSelector = Field(default_factory=dict, description="Labels that a server pod's node must have.")
    tolerations: Tolerations = Field(default_factory=list, description="Taints that server pods may run beside.")
    image: Image | None = Field(
        default=None,
        description="Server image; leave it out for the one that the operator was installed with. That of VLLM is another one, and of its GPU build a third.",
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                cel(
                    "!has(self.source.uri) || !self.source.uri.startsWith('s3://') || has(self.storage)",
                    "source.uri needs storage: say where that s3:// URI lives (storage.endpointURL, or storage: {} for AWS)",
                ),
                cel(
                    "!has(self.evaluation) || has(self.evaluation.dataset) || has(self.source.fineTuneJobRef)",
                    "evaluation needs a dataset: only a FineTuneJob brings one (dataset.eval), a uri does not",
                ),
                cel(
                    "!has(self.evaluation) || !has(self.evaluation.dataset) || has(self.storage) || "
                    "has(self.source.fineTuneJobRef)",
                    "evaluation.dataset needs storage: say where that s3:// URI lives (storage.endpointURL, or storage: {} for AWS)",
                ),
                cel(
                    "!has(self.gate) || has(self.source.fineTuneJobRef) || has(self.evaluation) || "
                    "!(has(self.gate.maxPerplexityIncreasePercent) || has(self.gate.maxAccuracyDropPercent) || "
                    "has(self.gate.minAgreementPercent))",
                    "a gate on perplexity, accuracy or agreement needs held-out rows: give evaluation.dataset",
                ),
                cel(
                    "!has(self.gate) || !has(self.gate.fallbackMethod) || "
                    "!(self.quantization.method in ['Auto', self.gate.fallbackMethod] || self.gate.fallbackMethod == 'Auto')",
                    "gate.fallbackMethod and quantization.method name two different methods, neither of them Auto",
                ),
                cel(
                    "!has(self.artifactsURI) || !self.artifactsURI.startsWith('s3://') || has(self.storage) || "
                    "has(self.source.fineTuneJobRef)",
                    "artifactsURI needs storage: say where that s3:// URI lives (storage.endpointURL, or storage: {} for AWS)",
                ),
                cel(
                    "!has(self.source.uri) || !self.source.uri.startsWith('hf://') || has(self.artifactsURI)",
                    "a model of the Hub needs artifactsURI: say where its quantized files go (s3://bucket/key or "
                    "pvc://claim/path)",
                ),
                *_CALIBRATION_RULES,
                *pairing_rules(),
                *adapter_rules(),
            ]
        },
    )


class ModelDeployment(StatusModel):
    """A served model: quantized, rolled out, answering."""

    api_version: str = keys.API_VERSION
    kind: str = keys.MODELDEPLOYMENT_KIND
    metadata: ObjectMeta
    spec: ModelDeploymentSpec = Field(description="Which model to serve, and how.")
    status: ModelDeploymentStatus = Field(
        default_factory=ModelDeploymentStatus,
        description="What the operator has observed.",
        json_schema_extra=unseen(keys.DeploymentCondition.READY),
    )

    model_config = ConfigDict(
        json_schema_extra={
            "x-kubernetes-validations": [
                name_rule(keys.MODELDEPLOYMENT_KIND),
                name_of_the_base(),
                # one that was there before this rule has a status, which must be possible to write
                cel(
                    "has(self.status) || !self.metadata.name.endsWith('-workers')",
                    "metadata.name of a ModelDeployment can't end in -workers: its Service would have the name of that of "
                    "a FineTuneJob; choose another name",
                ),
            ]
        },
    )
