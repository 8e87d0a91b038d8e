"""Real small images, from scikit-learn: handwritten digits, and pieces of its two photographs with questions and answers."""

from __future__ import annotations

import base64
import io
import random
from typing import Any

PLACES = ("Is this a building or a flower?", "What do you see?")


def to_base64(image: Any, form: str = "PNG") -> str:
    """A Pillow image as the base64 text of a row."""
    out = io.BytesIO()
    image.save(out, form)
    return base64.b64encode(out.getvalue()).decode()


def from_base64(text: str) -> Any:
    """The image of a row again."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def digits(count: int, start: int = 0, classes: int = 10) -> list[dict[str, Any]]:
    """Rows {image, label} of handwritten digits of 8 × 8 pixels; no row of one range is in another."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    chosen = [number for number, label in enumerate(found.target) if label < classes][start : start + count]
    return [
        {
            "image": to_base64(Image.fromarray((found.images[number] * 255 / 16).astype(np.uint8))),
            "label": int(found.target[number]),
        }
        for number in chosen
    ]


def photographs() -> tuple[Any, Any]:
    """A Chinese palace and a flower, 640 × 427 pixels each, as Pillow images."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    china, flower = load_sample_images().images
    return Image.fromarray(china), Image.fromarray(flower)


def picture_questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations about pieces of the photographs: which of the two it is. Some show two pieces, some none."""
    rng = random.Random(seed)
    photos = photographs()
    rows = []
    for number in range(count):
        shown = [(number + turn) % 2 for turn in range((1, 1, 2, 0)[number % 4])]
        pieces = [_piece(photos[which], rng) for which in shown]
        answer = " and ".join(("building", "flower")[which] for which in shown) or "nothing"
        parts = [{"type": "image"} for _ in pieces] + [{"type": "text", "text": PLACES[number % len(PLACES)]}]
        rows.append(
            {
                "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
                "images": [to_base64(piece) for piece in pieces],
            }
        )
    return rows


def _piece(photo: Any, rng: random.Random) -> Any:
    width, height = rng.choice((24, 40, 64)), rng.choice((24, 40))
    left, top = rng.randrange(160, 480 - width), rng.randrange(120, 320 - height)
    return photo.crop((left, top, left + width, top + height))
