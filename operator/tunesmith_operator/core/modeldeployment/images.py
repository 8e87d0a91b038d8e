"""The image of a revision's pods: the spec's, else the operator's for the engine. Asked by `decide` and `template`."""

from __future__ import annotations

from tunesmith_api.v1alpha1 import ModelDeployment
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_operator.core.config import Config
from tunesmith_operator.core.reconcile.rules import Violation

__all__ = ["image_for", "image_missing"]


def image_for(deployment: ModelDeployment, engine: EngineType, config: Config) -> str:
    """The image that quantizes and serves with an engine; empty where there is none."""
    spec = deployment.spec
    if spec.image is not None:
        return spec.image
    if engine is not EngineType.VLLM:
        return config.server_image
    return config.vllm_gpu_image if spec.engine.gpus else config.vllm_image


def image_missing(deployment: ModelDeployment, config: Config) -> Violation | None:
    """The engine VLLM has images of its own, with which an operator may not have been installed."""
    if image_for(deployment, deployment.spec.engine.type, config):
        return None
    setting = "vllmGpuImage" if deployment.spec.engine.gpus else "vllmImage"
    return Violation(
        f"the engine VLLM has images of its own, and the operator was installed without: name one in {setting} of its "
        "chart or in spec.image (docs/modeldeployment.md says how it is built)"
    )
