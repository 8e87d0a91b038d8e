"""`python3 -m tunesmith_server.evaluation.answers MODEL THREADS OUTPUT`: one model as served, asked about all rows.

A process of its own, for each model: llama.cpp doesn't give its memory back, and what a model takes is measured here.
The engine is started as a server pod starts it and asked over loopback. `compare` starts it, the task on stdin.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_server.evaluation.interview import Answers, Interview, LlamaInterview, Task
from tunesmith_server.process import answer_for
from tunesmith_store.memory import own_bytes

__all__ = ["start"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(task: Task, model: Path, threads: int) -> Interview:
    """Start the engine that serves the model; return who asks it."""
    if task.plan.engine is EngineType.LLAMA_CPP:
        from tunesmith_server.engines.llama_cpp import LlamaEngine

        return LlamaInterview(LlamaEngine(task.plan, model, threads, port=_free_port()), task.plan)
    from tunesmith_server.evaluation.transformers_models import interview_of

    return interview_of(task.plan, model, threads)


def _main(model: Path, threads: int, output: Path) -> None:
    task = Task.from_json(sys.stdin.read())
    interview = start(task, model, threads)
    answers = tuple(interview.answer(row) for row in task.rows)
    found = Answers(answers=answers, tokens_per_second=interview.speed(), memory_bytes=own_bytes("VmRSS"))
    output.write_text(found.to_json())


if __name__ == "__main__":
    status = answer_for(lambda: _main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
    os._exit(status)  # letting go of the engine would wait for its threads
