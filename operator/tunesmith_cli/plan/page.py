"""A forecast for people: what is known of the model, a table of the memory, what to change, the children."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from tunesmith_api.memory.estimate import FILL, base_parameters, in_words, trained
from tunesmith_api.memory.placement import Models
from tunesmith_cli.plan.capacity import shown
from tunesmith_cli.plan.forecast import Forecast, parts_of
from tunesmith_operator.core.kubernetes.manifest import JSON

__all__ = ["print_page"]

_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits",
    "teacher": "teacher",
    "transient": "buffers",
    "runtime": "Python, torch, CUDA",
}


def print_page(found: Forecast, console: Console) -> None:
    """Print a forecast."""

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"FineTuneJob {found.job.metadata.name}: a cluster accepts it")
    say()
    for name, text in _facts(found):
        say(f"{name:<9}{text}")
    if found.need is not None:
        say()
        console.print(_table(found))
        say()
        for line in _verdict(found):
            say(line)
    say()
    say("It would make:")
    for child in found.children:
        say(f"  {child['kind']} {child['metadata']['name']}{_pods(child)}")


def _facts(found: Forecast) -> Iterator[tuple[str, str]]:
    plan, training = found.plan, found.plan.training
    if found.models is None:
        yield "model", f"{plan.model_uri} isn't on this machine, so its memory isn't known: name a copy of its folder,"
        yield "", "or of its config.json alone, with --model, or have its headers read with --online"
    else:
        yield "model", _model(found.models, found)
    processes, tensor = plan.world_size, plan.tensor_parallel
    share = -(-training.global_batch_size // max(1, processes // tensor))
    size = min(training.micro_batch_size, share)
    yield "method", f"{plan.method.type} for {plan.task}, at most {training.max_length} tokens"
    yield "batch", f"{training.global_batch_size} examples a step: {share} for each process, {size} at a time"
    workers = f"{plan.replicas} of {found.job.spec.workers.resources.cpu} CPU, {shown(found.capacity.host)}"
    if plan.processes_per_worker > 1:
        workers += f", {plan.processes_per_worker} processes in each"
    yield "workers", f"{workers}, {found.gpus} GPUs in all" if found.gpus else f"{workers}, no GPU"


def _model(models: Models, found: Forecast) -> str:
    facts, plan = models.student, found.plan
    total, count = base_parameters(facts, plan), trained(facts, plan)
    source = "" if facts.is_measured else ", guessed from config.json"
    return f"{total:,} parameters{source}; {count:,} are trained ({count / max(1, total):.1%})"


def _table(found: Forecast) -> Table:
    assert found.need is not None
    process = found.need.process
    table = Table(box=None, pad_edge=False)
    table.add_column(f"memory of each process ({found.need.strategy})")
    table.add_column("", justify="right")
    parts = parts_of(process)
    for name, words in _NAMES.items():
        if parts[name]:
            table.add_row(words, in_words(parts[name]))
    table.add_row("at the peak of a step", in_words(process.step), style="bold")
    table.add_row("at the end, while the model is written", in_words(process.saving))
    return table


def _verdict(found: Forecast) -> Iterator[str]:
    need, capacity = found.need, found.capacity
    assert need is not None
    if need.has_gpus and capacity.gpu is None:
        unknown = "how much it has isn't known (--gpu-memory 24Gi says it)"
        yield f"each GPU:    needs {in_words(need.process.total)}, {unknown}"
    elif capacity.gpu is not None:
        has = f"has {in_words(capacity.gpu)}, of which {FILL:.0%} may be planned with"
        yield f"each GPU:    needs {in_words(need.process.total)}, {has}"
    yield f"each worker: needs {in_words(need.host)}, has {in_words(capacity.host)}"
    if found.plan.method.distillation is not None and found.models is not None and found.models.teacher is None:
        yield "the teacher is not counted: name a copy of its folder with --teacher"
    if found.fits is not False:
        yield "It fits." if found.fits else "Whether it fits can't be said."
        return
    yield "It does not fit."
    for number, change in enumerate(found.changes):
        settings = " ".join(f"--set spec.{name}={_value(value)}" for name, value in change.items())
        yield f"{'It would with' if not number else '      or with'}  {settings}"
    if not found.changes:
        yield "No setting helps: it takes a smaller model, a lower training.maxLength, or GPUs with more memory."


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _pods(child: JSON) -> str:
    if child["kind"] != "Job":
        return ""
    count = child["spec"]["completions"]
    return f", {count} {'pod' if count == 1 else 'pods'}"
