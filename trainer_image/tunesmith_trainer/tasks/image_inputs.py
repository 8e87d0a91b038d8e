"""Images: base64 text of a row → bytes → pixels. Called by `image_classification` and `vision_chat`.

Rows hold images as base64 text, wherever they came from (`data.image_loader`). No torch: the driver checks rows, too.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith_api.keys import Reason
from tunesmith_store.errors import UserError
from tunesmith_store.pixels import to_rgb
from tunesmith_trainer.tasks.base import BadRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["decoded", "each", "from_bytes", "image_bytes", "lossless", "refuse_other_channels"]

T = TypeVar("T")
U = TypeVar("U")

MOST_THREADS = 8


def image_bytes(value: Any, where: str) -> bytes:
    """Return the file that a row's base64 text (or data URL) holds. Only its head is looked at.

    Args:
        value: what the row has.
        where: how messages call it, for example "field 'image'".

    Raises:
        BadRow: it is no image that Pillow can read.
    """
    from PIL import Image

    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{where} is no image; give base64 text, or a path below the data file's folder")
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow(f"{where} is not valid base64 text ({error}); encode the image file's bytes") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
    except Exception as error:  # Pillow's plugins raise what they like
        raise BadRow(f"{where} is not an image that can be read ({error}); use PNG, JPEG or WebP") from error
    if min(size) < 1:
        raise BadRow(f"{where} has no pixels")
    return data


def decoded(data: bytes, where: str) -> Image:
    """Return an image file's pixels in RGB, turned upright where its camera noted that it lay on its side.

    Raises:
        BadRow: the file is damaged, or larger than Pillow thinks safe.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's plugins raise what they like
        raise BadRow(f"{where} can't be decoded ({error}); the file is damaged or too large") from error


def lossless(image: Image) -> bytes:
    """Return an RGB image as WebP without loss: about half of its raw bytes, decoded in a millisecond."""
    out = io.BytesIO()
    # the least effort: half as large again takes six times as long
    image.save(out, "WEBP", lossless=True, quality=0, method=0)
    return out.getvalue()


def from_bytes(data: bytes) -> NDArray[np.uint8]:
    """Return bytes as the array that a data set stores them in: [bytes], read-only."""
    import numpy as np

    return np.frombuffer(data, np.uint8)


@cache
def _pool() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0))
    return ThreadPoolExecutor(min(MOST_THREADS, cores), "images")


def each(work: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """Do the same work on all items, in several threads: Pillow's decoders run beside each other."""
    if len(items) < 2:
        return [work(item) for item in items]
    return list(_pool().map(work, items))


def refuse_other_channels(channels: Any) -> None:
    """Refuse models of grey or many-channel images: all images are read in colour.

    Raises:
        UserError: the model doesn't take three channels.
    """
    if channels not in (None, 3):
        message = f"spec.model.uri: the model takes images of {channels} channels, and only colour (3) can be trained"
        raise UserError(Reason.MODEL_INVALID, message)
