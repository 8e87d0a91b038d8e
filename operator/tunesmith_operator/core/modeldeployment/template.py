"""Spec and source → the template of a revision: its ServingPlan, and the digest that identifies it.

A revision's ConfigMap keeps its template beside the plan. So its children can be made again as they were when the spec
has moved on, or says something that can't be carried out, or its source is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import Field, ValidationError

from tunesmith_api import keys
from tunesmith_api.model import Contract, digest_of
from tunesmith_api.plan import CalibrationPlan, EvaluationPlan, ServingPlan
from tunesmith_api.v1alpha1 import ModelDeployment, Storage, Toleration
from tunesmith_api.v1alpha1.common import ServerResources
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.finetunejob import HuggingFace
from tunesmith_api.v1alpha1.modeldeployment import ModelDeploymentSpec
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.kubernetes.objects import ConfigMapView
from tunesmith_operator.core.modeldeployment.calibration import calibration_plan
from tunesmith_operator.core.modeldeployment.engines import engine_for, method_for
from tunesmith_operator.core.modeldeployment.heldout import evaluation_plan
from tunesmith_operator.core.modeldeployment.images import image_for
from tunesmith_operator.core.modeldeployment.observed import revision_name
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.pods.spec import storage_plan

__all__ = ["TEMPLATE_FILE", "Pods", "Template", "stored_template", "template_of"]

TEMPLATE_FILE: Final = "template.json"
"""Beside the plan in a revision's ConfigMap."""


class Pods(Contract):
    """What a revision's pods are made of besides their plan."""

    image: str
    resources: ServerResources
    storage: Storage
    node_selector: dict[str, str]
    tolerations: list[Toleration]
    hugging_face: HuggingFace = Field(default_factory=HuggingFace)
    gpus: int = 0
    gpu_resource: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Everything but the number and the replica count of a revision: what its children are built from.

    `plan` is without the revision's name, which `plan_of` sets.
    """

    deployment: ModelDeployment
    plan: ServingPlan
    pods: Pods
    hash: str
    stands_in_for: str = ""

    @property
    def artifact_uri(self) -> str:
        """Folder below which the quantized files lie."""
        return self.plan.artifact_uri

    def plan_of(self, number: int) -> ServingPlan:
        """What the pods of this revision need to know."""
        return self.plan.model_copy(update={"revision": revision_name(self.deployment, number)})


def template_of(deployment: ModelDeployment, source: SourceModel, config: Config) -> Template:
    """Resolve spec and source.

    Artefacts are named by what decides their bytes, in the Job that sees it: revisions that differ in resources or
    image share one.
    """
    spec, meta = deployment.spec, deployment.metadata
    model_uri = source.uri.rstrip("/")
    engine = engine_for(spec.engine.type, spec.quantization.method, source.task)
    method = method_for(spec.quantization.method, engine, source.rehearsed)
    content = digest_of([model_uri, source.digest, method.value, engine.value])[:12]
    folder = (spec.artifacts_uri or f"{model_uri}/quantized").rstrip("/")
    image = image_for(deployment, engine, config)
    fixed = spec.model_copy(update={"engine": spec.engine.model_copy(update={"type": engine})})
    evaluation = evaluation_plan(deployment, source.held_out)
    identity: dict[str, object] = {
        "content": content,
        "folder": folder,
        "image": image,
        "spec": fixed.model_dump(
            mode="json",
            by_alias=True,
            include={"engine", "api", "resources", "node_selector", "tolerations"},
            exclude={"engine": {"gpus", "gpu"}},
        ),
        "storage": source.storage.model_dump(mode="json", by_alias=True),
    }
    calibration = calibration_plan(deployment, method, source.training)
    ignore = tuple(spec.quantization.ignore) if method is not QuantizationMethod.NONE else ()
    lora = engine is EngineType.VLLM and bool(spec.adapters)
    identity |= _asked_of_vllm(spec, lora) | _asked_of_the_job(calibration, ignore, evaluation)
    if model_uri.startswith("hf://"):
        identity["hub"] = [spec.source.revision, spec.hugging_face.model_dump(mode="json", by_alias=True)]
    plan = ServingPlan(
        name=meta.name,
        namespace=meta.namespace,
        uid=meta.uid,
        revision="",
        model_uri=model_uri,
        model_digest=source.digest,
        model_revision=spec.source.revision,
        quantization=method,
        engine=engine,
        context_length=spec.engine.context_length,
        parallel_requests=spec.engine.parallel_requests,
        gpus=spec.engine.gpus,
        lora=lora,
        api=spec.api,
        artifact_uri=folder,
        evaluation=evaluation,
        calibration=calibration,
        ignore=ignore,
        storage=storage_plan(source.storage),
        hub_endpoint_url=spec.hugging_face.endpoint_url,
    )
    pods = _pods(spec, source.storage, image)
    return Template(deployment=deployment, plan=plan, pods=pods, hash=digest_of(identity)[:16])


def _pods(spec: ModelDeploymentSpec, storage: Storage, image: str) -> Pods:
    return Pods(
        image=image,
        resources=spec.resources,
        storage=storage,
        node_selector=spec.node_selector,
        tolerations=spec.tolerations,
        hugging_face=spec.hugging_face,
        gpus=spec.engine.gpus,
        gpu_resource=spec.engine.gpu.resource_name if spec.engine.gpus else "",
    )


def _asked_of_vllm(spec: ModelDeploymentSpec, lora: bool) -> dict[str, object]:
    """GPUs, and places for adapters, with which it has to be started: the first of them makes a revision."""
    found: dict[str, object] = {"lora": True} if lora else {}
    return found | ({"gpus": [spec.engine.gpus, spec.engine.gpu.resource_name]} if spec.engine.gpus else {})


def _asked_of_the_job(
    calibration: CalibrationPlan | None, ignore: tuple[str, ...], evaluation: EvaluationPlan | None
) -> dict[str, object]:
    """What makes another revision, where it is asked for: those of before there was such a thing stay as they are."""
    found: dict[str, object] = {}
    if calibration is not None or ignore:
        rows = calibration.model_dump(mode="json", by_alias=True) if calibration is not None else None
        found["quantization"] = [rows, *ignore]
    if evaluation is not None:
        fields = evaluation.model_dump(mode="json", by_alias=True)
        later = ("textField", "textPairField", "labelField")
        found["evaluation"] = {it: fields[it] for it in fields if it not in later or fields[it] is not None}
    return found


def stored_template(deployment: ModelDeployment, config_map: ConfigMapView | None) -> Template | None:
    """The template that a revision was made from; None where its ConfigMap is gone or another version wrote it."""
    if config_map is None:
        return None
    try:
        plan = ServingPlan.from_json(config_map.data.get(keys.PLAN_FILE, ""))
        pods = Pods.from_json(config_map.data.get(TEMPLATE_FILE, ""))
    except ValidationError:
        return None
    annotations = config_map.annotations
    return Template(
        deployment=deployment,
        plan=plan,
        pods=pods,
        hash=annotations.get(keys.ANNOTATION_REVISION_HASH, ""),
        stands_in_for=annotations.get(keys.ANNOTATION_STANDS_IN_FOR, ""),
    )
