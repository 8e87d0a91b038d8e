"""Spec and source → the template of a revision: its ServingPlan, and the digest that identifies it."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith_api.model import digest_of
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.modeldeployment.observed import revision_name
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.pods.spec import storage_plan

__all__ = ["Template", "template_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Everything but the number and the replica count of a revision: what its children are built from."""

    deployment: ModelDeployment
    source: SourceModel
    image: str
    artifact_uri: str
    hash: str

    def plan(self, number: int) -> ServingPlan:
        """What the pods of this revision need to know."""
        spec, meta = self.deployment.spec, self.deployment.metadata
        return ServingPlan(
            name=meta.name,
            namespace=meta.namespace,
            uid=meta.uid,
            revision=revision_name(self.deployment, number),
            model_uri=self.source.uri,
            model_digest=self.source.digest,
            quantization=spec.quantization.method,
            engine=spec.engine.type,
            context_length=spec.engine.context_length,
            parallel_requests=spec.engine.parallel_requests,
            artifact_uri=self.artifact_uri,
            storage=storage_plan(self.source.storage),
        )


def template_of(deployment: ModelDeployment, source: SourceModel, config: Config) -> Template:
    """Resolve spec and source.

    The artefact's folder depends only on what decides its bytes: revisions that differ in resources or image share it.
    """
    spec = deployment.spec
    model_uri = source.uri.rstrip("/")
    content = digest_of([model_uri, source.digest, spec.quantization.method.value, spec.engine.type.value])[:12]
    folder = (spec.artifacts_uri or f"{model_uri}/quantized").rstrip("/")
    image = spec.image or config.server_image
    identity = {
        "content": content,
        "folder": folder,
        "image": image,
        "spec": spec.model_dump(
            mode="json", by_alias=True, include={"engine", "resources", "node_selector", "tolerations"}
        ),
        "storage": source.storage.model_dump(mode="json", by_alias=True),
    }
    return Template(
        deployment=deployment,
        source=SourceModel(model_uri, source.digest, source.storage),
        image=image,
        artifact_uri=f"{folder}/{spec.quantization.method.value.lower()}-{content}",
        hash=digest_of(identity)[:16],
    )
