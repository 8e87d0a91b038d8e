"""A FineTuneJob's manifest as the cluster would read it: YAML, overrides, the API's rules, the operator's policies.

`run` and `plan` call it. For `run`, where a URI stands in the manifest, a path of this machine may stand instead:
`local_paths` turns those into URIs before anything is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_cli.errors import Refused
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_cli.local_paths import LocalPaths
from tunesmith_cli.refusals import refusals
from tunesmith_cli.schema import JSON, document_schema, node_at
from tunesmith_operator.core.finetunejob.policies import violation

__all__ = ["accepted_job", "apply_override", "checked_job", "read_manifest"]


def read_manifest(source: str) -> JSON:
    """Read the one FineTuneJob of a file (`-` for standard input); other kinds in it are left alone.

    Raises:
        Refused: it can't be read, or holds no FineTuneJob or several.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        documents = parsed(text)
    except OSError as error:
        raise Refused(f"{source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{source}: not text in UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise Refused(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    found = [it for it in documents if isinstance(it, dict) and it.get("kind") == keys.FINETUNEJOB_KIND]
    if len(found) != 1:
        kinds = ", ".join(str(it.get("kind")) if isinstance(it, dict) else "no object" for it in documents) or "nothing"
        raise Refused(f"{source}: holds {kinds}; exactly one {keys.FINETUNEJOB_KIND} is wanted")
    version = found[0].get("apiVersion")
    if version != keys.API_VERSION:
        raise Refused(f"{source}: apiVersion is {version!r}; this tunesmith knows {keys.API_VERSION}")
    return found[0]


def apply_override(document: JSON, setting: str) -> str:
    """Set one `path=value` of `--set` and return the path. The value is YAML; an empty one or `null` removes the field.

    Raises:
        Refused: it isn't of that form, or leads through something that is no object.
    """
    path, separator, text = setting.partition("=")
    names = path.split(".")
    if not separator or names[0] not in ("spec", "metadata") or len(names) < 2 or not all(names):
        raise Refused(f"--set {setting}: give the field's path and a value, as in spec.training.maxSteps=10")
    parent: Any = document
    for name in names[:-1]:
        parent = parent.setdefault(name, {}) if isinstance(parent, dict) else None
    if not isinstance(parent, dict):
        raise Refused(f"--set {setting}: {'.'.join(names[:-1])} is no object with fields")
    value = _value(text, node_at(document_schema(FineTuneJob), names))
    if value is None:
        parent.pop(names[-1], None)
    else:
        parent[names[-1]] = value
    return path


def _value(text: str, node: JSON) -> Any:
    if text in ("", "null"):
        return None
    if node.get("type") == "string":
        return text  # 2e-4 on a command line has no quotes
    try:
        return next(iter(parsed(text)), None)
    except yaml.YAMLError as error:
        raise Refused(f"--set …={text}: not valid YAML: {' '.join(str(error).split())}") from error


def accepted_job(document: JSON) -> FineTuneJob:
    """The job, if a cluster would accept it.

    Raises:
        Refused: a line for each fault, in the words of the API server or the operator.
    """
    faults = refusals(document)
    if not faults:
        job = FineTuneJob.model_validate(document)
        broken = violation(job)
        if broken is None:
            return job
        faults = [broken.message]
    raise Refused(*_sorted(faults))


def checked_job(document: JSON, paths: LocalPaths) -> FineTuneJob:
    """The job, if a cluster would accept it and every path that it reads is there.

    Raises:
        Refused: a line for each fault.
    """
    try:
        job = accepted_job(document)
        if faults := list(paths.faults(document)):
            raise Refused(*_sorted(faults))
    except Refused as refused:
        raise Refused(*(paths.shown(line) for line in refused.lines)) from None
    return job


def _sorted(faults: Iterable[str]) -> list[str]:
    return sorted(dict.fromkeys(faults))
