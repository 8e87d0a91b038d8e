"""The commands and their options. Everything else is imported when a command runs, so that `--help` comes at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    name="tunesmith",
    help="Fine-tunes models from Kubernetes manifests.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Manifest = Annotated[str, typer.Option("-f", "--file", help="Manifest of a FineTuneJob; - reads standard input.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change a field, as spec.training.maxSteps=10. May repeat."),
]
Volumes = Annotated[
    list[str] | None,
    typer.Option(
        "--volume", metavar="CLAIM=FOLDER", help="Folder that stands for the claim of pvc:// URIs. May repeat."
    ),
]


class Form(StrEnum):
    """What is printed."""

    TEXT = "text"
    JSON = "json"


@contextmanager
def _refusals() -> Iterator[None]:
    """Print what a command refuses, a line for each fault, and end with its exit code."""
    from tunesmith_cli.errors import Refused

    try:
        yield
    except Refused as refused:
        for line in refused.lines:
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(refused.code) from None


@app.callback()
def _commands() -> None:
    """Fine-tunes models from Kubernetes manifests."""


@app.command()
def run(
    file: Manifest,
    setting: Settings = None,
    volume: Volumes = None,
    work_dir: Annotated[
        Path | None,
        typer.Option("--work-dir", help="Where temporary files go (copies of model and data). Default: $TMPDIR."),
    ] = None,
) -> None:
    """Train a FineTuneJob on this machine, without a cluster.

    The same manifest, the same trainer, the same messages. Where the manifest has a URI, a path may stand:
    ./data/train.jsonl. Keys for s3:// come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).
    Ctrl-C saves a checkpoint; the same command goes on from there.
    """
    from rich.console import Console

    from tunesmith_cli.run import Options, train

    with _refusals():
        code = train(Options(file, setting or (), volume or (), work_dir), Console())
    raise typer.Exit(code)


@app.command()
def plan(
    file: Manifest,
    setting: Settings = None,
    volume: Volumes = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="A copy of the model's folder, or of its config.json, to take its sizes from."),
    ] = None,
    teacher: Annotated[Path | None, typer.Option("--teacher", help="The same of a distillation's teacher.")] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option("--gpu-memory", metavar="QUANTITY", help="Memory of each GPU, as 24Gi, where no name says it."),
    ] = None,
    online: Annotated[
        bool,
        typer.Option("--online", help="Read the model's config.json and the headers of its files where model.uri is."),
    ] = False,
    form: Annotated[Form, typer.Option("-o", "--output", help="What is printed.")] = Form.TEXT,
) -> None:
    """Say what a FineTuneJob would need and make in a cluster. Nothing is started; no network is used but for --online.

    Checks it as the cluster would, estimates its memory from the model's config.json and the headers of its files, and
    names the nearest settings by which it fits. Exit code 42: it doesn't fit.
    """
    from rich.console import Console

    from tunesmith_cli.plan.command import Options, show

    with _refusals():
        options = Options(file, setting or (), volume or (), model, teacher, gpu_memory, online, form is Form.JSON)
        code = show(options, Console())
    raise typer.Exit(code)
