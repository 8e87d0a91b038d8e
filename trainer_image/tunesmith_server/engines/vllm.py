"""vLLM's OpenAI-compatible server, a process of its own on loopback. Started by `__main__`, asked by `front`, `health`.

It is installed in an image of its own beside this code, with CUDA or for CPU. `vllm_flags` says how it is started.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.base import LocalAdapter
from tunesmith_server.engines.loopback import LoopbackEngine
from tunesmith_server.engines.vllm_flags import cache_bytes, environment, facts_of, flags
from tunesmith_store.errors import Failure, Retryable, UserError
from tunesmith_store.memory import oom_kills, spare_memory

__all__ = ["VllmEngine", "refusal"]

log = logging.getLogger("tunesmith.server")

MODULE = "vllm.entrypoints.openai.api_server"
"""The command `vllm` of the CPU build asks for the metadata of a distribution of that name, which it hasn't."""
LOOK_SECONDS = 0.5
STOP_SECONDS = 10.0
LAST_LINES_SECONDS = 2.0
LINES_KEPT = 400
LOAD_SECONDS = 300
COMPLAINT = re.compile(
    r"(?:Value error, |\b[A-Z]\w*Error: )(?!Engine core initialization failed|\d+ validation error)(.+)"
)
CHATTER = re.compile(r" (?:INFO|WARNING) ")
NO_VLLM = re.compile(r"No module named '?vllm'?\)?$")


class VllmEngine(LoopbackEngine):
    """One model, answering on loopback. When it ends, this pod is to end: `failure` says so."""

    tools = False
    loads_adapters = True

    def __init__(
        self,
        plan: ServingPlan,
        model: Path,
        threads: int,
        port: int = keys.PORT_ENGINE,
        python: str = sys.executable,
        adapters: Sequence[LocalAdapter] = (),
    ) -> None:
        """Start the server; returns when it has loaded the model and those of the adapters that it can.

        Raises:
            Failure: vLLM refuses the model, the pod is too small for it, or it ended for another reason.
        """
        facts = facts_of(model)
        cache = 0 if plan.gpus else cache_bytes(plan, facts, spare_memory())
        self.url = f"http://127.0.0.1:{port}"
        self.vocabulary = facts.vocabulary
        self._name = plan.name
        self._has_places = plan.lora
        self._loaded: dict[str, LocalAdapter] = {}
        self.models = {plan.name: {}}
        self._said: deque[str] = deque(maxlen=LINES_KEPT)
        self._closed = False
        self._oom_kills = oom_kills()
        # a session of its own: what it starts ends with it, and a terminal's Ctrl-C is this process's to handle
        self._process = subprocess.Popen(
            [python, "-m", MODULE, *flags(plan, model, facts, port, cache)],
            env={**os.environ, **environment(plan, threads)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._listener = threading.Thread(target=self._listen, name="vllm", daemon=True)
        self._listener.start()
        while not self.is_alive():
            if (failure := self.failure) is not None:
                self.close()
                raise failure
            time.sleep(LOOK_SECONDS)
        self.load(adapters)

    @property
    def failure(self) -> Failure | None:
        """Why it answers no more; None while it does, and once it has been closed."""
        status = self._process.poll()
        if status is None or self._closed:
            return None
        self._listener.join(LAST_LINES_SECONDS)
        return refusal(status, tuple(self._said), oom_kills() > self._oom_kills)

    def answers(self) -> bool:
        """Ask for one token and say whether an answer came: to a bare text, as a base model has no chat template."""
        body = {"model": self._name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
        answer = self.first_answer("/v1/completions", body) or {}
        return bool(answer.get("usage", {}).get("completion_tokens"))

    def load(self, adapters: Sequence[LocalAdapter]) -> tuple[LocalAdapter, ...]:
        """Load those that it hasn't; return those that are there now."""
        if adapters and not self._has_places:
            log.warning("this revision was started without adapters: the next one has them")
            adapters = ()
        for adapter in adapters:
            if self._loaded.get(adapter.name) == adapter:
                continue
            body = {
                "lora_name": adapter.name,
                "lora_path": str(adapter.path),
                "load_inplace": adapter.name in self._loaded,
            }
            if self._told("/v1/load_lora_adapter", body):
                self._loaded[adapter.name] = adapter
        there = tuple(it for it in adapters if self._loaded.get(it.name) == it)
        self.models = {self._name: {}, **{it.name: {} for it in there}}
        return there

    def unload_others(self) -> None:
        """Let go of adapters that are no longer among `models`."""
        for name in self._loaded.keys() - self.models.keys():
            self._told("/v1/unload_lora_adapter", {"lora_name": name})
            del self._loaded[name]

    def _told(self, path: str, body: dict[str, Any]) -> bool:
        """Whether the server has done what it was told; why it hasn't stands in the log."""
        try:
            self._request(path, json.dumps(body).encode(), LOAD_SECONDS)
        except urllib.error.HTTPError as error:
            log.error("%s of adapter %s: %s", path, body["lora_name"], error.read().decode(errors="replace")[:1000])
        except OSError as error:
            log.error("%s of adapter %s: %s", path, body["lora_name"], error)
        else:
            return True
        return False

    def close(self) -> None:
        """End the server and all that it has started."""
        self._closed = True
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _listen(self) -> None:
        """Hand on what it says, and keep the end of it: why it ends stands there."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line.rstrip())
            sys.stdout.write(line)
            sys.stdout.flush()


def refusal(status: int, said: Sequence[str], out_of_memory: bool = False) -> Failure:
    """Return what it means that the server has ended with this status, having said these lines at last."""
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    found = [match[1] for line in said if not CHATTER.search(line) and (match := COMPLAINT.search(line))]
    complaint = found[0] if found else ""
    if out_of_memory or status == -signal.SIGKILL:
        message = "vLLM ran out of the pod's memory: raise spec.resources.memory"
        return UserError(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)
    if any(NO_VLLM.search(line) for line in said):
        message = (
            "this image has no vLLM in it: leave spec.image out, or name one built from trainer_image/vllm.Dockerfile"
        )
        return UserError(Reason.SERVER_FAILED, message)
    if "max_model_len" in complaint and "greater than" in complaint:
        facts = complaint.partition(". ")[0]  # on the way around it that follows, answers turn to nonsense
        message = f"lower spec.engine.contextLength, which is vLLM's max_model_len: {facts}"
        return UserError(Reason.MODEL_INVALID, message)
    if "KV cache" in complaint or "out of memory" in complaint.lower():
        message = (
            f"vLLM finds too little memory: {complaint}; raise spec.engine.gpus, or lower spec.engine.contextLength"
        )
        return UserError(Reason.OUT_OF_MEMORY, message, ExitCode.OUT_OF_MEMORY)
    if "are not supported" in complaint:
        return UserError(Reason.MODEL_INVALID, f"vLLM can't serve this model: {complaint}")
    return Retryable(f"vLLM's server has ended ({how}){f': {complaint}' if complaint else ''}", Reason.SERVER_FAILED)
