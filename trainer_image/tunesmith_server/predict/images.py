"""`POST /classify` of images: each is sent as base64, as the Hugging Face inference API takes them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import web

from tunesmith_api.keys import Reason
from tunesmith_server.predict.answers import Handler, Refusal, boolean, inputs_of
from tunesmith_server.predict.backends import load_forward
from tunesmith_server.predict.batching import Batcher
from tunesmith_server.predict.classify import PATH, Labels
from tunesmith_server.predict.kinds import ModelKind, config_of
from tunesmith_store.errors import UserError
from tunesmith_store.pixels import to_rgb

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["ImageClassifier"]

MOST_PIXELS = 64_000_000
TOKENS_OF_AN_IMAGE = 256
"""What one counts as where batches are bounded: 224 × 224 pixels in patches of 14 or 16."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """An image as the model reads it."""

    values: NDArray[np.float32]
    length: int = TOKENS_OF_AN_IMAGE


class ImageClassifier:
    """Every label of each image with its score."""

    def __init__(self, folder: Path, threads: int) -> None:
        from transformers import AutoImageProcessor

        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # whatever a broken folder makes transformers raise
            raise UserError(Reason.MODEL_INVALID, f"the model's image processor can't be loaded: {error}") from error
        self._forward = load_forward(folder, ModelKind.IMAGE_CLASSIFIER, threads)
        self._config = config_of(folder)
        self.batcher = Batcher(self._compute)

    @property
    def paths(self) -> Mapping[str, Handler]:
        """What it answers to."""
        return {PATH: self.classify}

    @property
    def sample(self) -> tuple[str, dict[str, Any]]:
        """A request that only the model can answer."""
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (32, 32), "gray").save(file, "PNG")
        return PATH, {"inputs": base64.b64encode(file.getvalue()).decode()}

    async def classify(self, _request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Answer with one list for each image."""
        values = inputs_of(body, "inputs")
        raw = boolean(body, "raw_scores", False)
        items = await asyncio.to_thread(lambda: [self._pixels(value) for value in values])
        found = await self.batcher.answers(items)
        labels = Labels(self._config, len(found[0]))
        return web.json_response([labels.ranked(logits if raw else labels.scores(logits)) for logits in found])

    def _pixels(self, value: Any) -> Pixels:
        found = self._processor(images=_image(value), return_tensors="np")["pixel_values"]
        return Pixels(np.asarray(found, np.float32)[0])

    def _compute(self, batch: Sequence[Pixels]) -> Sequence[NDArray[np.float32]]:
        return list(self._forward({"pixel_values": np.stack([item.values for item in batch])}))


def _image(value: Any) -> Image:
    from PIL import Image

    if not isinstance(value, str):
        raise Refusal("inputs must be an image's file in base64, or a list of them", "inputs")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)))
        if image.width * image.height > MOST_PIXELS:
            raise Refusal(f"inputs: an image of {image.width} x {image.height} pixels is too large", "inputs", 413)
        return to_rgb(image)
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal(f"inputs: this is no image in base64: {error}", "inputs") from error
