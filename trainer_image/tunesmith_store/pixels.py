"""Pictures of any kind as RGB pixels. Called by trainer and server: a model is asked as it was taught.

Pillow alone cuts 16 bits and floats down to white or black, and shows what is transparent as black.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["to_rgb"]

WHITE = (255, 255, 255)


def to_rgb(image: Image) -> Image:
    """Return a picture in RGB: transparent parts on white, more than 8 bits scaled to 8.

    Numbers with a fraction are taken to go from 0 to 1, or to 255 where one is above 1.

    Raises:
        ValueError: its numbers fit no such range.
    """
    from PIL import Image as Images

    if image.mode == "F" or image.mode.startswith("I"):
        return _scaled(image).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        coloured = image.convert("RGBA")
        if coloured.getchannel("A").getextrema()[0] == 255:
            return image.convert("RGB")
        return Images.alpha_composite(Images.new("RGBA", image.size, (*WHITE, 255)), coloured).convert("RGB")
    return image.convert("RGB")


def _scaled(image: Image) -> Image:
    """A grey picture of more than 8 bits, or of floats, in 8 bits."""
    import numpy as np
    from PIL import Image as Images

    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and high > 255)
    most = 65535.0 if sixteen else 1.0 if image.mode == "F" and high <= 1 else 255.0
    if not (low >= 0 and high <= most):
        raise ValueError(
            f"its numbers go from {low:g} to {high:g}; save it with 8 or 16 bits, or with floats from 0 to 1"
        )
    return Images.fromarray(np.rint(values / most * 255).astype(np.uint8))
