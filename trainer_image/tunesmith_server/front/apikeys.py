"""The keys that clients must show, from the files of a mounted Secret: each of its entries is one key.

The kubelet rewrites the files when the Secret changes, so keys come and go without a restart. `server` asks for every
request, `__main__` once at the start.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from pathlib import Path

from tunesmith_server.front.errors import ApiError

__all__ = ["ApiKeys"]

FRESH_SECONDS = 1.0


class ApiKeys:
    """The keys in a folder, read again when they may have changed."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._read_at = float("-inf")
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        self._refresh()
        return len(self._digests)

    def check(self, authorization: str) -> None:
        """Let a request pass whose Authorization header has one of the keys.

        Raises:
            ApiError: it has none, or another.
        """
        scheme, _, offered = authorization.partition(" ")
        if scheme.lower() != "bearer" or not offered.strip():
            message = "You didn't provide an API key: send it as the header 'Authorization: Bearer KEY'"
            raise _refused(message, None)
        self._refresh()
        digest = _digest(offered.strip().encode(errors="surrogateescape"))
        # each one is compared, whichever it is: how long that takes tells nothing
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if not any(matches):
            raise _refused("Incorrect API key provided", "invalid_api_key")

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._read_at < FRESH_SECONDS:
            return
        self._read_at = now
        try:
            # what begins with dots is how the kubelet swaps all files at once
            files = [it for it in self._folder.iterdir() if not it.name.startswith("..")]
            texts = [it.read_bytes().strip() for it in files if it.is_file()]
        except OSError:
            texts = []
        self._digests = [_digest(text) for text in texts if text]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _refused(message: str, code: str | None) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})
