"""`tunesmith plan`, from the manifest to what is printed. Nothing is started in a cluster.

Only files of this machine are read, unless `--online` asks for the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tunesmith_api.keys import ExitCode
from tunesmith_api.memory.placement import Models
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_cli.errors import Refused
from tunesmith_cli.local_paths import LocalPaths
from tunesmith_cli.manifest import accepted_job, apply_override, read_manifest
from tunesmith_cli.plan.capacity import capacity_of
from tunesmith_cli.plan.forecast import Forecast, forecast
from tunesmith_cli.plan.models import facts_at
from tunesmith_cli.plan.page import print_page
from tunesmith_cli.plan.remote import facts_online
from tunesmith_operator.core.finetunejob.training_plan import training_plan

__all__ = ["Options", "show"]

MODEL, TEACHER = "spec.model.uri", "spec.method.distillation.teacherUri"
OPTIONS = {MODEL: "--model", TEACHER: "--teacher"}
"""Field of the spec → option that names a copy of what is there."""


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    source: str
    settings: Sequence[str] = ()
    volumes: Sequence[str] = ()
    model: Path | None = None
    teacher: Path | None = None
    gpu_memory: str | None = None
    online: bool = False
    as_json: bool = False


def show(options: Options, console: Console) -> int:
    """Print what the job would take; return 0, or another exit code where it can't be had.

    Raises:
        Refused: the cluster would refuse the manifest, or an option makes no sense.
    """
    paths = LocalPaths(options.volumes)
    document = read_manifest(options.source)
    for setting in options.settings:
        apply_override(document, setting)
    job = accepted_job(document)
    found = forecast(job, _models(job, options, paths), capacity_of(job.spec.workers, options.gpu_memory))
    if options.as_json:
        text = json.dumps(found.document(), indent=2, ensure_ascii=False)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        print_page(found, console)
    return _exit_code(found)


def _models(job: FineTuneJob, options: Options, paths: LocalPaths) -> Models | None:
    """The models' sizes; None where the model isn't known here."""
    named = {MODEL: options.model, TEACHER: options.teacher}
    distillation = job.spec.method.distillation
    if options.teacher is not None and distillation is None:
        raise Refused("--teacher: this job has no spec.method.distillation: leave the option out")
    uris = {MODEL: job.spec.model.uri} | ({TEACHER: distillation.teacher_uri} if distillation is not None else {})
    places = {field: named[field] or _mounted(uri, options, paths) for field, uri in uris.items()}
    found = {field: facts_at(path, OPTIONS[field]) for field, path in places.items() if path is not None}
    if options.online and (rest := {field: uri for field, uri in uris.items() if field not in found}):
        found |= facts_online(training_plan(job, attempt=1), rest)
    return Models(found[MODEL], found.get(TEACHER)) if MODEL in found else None


def _mounted(uri: str, options: Options, paths: LocalPaths) -> Path | None:
    """The folder of a URI, if `--volume` says where its claim is."""
    path = paths.path_of(uri) if options.volumes else None
    return path if path is not None and path.is_dir() else None


def _exit_code(found: Forecast) -> int:
    return int(ExitCode.OUT_OF_MEMORY if found.fits is False else ExitCode.SUCCESS)
