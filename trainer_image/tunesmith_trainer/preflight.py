"""Everything that can be wrong with a job's input, found before a worker is started. Called by `driver` on pod 0.

Each failure names the field, object or line and says what to do. No torch here: this runs while Ray starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.model import digest_of
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_store.files import fetch_file
from tunesmith_store.store import NotFound, ObjectInfo, ObjectStore
from tunesmith_trainer.data import read_rows

__all__ = ["check", "check_model_files"]

PROBE = ".tunesmith-write-test"


def check(plan: TrainingPlan, store: ObjectStore, scratch: Path, log: Callable[[str], None]) -> str:
    """Check data, model and buckets.

    Returns:
        The run's digest: that of the plan and of the content it reads. A checkpoint or model of another digest is of
        another run, even if the URIs are the same.

    Raises:
        UserError: something has to be corrected.
        Retryable: the store can't be reached.
    """
    train = _head(store, plan.train_uri, "spec.dataset.train.uri")
    if plan.eval_uri:
        _head(store, plan.eval_uri, "spec.dataset.eval.uri")
    model = store.list(plan.model_uri)
    base = plan.model_uri.rstrip("/") + "/"
    check_model_files(
        [info.uri.removeprefix(base) for info in model], lambda: store.get_bytes(base + "config.json"), base
    )
    _check_writable(store, plan.checkpoint_uri, "spec.checkpoint.uri")
    _check_writable(store, plan.output_uri, "spec.output.uri")
    for uri, name in ((plan.train_uri, "train"), (plan.eval_uri, "eval")):
        if uri:
            rows = _check_rows(fetch_file(store, uri, scratch / "data" / name), plan.messages_column, uri)
            log(f"{name}: {rows} rows in {uri} are well-formed")
    tags = {info.uri: info.tag for info in [train, *model]}
    return digest_of({"plan": plan.digest, "content": tags})


def _head(store: ObjectStore, uri: str, field: str) -> ObjectInfo:
    try:
        return store.head(uri)
    except NotFound as error:
        message = f"{field}: {uri} does not exist; upload it or correct the URI"
        raise UserError(Reason.DATASET_NOT_FOUND, message) from error


def _check_rows(path: Path, column: str, uri: str) -> int:
    rows = sum(1 for _ in read_rows(path, column, uri))
    if not rows:
        raise UserError(Reason.DATASET_INVALID, f"{uri} has no rows; ChatSFT needs one JSON object on each line")
    return rows


def check_model_files(names: list[str], read_config: Callable[[], bytes], uri: str) -> None:
    """Check that a folder with these file names can hold a model to train.

    Raises:
        UserError: it is empty, config, weights or tokenizer are missing, or the model needs code of its own.
    """

    def refuse(what: str) -> UserError:
        return UserError(Reason.MODEL_INVALID, f"spec.model.uri {uri}: {what}")

    if not names:
        message = f"spec.model.uri: there are no files below {uri}; upload the model or correct the URI"
        raise UserError(Reason.MODEL_NOT_FOUND, message)
    if "config.json" not in names:
        raise refuse("config.json is missing; is this the model's own folder?")
    try:
        config = json.loads(read_config())
    except ValueError as error:
        raise refuse(f"config.json is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise refuse("config.json names no model_type; models with code of their own are not run")
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise refuse("there are no *.safetensors weights; other formats are not read. Convert with save_pretrained()")
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(names):
        raise refuse("there is no tokenizer (tokenizer.json)")


def _check_writable(store: ObjectStore, uri: str, field: str) -> None:
    probe = f"{uri.rstrip('/')}/{PROBE}"
    try:
        store.put_bytes(probe, keys.MANAGED_BY.encode())
        store.delete(probe)
    except UserError as error:
        raise UserError(error.reason, f"{field}: {error.message}", error.exit_code) from error
