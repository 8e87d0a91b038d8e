"""ImageClassification: an image → one class, by a vision transformer or any other of transformers' image classifiers.

Resizing and cropping are done once, when the data are encoded, by the model's own image processor; its arithmetic on
numbers (scaling to 0…1, mean and deviation) is done on the device, for the whole batch. What is stored in between are
8-bit pixels without loss: a small part of the bytes that floats would take, decoded in a millisecond or less.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_trainer.tasks.base import Batch, Example, Row
from tunesmith_trainer.tasks.classes import model_names
from tunesmith_trainer.tasks.classifier import Classifier
from tunesmith_trainer.tasks.collator import indices_of, stack
from tunesmith_trainer.tasks.fields import field_of
from tunesmith_trainer.tasks.image_inputs import decoded, each, from_bytes, image_bytes, lossless, refuse_other_channels
from tunesmith_trainer.tasks.objectives import SingleLabel, load_with_head

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import nn

__all__ = ["ImageClassification", "PixelPipeline"]

USUAL_PATCH = 16
"""Pixels on a side of what counts as one token where the model knows no patches."""


@dataclass(frozen=True)
class PixelPipeline:
    """A model's image processor, cut in two: geometry (Pillow, 8-bit pixels) and arithmetic (torch, on the device)."""

    processor: Any
    height: int
    width: int

    @classmethod
    def of(cls, processor: Any) -> PixelPipeline:
        """Cut a processor in two, and make sure that the halves do what the whole does.

        Raises:
            UserError: they don't, or images come out in different sizes.
        """
        import numpy as np
        from PIL import Image

        samples = [
            Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
            for size in ((53, 37), (300, 480))
        ]
        try:
            whole = [processor(images=image, return_tensors="pt")["pixel_values"][0] for image in samples]
            heights, widths = ({part.shape[axis] for part in whole} for axis in (-2, -1))
            if len(heights) > 1 or len(widths) > 1:
                raise ValueError("it makes images of different sizes")
            pipeline = cls(processor, heights.pop(), widths.pop())
            halves = pipeline.arithmetic(np.stack([pipeline.geometry(image) for image in samples]), "cpu")
        except Exception as error:  # whatever a processor of another kind raises
            raise UserError(Reason.MODEL_INVALID, f"{_NO_GOOD}: {error}") from error
        if any((one - other).abs().max() > 1e-4 for one, other in zip(halves, whole, strict=True)):
            raise UserError(Reason.MODEL_INVALID, f"{_NO_GOOD}: it does more than resize, crop, scale and normalize")
        return pipeline

    def geometry(self, image: Image) -> NDArray[np.uint8]:
        """Resize and crop: an RGB image → [height, width, 3]."""
        import numpy as np

        found = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")
        return np.ascontiguousarray(found["pixel_values"][0].transpose(1, 2, 0).astype(np.uint8))

    def arithmetic(self, pixels: NDArray[np.uint8], device: torch.device | str) -> torch.Tensor:
        """Scale and normalize on the device: [images, height, width, 3] → [images, 3, height, width] float32."""
        import torch

        settings = self.processor
        scale = torch.full((3,), settings.rescale_factor if settings.do_rescale else 1.0)
        shift = torch.zeros(3)
        if settings.do_normalize:
            deviation = torch.tensor(settings.image_std).expand(3)
            scale, shift = scale / deviation, torch.tensor(settings.image_mean).expand(3) / deviation
        scale, shift = (numbers.to(device).reshape(1, 3, 1, 1) for numbers in (scale, shift))
        return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().contiguous().mul_(scale).sub_(shift)


_NO_GOOD = "spec.model.uri: the model's image processor (preprocessor_config.json) can't be used"


class ImageClassification(Classifier):
    """Images with one class each."""

    pipeline_tag = "image-classification"

    def __init__(self, plan: TrainingPlan) -> None:
        columns = plan.dataset.columns
        super().__init__(plan, SingleLabel(plan, columns.label))
        self.image = columns.image
        self._patches = 0
        self._native_size: Any = None
        self._arguments: dict[str, Any] = {}

    # ---- rows

    def check_row(self, row: Row) -> None:
        self._file(row)
        self.labels_of(row)

    def _file(self, row: Row) -> bytes:
        return image_bytes(field_of(row, self.image, "image"), f"field {self.image!r}")

    # ---- setting up

    def load_processor(self, folder: Path) -> Any:
        from transformers import AutoImageProcessor

        self._model_names = model_names(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        refuse_other_channels(config.get("num_channels"))
        try:
            # Pillow's arithmetic, whether torchvision is there or not: results don't depend on what is installed
            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a broken folder makes transformers raise
            raise UserError(Reason.MODEL_INVALID, f"{_NO_GOOD}: {error}") from error
        self.pipeline = PixelPipeline.of(processor)
        self._patches = self._patch_count(config)
        self._native_size = config.get("image_size")
        self.processor = processor
        return processor

    def _patch_count(self, config: Mapping[str, Any]) -> int:
        patch = config.get("patch_size") or USUAL_PATCH
        tall, wide = patch if isinstance(patch, list) else (patch, patch)
        return max(1, (self.pipeline.height // tall) * (self.pipeline.width // wide))

    @property
    def longest(self) -> int:
        return self._patches

    def encode(self, row: Row) -> list[Example]:
        target = self.objective.target(field_of(row, self.label, "label"))
        data = self._file(row)
        image = decoded(data, f"field {self.image!r}")
        # an image that would be blown up is kept as it is: its own bytes are fewer, and resizing it takes no longer
        resized = image.width * image.height > self.pipeline.width * self.pipeline.height
        if resized:
            from PIL import Image as Images

            data = lossless(Images.fromarray(self.pipeline.geometry(image)))
        features = {"image": from_bytes(data), "resized": [int(resized)], "labels": [target]}
        return [Example(features, self._patches, self.objective.units(target))]

    def load_model(self, folder: Path, **options: Any) -> nn.Module:
        from transformers import AutoModelForImageClassification

        head = self.objective.config_options()
        model = load_with_head(AutoModelForImageClassification, folder, self.plan.training.seed, **head, **options)
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):  # for pre-training only: DDP would wait for its gradient for ever
                parameter.requires_grad_(False)
        size = self._native_size if isinstance(self._native_size, list) else [self._native_size] * 2
        if size != [self.pipeline.height, self.pipeline.width] and (
            "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        ):
            self._arguments = {"interpolate_pos_encoding": True}
        return model

    # ---- computing

    def collate(self, examples: Sequence[Example], device: torch.device, packed: bool) -> Batch:
        import numpy as np

        pixels = self.pipeline.arithmetic(np.stack(each(self._pixels, examples)), device)
        labels = stack(examples, "labels", device)[:, 0]
        units = sum(example.units for example in examples)
        return Batch({"pixel_values": pixels, **self._arguments}, labels, units, {"indices": indices_of(examples)})

    def _pixels(self, example: Example) -> NDArray[np.uint8]:
        import numpy as np

        image = decoded(example.features["image"].tobytes(), "a stored image")
        return np.asarray(image) if example.features["resized"][0] else self.pipeline.geometry(image)
