"""The commands and their options. Everything else is imported when a command runs, so that `--help` comes at once."""

from __future__ import annotations

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


@app.callback()
def _commands() -> None:
    """Fine-tunes models from Kubernetes manifests."""


@app.command()
def run(
    file: Annotated[str, typer.Option("-f", "--file", help="Manifest of a FineTuneJob; - reads standard input.")],
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change a field, as spec.training.maxSteps=10. May repeat."),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "--volume", metavar="CLAIM=FOLDER", help="Folder that stands for the claim of pvc:// URIs. May repeat."
        ),
    ] = None,
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

    from tunesmith_cli.errors import Refused
    from tunesmith_cli.run import Options, train

    try:
        code = train(Options(file, setting or (), volume or (), work_dir), Console())
    except Refused as refused:
        for line in refused.lines:
            typer.echo(f"error: {line}", err=True)
        raise typer.Exit(refused.code) from None
    raise typer.Exit(code)
