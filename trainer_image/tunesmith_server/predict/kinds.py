"""What a model folder is: a classifier, an encoder, a language model, or none of what can be served.

Asked by the engine that serves it and by the quantizers, before they load anything.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from tunesmith_api.keys import Reason
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_store.errors import UserError
from tunesmith_store.pretrained import reads_images

__all__ = ["POOLING_FILE", "ModelKind", "config_of", "kind_of", "refuse_other_than_text"]

POOLING_FILE = "1_Pooling/config.json"
"""How sentence-transformers makes one vector of many: a folder that has it is an encoder, whatever its class."""
ONNX_FILE = "model.onnx"


class ModelKind(StrEnum):
    """What a model answers with."""

    TEXT_CLASSIFIER = "a classifier of texts"
    TOKEN_CLASSIFIER = "a classifier of words"  # noqa: S105 - a kind of model, not a secret
    IMAGE_CLASSIFIER = "a classifier of images"
    ENCODER = "an encoder"
    LANGUAGE_MODEL = "a language model"

    @property
    def generates(self) -> bool:
        """Whether it goes on with a text."""
        return self is ModelKind.LANGUAGE_MODEL


_BY_SUFFIX = (
    ("ForSequenceClassification", ModelKind.TEXT_CLASSIFIER),
    ("ForTokenClassification", ModelKind.TOKEN_CLASSIFIER),
    ("ForImageClassification", ModelKind.IMAGE_CLASSIFIER),
    ("ForCausalLM", ModelKind.LANGUAGE_MODEL),
    ("LMHeadModel", ModelKind.LANGUAGE_MODEL),
    ("ForMaskedLM", ModelKind.ENCODER),
    ("ForPreTraining", ModelKind.ENCODER),
)
AUTO_CLASSES = {
    ModelKind.TEXT_CLASSIFIER: "AutoModelForSequenceClassification",
    ModelKind.TOKEN_CLASSIFIER: "AutoModelForTokenClassification",
    ModelKind.IMAGE_CLASSIFIER: "AutoModelForImageClassification",
    ModelKind.ENCODER: "AutoModel",
    ModelKind.LANGUAGE_MODEL: "AutoModelForCausalLM",
}


def config_of(folder: Path) -> dict[str, Any]:
    """Read the folder's config.json.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(Reason.MODEL_INVALID, f"the model's config.json can't be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(Reason.MODEL_INVALID, "the model's config.json holds no JSON object")
    return config


def kind_of(folder: Path) -> ModelKind:
    """Say what the folder's model is, by its architecture.

    Raises:
        UserError: no engine answers for such a model.
    """
    config = config_of(folder)
    names = config.get("architectures") or [""]
    name = str(names[0])
    if (folder / POOLING_FILE).is_file():
        return ModelKind.ENCODER
    for suffix, kind in _BY_SUFFIX:
        if name.endswith(suffix):
            return kind
    if name.endswith("Model") and _is_encoder(str(config.get("model_type", ""))):
        return ModelKind.ENCODER
    message = (
        f"a model of architecture {name or 'unknown'} can't be served: what is served are classifiers "
        "(…ForSequenceClassification, …ForTokenClassification, …ForImageClassification), encoders (such as BertModel, "
        f"or any with {POOLING_FILE}) and language models (…ForCausalLM); see `architectures` in its config.json"
    )
    raise UserError(Reason.MODEL_INVALID, message)


def refuse_other_than_text(folder: Path, engine: EngineType) -> None:
    """Refuse a classifier or an encoder for an engine that goes on with a text. What isn't known here may pass.

    A model that reads images or sounds, too, would be converted without that part, and answer as if there were none.

    Raises:
        UserError: the model is one.
    """
    try:
        config = config_of(folder)
    except UserError:
        return
    for sense, there in (("images", reads_images(config)), ("sounds", "audio_config" in config)):
        if there:
            message = (
                f"the model reads {sense} beside text, and no engine serves such a model: it would answer without "
                "them. Name a model of text alone, or load this one with transformers"
            )
            raise UserError(Reason.MODEL_INVALID, message)
    try:
        kind = kind_of(folder)
    except UserError:
        return
    if not kind.generates:
        message = f"the model is {kind}, and the engine {engine} goes on with texts: set spec.engine.type: Transformers"
        raise UserError(Reason.MODEL_INVALID, message)


def _is_encoder(model_type: str) -> bool:
    """Whether models of this type read a text from both sides: those that can guess a masked word."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
