"""`python -m tunesmith_trainer.models.sizes`: a model's config.json and its files' headers, from where it lies.

Reads a SizesRequest from standard input and writes a SizesAnswer. `tunesmith plan` starts it, which knows no store
itself. Of the weights a few kilobytes are read, whatever their size; torch is not imported.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tunesmith_api.keys import Reason
from tunesmith_api.memory.headers import LENGTH_BYTES, StoredTensor, header_size, is_weights, parse_header
from tunesmith_api.memory.reading import ModelFiles, SizesAnswer, SizesRequest
from tunesmith_store.errors import Failure, UserError
from tunesmith_store.files import model_files
from tunesmith_store.router import open_store
from tunesmith_store.store import NotFound, ObjectStore

__all__ = ["main", "read_sizes"]

AT_ONCE = 8


def read_sizes(store: ObjectStore, uri: str, field: str) -> ModelFiles:
    """Read what a model's files say of it; `field` is the spec's name of `uri`, for messages.

    Raises:
        UserError: there is no model.
        Retryable: the store can't be reached.
    """
    uri = uri.rstrip("/")
    objects, _ = model_files(store, uri, field)
    weights = sorted(info.uri for info in objects if is_weights(info.uri))
    try:
        config = json.loads(store.get_bytes(f"{uri}/config.json"))
        if not isinstance(config, dict):
            raise ValueError("config.json is no model's")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = list(pool.map(partial(_header, store), weights))
    except NotFound as error:
        raise UserError(Reason.MODEL_INVALID, f"{field} {uri}: config.json is missing") from error
    except ValueError as error:
        raise UserError(Reason.MODEL_INVALID, f"{field} {uri}: {error}") from error
    return ModelFiles(config=config, tensors=tuple(tensor for each in found for tensor in each))


def _header(store: ObjectStore, uri: str) -> list[StoredTensor]:
    try:
        size = header_size(store.get_range(uri, 0, LENGTH_BYTES))
        return parse_header(store.get_range(uri, LENGTH_BYTES, size))
    except ValueError as error:
        raise ValueError(f"{uri.rpartition('/')[2]}: {error}") from error


def main() -> None:
    """Answer one request."""
    request = SizesRequest.from_json(sys.stdin.buffer.read())
    store = open_store(request.storage, request.hub_endpoint_url, request.revisions)
    try:
        answer = SizesAnswer(models={field: read_sizes(store, uri, field) for field, uri in request.uris.items()})
    except Failure as error:
        answer = SizesAnswer(problem=error.message)
    sys.stdout.write(answer.to_json())


if __name__ == "__main__":
    main()
