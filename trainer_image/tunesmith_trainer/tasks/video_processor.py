"""Stands in for the part of a model's processor that reads videos. Used by `vision_chat`.

transformers reads videos with torchvision alone, and without it loads no processor that could: those of Qwen-VL and
SmolVLM2. Conversations hold images only, so all that is wanted of that part is its settings, which go with the tuned
model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import ImageProcessingMixin, processing_utils
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_processing_utils import VideoProcessorMixin

__all__ = ["UnreadVideos", "without_videos"]

KIND = "video_processor"


class UnreadVideos(ImageProcessingMixin):
    """The settings of a part that reads videos, as they are in the model's folder: attributes here, saved unchanged."""

    model_input_names = ("pixel_values_videos",)
    num_frames = fps = None
    """What SmolVLM's processor asks for even where there are no videos."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self._settings = settings

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> UnreadVideos:
        """Read the settings where transformers does.

        Raises:
            OSError: the folder has none.
        """
        return cls(VideoProcessorMixin.get_video_processor_dict(folder, **options)[0])

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they were read."""
        return copy.deepcopy(self._settings)


@contextmanager
def without_videos() -> Iterator[None]:
    """Within, transformers puts `UnreadVideos` where a processor has a part for videos.

    Nor does SmolVLM's processor need a package then that puts the number of a video's frames into words.
    """
    loaders = processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING._MAPPING_NAMES
    bases = processing_utils.MODALITY_TO_BASE_CLASS_MAPPING
    loader, base = loaders[KIND], bases[KIND]
    words = processing_smolvlm.num2words
    loaders[KIND], bases[KIND] = (__name__, UnreadVideos.__name__), ImageProcessingMixin.__name__
    processing_smolvlm.num2words = words or str
    try:
        yield
    finally:
        loaders[KIND], bases[KIND], processing_smolvlm.num2words = loader, base, words
