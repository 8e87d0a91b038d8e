"""llama.cpp's OpenAI-compatible server, inside this process. Started by `__main__`, asked by `front` and `health`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.base import AHEAD, LocalAdapter
from tunesmith_server.engines.loopback import LoopbackEngine
from tunesmith_store.errors import UserError

__all__ = ["LlamaEngine"]

LOG_ERRORS = 1  # llama.cpp's levels: 2 warning, a line for every request once the prompt cache is full; 3 more lines


class LlamaEngine(LoopbackEngine):
    """One model, answering on loopback."""

    def __init__(
        self,
        plan: ServingPlan,
        model: Path,
        threads: int,
        port: int = keys.PORT_ENGINE,
        cache_bytes: int = 0,
        adapters: Sequence[LocalAdapter] = (),
    ) -> None:
        """Load the model and its adapters and start to answer; returns when they are loaded.

        `cache_bytes` bounds the prompt cache: the state of past prompts, for those to come that begin alike.

        Raises:
            UserError: llama.cpp refuses the file.
        """
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.model_alias = {plan.name}
        parameters.hostnames = ["127.0.0.1"]
        parameters.port = port
        parameters.n_ctx = plan.context_length * plan.parallel_requests
        parameters.n_parallel = plan.parallel_requests
        parameters.cpuparams.n_threads = threads
        parameters.cpuparams_batch.n_threads = threads
        # each open connection holds one: those of `front`, of probes and of metrics
        parameters.n_threads_http = plan.parallel_requests + AHEAD + 4
        # on CPU its lower precision changes greedy answers of 8-bit models: "capital of France" was not Paris
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.endpoint_metrics = True
        parameters.endpoint_slots = False  # it shows other people's prompts
        parameters.ui = False
        # a conversation that ends with the model's own words is to be answered, not to be continued in them
        parameters.prefill_assistant = False
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(it.path), 0.0) for it in adapters]
        # unbounded but for 8 GiB unless told: different prompts alone would fill the pod's memory until it is killed.
        # It finds states by their tokens, whichever adapter they are of: with adapters there is none
        parameters.cache_ram_mib = 0 if adapters else cache_bytes >> 20
        # a slot's state goes there when another prompt takes the slot: before that it would only be there twice
        parameters.cache_idle_slots = False
        parameters.verbosity = LOG_ERRORS
        try:
            self._server: Any = xllamacpp.Server(parameters)
        except RuntimeError as error:
            message = f"llama.cpp can't load {plan.artifact_uri}: {error}; is spec.resources.memory large enough?"
            raise UserError(Reason.SERVER_FAILED, message) from error
        self.url = self._server.listening_address
        names = [it.name for it in adapters]
        self.models = {name: _scales(names, name) for name in (plan.name, *names)}
        self._name = plan.name

    def close(self) -> None:
        """Stop answering and give the memory back."""
        self._server = None

    def answers(self, model: str = "") -> bool:
        """Ask for one token, of the model itself or with an adapter, and say whether an answer came."""
        name = model or self._name
        body = {
            **self.models[name],
            "model": name,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
            "temperature": 0,
        }
        answer = self.first_answer("/v1/chat/completions", body) or {}
        return bool(answer.get("usage", {}).get("completion_tokens"))


def _scales(adapters: Sequence[str], chosen: str) -> dict[str, Any]:
    """How much of each adapter a request gets. All are named: one that says nothing keeps the state of the last."""
    return {"lora": [{"id": at, "scale": float(it == chosen)} for at, it in enumerate(adapters)]} if adapters else {}
