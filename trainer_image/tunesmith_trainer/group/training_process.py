"""The process that trains: `python -m tunesmith_trainer.group.training_process NUMBER`.

Started by `supervisor`, used by `handover`. While Ray starts it does what needs no rank: the imports, and fetching the
model. Then it waits for its assignment.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import sys
import threading
import traceback
from multiprocessing.connection import Connection, Listener
from typing import Any

from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.training import Optim
from tunesmith_store.errors import Failure
from tunesmith_store.router import store_of
from tunesmith_trainer.group.handover import Answer, Assignment
from tunesmith_trainer.models.files import fetch_base
from tunesmith_trainer.pod.environment import PodEnvironment

__all__ = ["hide_unused", "main", "unused"]


def main() -> None:
    """Prepare, wait, train, answer, and end."""
    pod = PodEnvironment.read()
    path = pod.training_socket(int(sys.argv[1]))
    path.unlink(missing_ok=True)
    with Listener(str(path), "AF_UNIX") as listener:  # who comes early waits in its queue
        _prepare(pod.plan(), pod)
        connection = listener.accept()
    assignment: Assignment = connection.recv()
    trained = threading.Event()
    threading.Thread(target=_end_with, args=(connection, trained), name="ray", daemon=True).start()
    answer = _train(assignment)
    trained.set()
    with contextlib.suppress(OSError):  # Ray's end has died just now: Ray Train knows
        connection.send(answer)
    sys.stdout.flush()
    # not by the interpreter's own end, which would wait for threads of uploads and of gloo
    os._exit(0 if answer.error is None else 1)


def _end_with(connection: Connection[Any, Any], trained: threading.Event) -> None:
    """End this process when Ray's ends: Ray Train has given it up, and starts another."""
    try:
        connection.recv()
    except (EOFError, OSError):
        if not trained.is_set():
            os._exit(1)


def _train(assignment: Assignment) -> Answer:
    try:
        from tunesmith_trainer.group import worker

        return Answer(result=worker.run(assignment))
    except BaseException as error:
        traceback.print_exc()
        return Answer(error=_portable(error))


def _portable(error: BaseException) -> BaseException:
    """Return an error that another process can raise, bugs with their traceback."""
    if isinstance(error, Failure):
        return error
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made in this very line
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(trace)
    return error


def _prepare(plan: TrainingPlan, pod: PodEnvironment) -> None:
    """Import what training will import, and fetch the model; what fails here fails again later, in better words."""
    # a million objects are made by imports, and stay: looking through them again and again is a fifth of the time
    gc.disable()
    try:
        fetching = threading.Thread(target=_fetch, args=(plan, pod), name="fetch", daemon=True)
        fetching.start()
        hide_unused(plan)
        from tunesmith_trainer.group import worker

        _ = worker
        fetching.join()
        _import_model(plan, pod)
    except Exception:
        traceback.print_exc()
    gc.freeze()
    gc.enable()


def _fetch(plan: TrainingPlan, pod: PodEnvironment) -> None:
    try:
        fetch_base(plan, store_of(plan), pod.scratch)
    except Failure as error:
        print(error.message, flush=True)


def _import_model(plan: TrainingPlan, pod: PodEnvironment) -> None:
    """Import what transformers and peft load when a model of this kind is first used."""
    import transformers

    from tunesmith_trainer.tasks import task_for

    folder = pod.scratch / "model"
    config = json.loads((folder / "config.json").read_text())
    task_for(plan, config).load_processor(folder)
    for name in config.get("architectures") or ():
        getattr(transformers, name, None)
    if plan.method.type is not MethodType.FULL:
        import peft

        _ = peft


def hide_unused(plan: TrainingPlan) -> None:
    """Make the unused packages look as if they weren't installed, unless they are imported already."""
    for name in unused(plan):
        if name not in sys.modules:
            # Python's documented way to make an import fail; `find_spec` returns None for it
            sys.modules[name] = None  # type: ignore[assignment]


def unused(plan: TrainingPlan) -> set[str]:
    """Return the installed packages that would only cost time."""
    packages = {"torchao", "bitsandbytes", "scipy", "sklearn"}
    if plan.method.qat is not None:
        packages.discard("torchao")
    if plan.method.type is MethodType.QLORA or plan.training.optim is Optim.ADAMW_8BIT:
        packages.discard("bitsandbytes")
    return packages


if __name__ == "__main__":
    main()
