"""transformers and ONNX Runtime behind HTTP, inside this process: classes, embeddings, and text as a reference.

Started by `__main__`, asked by `front` and `health`. What is answered, at which paths, depends on the model: `predict`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.loopback import LoopbackEngine
from tunesmith_server.predict.answers import Handler, Refusal, Served
from tunesmith_server.predict.batching import TooBusy
from tunesmith_server.predict.classify import TextClassifier, TokenClassifier
from tunesmith_server.predict.embeddings import Encoder
from tunesmith_server.predict.generate import Generator
from tunesmith_server.predict.images import ImageClassifier
from tunesmith_server.predict.kinds import ModelKind, kind_of
from tunesmith_store.errors import UserError

__all__ = ["TransformersEngine"]

log = logging.getLogger("tunesmith.server")

LARGEST_BODY = 32 << 20


class TransformersEngine(LoopbackEngine):
    """One model, answering on loopback."""

    def __init__(
        self, plan: ServingPlan, folder: Path, threads: int, host: str = "127.0.0.1", port: int = keys.PORT_ENGINE
    ) -> None:
        """Load the model and start to answer; returns when it is loaded.

        Raises:
            UserError: the folder holds nothing that can be served.
        """
        self._name = plan.name
        self.models = {plan.name: {}}
        self.served = _load(plan, folder, threads)
        self._loop = asyncio.new_event_loop()
        started: threading.Event = threading.Event()
        self._failure: OSError | None = None
        self._port = port
        threading.Thread(target=self._run, args=(host, started), name="http", daemon=True).start()
        started.wait()
        if self._failure is not None:
            raise UserError(Reason.SERVER_FAILED, f"can't listen on port {port}: {self._failure}")
        self.url = f"http://127.0.0.1:{self._port}"

    def answers(self) -> bool:
        """Ask the model for something small and say whether an answer came."""
        path, body = self.served.sample
        return bool(self.first_answer(path, {"model": self._name, **body}))

    # ---- in the thread of the event loop

    def _run(self, host: str, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._listen(host))
        except OSError as error:
            self._failure = error
            return
        finally:
            started.set()
        self._loop.run_forever()

    async def _listen(self, host: str) -> None:
        application = web.Application(client_max_size=LARGEST_BODY)
        application.router.add_get("/health", self._health)
        for path, handler in self.served.paths.items():
            application.router.add_post(path, _in_words(handler))
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, host, self._port)
        await site.start()
        self._port = int(runner.addresses[0][1])

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


def _load(plan: ServingPlan, folder: Path, threads: int) -> Served:
    kind, longest = kind_of(folder), plan.context_length
    log.info("the model is %s", kind)
    if kind is ModelKind.TEXT_CLASSIFIER:
        return TextClassifier(folder, longest, threads)
    if kind is ModelKind.TOKEN_CLASSIFIER:
        return TokenClassifier(folder, longest, threads)
    if kind is ModelKind.IMAGE_CLASSIFIER:
        return ImageClassifier(folder, threads)
    if kind is ModelKind.ENCODER:
        return Encoder(plan.name, folder, longest, threads)
    return Generator(plan.name, folder, longest, threads)


def _in_words(handler: Handler) -> Any:
    """The handler with JSON read for it, and whatever goes wrong answered as OpenAI's API does."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request, await _body(request))
        except Refusal as refusal:
            return _error(refusal.status, refusal.message, "invalid_request_error", refusal.field)
        except TooBusy as error:
            response = _error(429, str(error), "rate_limit_exceeded", None)
            response.headers["Retry-After"] = "1"
            return response
        except web.HTTPException:
            raise
        except Exception as error:  # the model's own failure: this request's, and no other's
            log.exception("a request failed")
            return _error(500, f"the model failed: {type(error).__name__}: {error}", "server_error", None)

    return answer


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except web.HTTPRequestEntityTooLarge as error:
        raise Refusal(f"the request is larger than {LARGEST_BODY >> 20} MiB", status=413) from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refusal("the request must be a JSON object")
    return body


def _error(status: int, message: str, type_: str, field: str | None) -> web.Response:
    error = {"message": message, "type": type_, "param": field, "code": None}
    return web.json_response({"error": error}, status=status)
