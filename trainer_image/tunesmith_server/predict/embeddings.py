"""`POST /v1/embeddings`: one vector for each text, in the form of OpenAI's API, made as sentence-transformers would."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import web

from tunesmith_api.keys import Reason
from tunesmith_server.predict.answers import TRUNCATED_HEADER, Handler, Refusal, inputs_of, refuse_truncated, text_of
from tunesmith_server.predict.backends import load_forward, padded
from tunesmith_server.predict.batching import Batcher
from tunesmith_server.predict.kinds import POOLING_FILE, ModelKind
from tunesmith_server.predict.texts import Encoded, Texts
from tunesmith_store.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Encoder", "pooling_of"]

PATH = "/v1/embeddings"

Pooling = Callable[["NDArray[np.float32]", "NDArray[Any]"], "NDArray[np.float32]"]
"""Hidden states [texts, tokens, width] and attention mask → vectors [texts, width]."""


def _mean(hidden: NDArray[np.float32], mask: NDArray[Any]) -> NDArray[np.float32]:
    weights = mask[..., None].astype(np.float32)
    return np.asarray((hidden * weights).sum(1) / weights.sum(1), np.float32)


def _mean_sqrt(hidden: NDArray[np.float32], mask: NDArray[Any]) -> NDArray[np.float32]:
    weights = mask[..., None].astype(np.float32)
    return np.asarray((hidden * weights).sum(1) / np.sqrt(weights.sum(1)), np.float32)


def _max(hidden: NDArray[np.float32], mask: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(np.where(mask[..., None] > 0, hidden, -np.inf).max(1), np.float32)


def _first(hidden: NDArray[np.float32], mask: NDArray[Any]) -> NDArray[np.float32]:
    return hidden[:, 0]


def _last(hidden: NDArray[np.float32], mask: NDArray[Any]) -> NDArray[np.float32]:
    return hidden[np.arange(len(hidden)), mask.sum(1) - 1]


_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_cls_token": _first,
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_max_tokens": _max,
    "pooling_mode_mean_sqrt_len_tokens": _mean_sqrt,
    "pooling_mode_lasttoken": _last,
}


def pooling_of(folder: Path) -> list[Pooling]:
    """Return how many vectors become one: as the folder's pooling file says, else their mean.

    Raises:
        UserError: it asks for what isn't known here.
    """
    path = folder / POOLING_FILE
    if not path.is_file():
        return [_mean]
    try:
        config = json.loads(path.read_bytes())
        asked = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    except (ValueError, AttributeError) as error:
        raise UserError(Reason.MODEL_INVALID, f"{POOLING_FILE} can't be read: {error}") from error
    unknown = [name for name in asked if name not in _POOLINGS]
    if unknown or not asked:
        message = f"{POOLING_FILE} asks for {', '.join(unknown) or 'no pooling'}; known are {', '.join(_POOLINGS)}"
        raise UserError(Reason.MODEL_INVALID, message)
    return [_POOLINGS[name] for name in asked]


def normalizes(folder: Path) -> bool:
    """Say whether vectors get length 1, and refuse what else modules.json would do to them.

    Raises:
        UserError: it has a part that isn't known here, such as a dense layer.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return False
    try:
        kinds = [str(it["type"]).rsplit(".", 1)[-1] for it in json.loads(path.read_bytes())]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(Reason.MODEL_INVALID, f"modules.json can't be read: {error!r}") from error
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        message = f"modules.json has {', '.join(sorted(unknown))}, without which its vectors would be others"
        raise UserError(Reason.MODEL_INVALID, f"{message}: known are Transformer, Pooling and Normalize")
    return "Normalize" in kinds


class Encoder:
    """Texts → vectors."""

    def __init__(self, name: str, folder: Path, longest: int, threads: int) -> None:
        self._name = name
        self._pool, self._normalize = pooling_of(folder), normalizes(folder)
        self._texts = Texts(folder, longest)
        padding = self._texts.tokenizer.pad_token_id
        self._padding = 0 if padding is None else int(padding)
        self._forward = load_forward(folder, ModelKind.ENCODER, threads)
        self.batcher = Batcher(self._compute)

    @property
    def paths(self) -> Mapping[str, Handler]:
        """What it answers to."""
        return {PATH: self.embed}

    @property
    def sample(self) -> tuple[str, dict[str, Any]]:
        """A request that only the model can answer."""
        return PATH, {"input": "Hello"}

    async def embed(self, _request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        """Answer with one vector for each text."""
        texts = [text_of(value, "input") for value in inputs_of(body, "input")]
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise Refusal("encoding_format must be float or base64", "encoding_format")
        if body.get("dimensions") is not None:
            raise Refusal("dimensions can't be chosen: this model's vectors have one length", "dimensions")
        items = await asyncio.to_thread(self._texts.encode, [(text, None) for text in texts])
        truncated = sum(item.truncated for item in items)
        refuse_truncated(truncated, body, "input", self._texts.longest)
        vectors = await self.batcher.answers(items)
        tokens = sum(item.length for item in items)
        answer = {
            "object": "list",
            "model": self._name,
            "data": [
                {"object": "embedding", "index": number, "embedding": _written(vector, encoding)}
                for number, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return web.json_response(answer, headers={TRUNCATED_HEADER: str(truncated)})

    def _compute(self, batch: Sequence[Encoded]) -> Sequence[NDArray[np.float32]]:
        arrays = padded(batch, self._padding)
        hidden = self._forward(arrays)
        vectors = np.concatenate([pool(hidden, arrays["attention_mask"]) for pool in self._pool], axis=-1)
        if self._normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return list(vectors)


def _written(vector: NDArray[np.float32], encoding: str) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(number) for number in vector]
