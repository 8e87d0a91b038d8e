"""The figures of serving, each beside its peer in the same run. `measure` of `__main__` calls them; `__main__` prints them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.controlplane.measure import percentile
from bench.runs import Figures, compared, median, repeated, run_module, say
from bench.serving import classifier
from bench.serving.clients import Message, first_token_seconds, load, whole
from bench.serving.servers import Server, bare, cores, ours, plan_of
from bench.serving.workload import Prompts, model_file
from tunesmith_api.reports import ModelRef
from tunesmith_operator.core.modeldeployment.memory import need_of
from tunesmith_server.quantizers.gguf_files import opened
from tunesmith_server.quantizers.gguf_shape import shape_of

__all__ = ["FIGURES", "Bench"]

CONTEXT, PARALLEL = 1024, 8
ANSWER_TOKENS = 24
DECODED = 128
PER_CLIENT = 6
PREFIX_WORDS = 200
DIFFERENT_PROMPTS = 2000


@dataclass
class Bench:
    """How often everything is measured, and what it is measured with."""

    runs: int
    different_prompts: int = DIFFERENT_PROMPTS
    prompts: Prompts = field(default_factory=Prompts)
    model: Path = field(default_factory=model_file)

    # ---- one answer at a time

    def decode_vs_engine(self) -> Figures:
        """Tokens per second of one answer, against llama.cpp without a server."""
        arguments = (str(self.model), str(cores()), str(DECODED))
        return self._decoded("decode_vs_engine", lambda: run_module("bench.serving.engine", *arguments)[0])

    def decode_vs_transformers_fp32(self) -> Figures:
        """The same against transformers in 32 bits."""
        arguments = ("transformers", str(DECODED // 2))
        theirs = partial(run_module, "bench.serving.alone", *arguments, threads=cores())
        return self._decoded("decode_vs_transformers_fp32", lambda: theirs()[0])

    def bandwidth_fraction(self) -> Figures:
        """Bytes of weights that one answer reads per second, against what can be read from memory."""
        theirs = partial(run_module, "bench.serving.alone", "bandwidth", threads=cores())
        size = self.model.stat().st_size
        return self._decoded("bandwidth_fraction", lambda: {"tokensPerSecond": theirs()[0]["bytesPerSecond"] / size})

    def _decoded(self, name: str, theirs: Callable[[], Figures]) -> Figures:
        with ours(self.model, plan_of(CONTEXT, PARALLEL)) as server:

            def mine() -> Figures:
                return {"tokensPerSecond": _decoded_per_second(server, self.prompts.take(1)[0])}

            def compare(own: Figures, other: Figures) -> Figures:
                return {name: own["tokensPerSecond"] / other["tokensPerSecond"]} | {
                    "decode_tokens_per_second": own["tokensPerSecond"]
                }

            return compared(self.runs, mine, theirs, compare)

    # ---- many at once

    def requests_vs_engine_1(self) -> Figures:
        """Requests per second of one client, against llama.cpp's own server."""
        return self._requests(1)

    def requests_vs_engine_8(self) -> Figures:
        """The same of eight, with the latency of 95 % of them, and what eight get done against one."""
        return self._requests(8)

    def requests_vs_engine_32(self) -> Figures:
        """The same of more than are answered at once."""
        return self._requests(32)

    def _requests(self, clients: int) -> Figures:
        plan, single = plan_of(CONTEXT, PARALLEL), clients == PARALLEL
        with ours(self.model, plan) as mine, bare(self.model, plan) as other:
            for server in (mine, other):  # every slot has the words that all prompts begin with
                load(server.url, self.prompts.take(2 * PARALLEL), PARALLEL, ANSWER_TOKENS)

            def asked(server: Server) -> Figures:
                done = load(server.url, self._questions(clients), clients, ANSWER_TOKENS)
                found = {"rate": done.requests_per_second, "p95": percentile(list(done.latencies), 0.95)}
                if single:
                    alone = load(server.url, self._questions(1), 1, ANSWER_TOKENS)
                    found["alone"] = alone.requests_per_second
                return found

            def compare(own: Figures, theirs: Figures) -> Figures:
                figures = {
                    f"requests_vs_engine_{clients}": own["rate"] / theirs["rate"],
                    f"requests_per_second_{clients}": own["rate"],
                    f"engine_requests_per_second_{clients}": theirs["rate"],
                }
                if not single:
                    return figures
                return figures | {
                    "p95_vs_engine_8": own["p95"] / theirs["p95"],
                    "requests_8_vs_1": own["rate"] / own["alone"],
                    "engine_requests_8_vs_1": theirs["rate"] / theirs["alone"],
                }

            return compared(self.runs, partial(asked, mine), partial(asked, other), compare)

    def requests_vs_vllm_cpu_8(self) -> Figures:
        """Requests per second of 8 clients, against vLLM's CPU build with the same model and answers as long."""
        from bench.serving.vllm import served

        plan = plan_of(CONTEXT, PARALLEL)

        def rates(server: Server) -> list[float]:
            asked = (load(server.url, self._questions(8), 8, ANSWER_TOKENS) for _ in range(self.runs + 1))
            return [it.requests_per_second for it in asked][1:]

        # one after the other: vLLM's threads keep their cores between requests
        with served(plan) as theirs:
            peer = median(rates(theirs))
        with ours(self.model, plan) as mine:
            own = median(rates(mine))
        say(f"vLLM answers {peer:.2f} requests per second, ours {own:.2f}")
        return {"requests_vs_vllm_cpu_8": own / peer}

    def _questions(self, clients: int) -> list[list[Message]]:
        return self.prompts.take(max(8, PER_CLIENT * clients))

    # ---- memory

    def shared_prefix_ttft_ratio(self) -> Figures:
        """Time to the first token of the second request with the same long system prompt, against the first."""
        with ours(self.model, plan_of(CONTEXT, PARALLEL), self._needed(CONTEXT, PARALLEL)) as server:
            first_token_seconds(server.url, self.prompts.take(1)[0])

            def once(number: int) -> Figures:
                system = {"role": "system", "content": _text(number)}
                first, second = (
                    first_token_seconds(server.url, [system, self.prompts.take(1)[0][-1]]) for _ in range(2)
                )
                return {"shared_prefix_ttft_ratio": second / first}

            return repeated(2 * self.runs, once)

    def rss_bound_ratio(self) -> Figures:
        """The most that is resident over many different prompts, against what status says that a server needs."""
        context, parallel = 2048, 4  # what a ModelDeployment has unless it says otherwise
        needed = self._needed(context, parallel)
        with ours(self.model, plan_of(context, parallel), needed) as server:
            for _ in range(0, self.different_prompts, 200):
                load(server.url, self.prompts.take(min(200, self.different_prompts)), parallel, 1)
                say(f"resident: {server.memory('VmRSS') >> 20} MiB of {needed >> 20}")
            return {"rss_bound_ratio": server.memory("VmHWM") / needed}

    def _needed(self, context: int, parallel: int) -> int:
        shape = shape_of(opened(self.model))
        artefact = ModelRef(uri="s3://bench/model", digest="", size_bytes=self.model.stat().st_size, shape=shape)
        need = need_of(plan_of(context, parallel), artefact)
        assert need is not None
        return need.whole

    # ---- the rest

    def classifier_int8_vs_fp32(self) -> Figures:
        """A classifier with 8 bits against 32: texts per second, and points of accuracy on held-out tweets."""
        with tempfile.TemporaryDirectory(prefix="bench") as scratch:
            return classifier.measure(self.runs, Path(scratch))

    def seconds_to_first_answer(self) -> Figures:
        """Seconds from apply to the first answer in a real cluster, without the artefact and with it."""
        from bench.serving.first_answer import measure

        return {"seconds_to_first_answer": measure(self.runs)}


def _decoded_per_second(server: Server, prompt: list[Message]) -> float:
    """Of a whole answer, less the time until its first token: the prompt is known the second time."""
    whole(server.url, prompt, 1)
    first = whole(server.url, prompt, 1)
    return (DECODED - 1) / (whole(server.url, prompt, DECODED) - first)


def _text(number: int) -> str:
    """A system prompt of some 400 tokens, another for each number."""
    choose = random.Random(number)
    words = ("answer", "question", "never", "always", "customer", "order", "polite", "refund", "short", "invoice")
    return " ".join(f"{choose.choice(words)} {choose.randrange(10)}" for _ in range(PREFIX_WORDS))


FIGURES: tuple[Callable[[Bench], Figures], ...] = (
    Bench.decode_vs_engine,
    Bench.decode_vs_transformers_fp32,
    Bench.bandwidth_fraction,
    Bench.requests_vs_engine_1,
    Bench.requests_vs_engine_8,
    Bench.requests_vs_engine_32,
    Bench.requests_vs_vllm_cpu_8,
    Bench.shared_prefix_ttft_ratio,
    Bench.rss_bound_ratio,
    Bench.classifier_int8_vs_fp32,
    Bench.seconds_to_first_answer,
)
