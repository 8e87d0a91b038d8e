"""Everything that can be wrong with a job's input, found before a worker is started. Called by `driver` on pod 0.

Each failure names the field, object or line and says what to do. No torch here: this runs while Ray starts. Of the data
the first rows are looked at, and none where the token cache has them already; `data.prepare` checks all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.memory.headers import is_weights
from tunesmith_api.model import digest_of
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1.dataset import Deduplication
from tunesmith_api.v1alpha1.finetunejob import Init
from tunesmith_api.v1alpha1.task import Task as TaskName
from tunesmith_store.errors import UserError
from tunesmith_store.files import model_files
from tunesmith_store.store import ObjectStore
from tunesmith_store.volumes import in_place
from tunesmith_trainer.data.cache import read_manifest, token_digest
from tunesmith_trainer.data.contents import Contents
from tunesmith_trainer.data.image_loader import ImageLoader
from tunesmith_trainer.data.rows import BadRows, RawRow, RowChecker, columns_of
from tunesmith_trainer.data.sources import Source, open_sources
from tunesmith_trainer.data.streaming import check_streamable
from tunesmith_trainer.data.wordnet import find_wordnet
from tunesmith_trainer.loop.export import finished_model
from tunesmith_trainer.loop.output_folder import check_output
from tunesmith_trainer.tasks.base import Task

__all__ = ["check", "check_model_files"]

PROBE = ".tunesmith-write-test"
ROWS = 10_000
"""Rows of each source that are looked at."""
IMAGE_FILES = 100
"""Files of images that are opened."""
TOKENIZERS = {
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "source.spm", "tekken.json",
}  # fmt: skip
ENDS = {"embed_tokens", "lm_head", "shared", "wte", "word_embeddings", "embed_in", "embed_out"}
"""What models of text call their embeddings and their output head."""
GENERATING = {TaskName.CHAT_SFT, TaskName.CAUSAL_LM, TaskName.DPO, TaskName.SEQ2SEQ}
IMAGE_PROCESSORS = {"preprocessor_config.json", "processor_config.json"}

Log = Callable[..., None]


def check(plan: TrainingPlan, store: ObjectStore, scratch: Path, log: Log, contents: Contents | None = None) -> str:
    """Check data, model and buckets.

    Args:
        plan: what is to be done.
        store: where it is read and written.
        scratch: the pod's own folder.
        log: takes lines for people.
        contents: gets to know what is read.

    Returns:
        The run's digest: that of the plan and of the content it reads. A checkpoint or model of another digest is of
        another run, even if the URIs are the same.

    Raises:
        UserError: something has to be corrected.
        Retryable: the store can't be reached.
    """
    from tunesmith_trainer.tasks import task_for

    contents = contents or Contents(store, plan.checkpoint_uri)
    train, held_out = open_sources(plan, store)
    config, models, weight_bytes = _check_models(plan, store, contents)
    _check_targets(plan, config)
    content = {"train": train.tags(contents.tag_of), **models}
    if held_out is not None and plan.dataset.deduplication is Deduplication.EXACT:
        content["heldOut"] = held_out.tags(contents.tag_of)  # it decides what is trained on
    _check_writable(store, plan.checkpoint_uri, "spec.checkpoint.uri")
    _check_writable(store, plan.output_uri, "spec.output.uri")
    augmentation = plan.dataset.augmentation
    if augmentation is not None and augmentation.synonym_replacement:
        find_wordnet()
    run_digest = digest_of({"plan": plan.digest, "content": content})
    check_output(store, plan, run_digest)
    if not plan.publishes_adapter_only and finished_model(store, plan, run_digest) is None:
        _check_room(plan.output_uri, weight_bytes)
    checked = scratch / f".checked-{run_digest[:16]}"
    if not checked.exists():  # a driver that is started anew has seen the rows already
        _check_sources(plan, task_for(plan, config), store, train, held_out, log)
        checked.parent.mkdir(parents=True, exist_ok=True)
        checked.touch()
    return run_digest


# ---- data


def _check_sources(
    plan: TrainingPlan, task: Task, store: ObjectStore, train: Source, held_out: Source | None, log: Log
) -> None:
    streaming = plan.dataset.streaming
    if streaming:
        check_streamable(plan, task, train, store)
    digest = token_digest(plan, store, train, held_out)
    cached = read_manifest(store, f"{plan.tokens_uri}/{digest}") is not None
    if streaming or not cached:
        _check_rows(plan, task, train, store, "train", log)
    if held_out is not None and not cached:
        _check_rows(plan, task, held_out, store, "eval", log)


def _check_rows(plan: TrainingPlan, task: Task, source: Source, store: ObjectStore, name: str, log: Log) -> None:
    bad, images, columns = BadRows(plan.dataset.on_bad_row), ImageLoader(store), columns_of(plan)
    checker = RowChecker(task, columns, images, bad)
    all_seen = True

    def first_rows() -> Iterator[RawRow]:
        nonlocal all_seen
        for number, raw in enumerate(source.head()):
            if number >= ROWS or images.fetched >= IMAGE_FILES:
                all_seen = False
                return
            yield raw

    good = sum(1 for _ in checker.usable(first_rows()))
    if not good:
        what = f"none of {bad.count:,} rows can be used; the first: {bad.first}" if bad.count else "it has no rows"
        message = f"{source.name}: {what}; {plan.task.value} needs {_needs(columns.required)}"
        raise UserError(Reason.DATASET_INVALID, message)
    log(f"{name}: {'' if all_seen else 'the first '}{good:,} rows in {source.name} are well-formed")
    if bad.count:
        log(f"{name}: {bad.count:,} bad rows among them will be left out; the first: {bad.first}")


def _needs(columns: Iterable[str]) -> str:
    return "rows with " + " and ".join(repr(name) for name in columns)


# ---- models


def _check_models(
    plan: TrainingPlan, store: ObjectStore, contents: Contents
) -> tuple[Mapping[str, Any], dict[str, Any], int]:
    """Check the model and those that help to train it.

    Returns:
        Its config.json, the tags of all their files, and the size of its weights.
    """
    image = plan.task is TaskName.IMAGE_CLASSIFICATION
    pretrained = plan.model_init is Init.PRETRAINED
    config, tags, weight_bytes = _check_model(store, contents, plan.model_uri, "spec.model.uri", image, pretrained)
    helpers: dict[str, tuple[str, str]] = {}
    if plan.method.distillation is not None:
        helpers["teacher"] = ("spec.method.distillation.teacherUri", plan.method.distillation.teacher_uri)
    augmentation = plan.dataset.augmentation
    if augmentation is not None and augmentation.back_translation is not None:
        field, pair = "spec.dataset.augmentation.backTranslation", augmentation.back_translation
        helpers |= {
            "forward": (f"{field}.forwardUri", pair.forward_uri),
            "backward": (f"{field}.backwardUri", pair.backward_uri),
        }
    checked = {
        name: _check_model(store, contents, uri, field, image and name == "teacher")[1]
        for name, (field, uri) in helpers.items()
    }
    return config, {"model": tags, **checked}, weight_bytes


def _check_model(
    store: ObjectStore, contents: Contents, uri: str, field: str, image: bool = False, weights: bool = True
) -> tuple[Mapping[str, Any], dict[str, str], int]:
    """Check a model's folder; return its config.json, the tags of the files that make it, and the size of its weights.

    Others don't count: a model card, or what servers keep below it in quantized form.
    """
    base = uri.rstrip("/") + "/"
    files = store.list(uri)
    names = [info.uri.removeprefix(base) for info in files]
    config = check_model_files(
        names, lambda: store.get_bytes(base + "config.json"), base, field=field, image=image, weights=weights
    )
    if not weights:
        direct = [info for info, name in zip(files, names, strict=True) if "/" not in name and not is_weights(name)]
        return config, {info.uri: contents.tag_of(info) for info in direct}, 0
    objects, manifest = model_files(store, uri, field, files)
    found = [info for info in objects if not info.uri.endswith(".md")]
    known = {f"{base}{entry.path}": entry.sha256 for entry in manifest.files} if manifest else {}
    tags = {
        info.uri: contents.note(info.uri, known[info.uri]) if info.uri in known else contents.tag_of(info)
        for info in found
    }
    return config, tags, sum(info.size for info in found if is_weights(info.uri))


def check_model_files(
    names: list[str],
    read_config: Callable[[], bytes],
    uri: str,
    *,
    field: str = "spec.model.uri",
    image: bool = False,
    weights: bool = True,
) -> Mapping[str, Any]:
    """Check that a folder with these file names can hold a model to train; return its config.json.

    Args:
        names: paths of its files.
        read_config: returns the content of config.json.
        uri: the folder, for messages.
        field: the spec's name of it.
        image: whether the model reads images, not text.
        weights: whether its weights are wanted; not with model.init Random.

    Raises:
        UserError: it is empty, config, weights or tokenizer are missing, or the model needs code of its own.
    """

    def refuse(what: str) -> UserError:
        return UserError(Reason.MODEL_INVALID, f"{field} {uri}: {what}")

    if not names:
        message = f"{field}: there are no files below {uri}; upload the model or correct the URI"
        raise UserError(Reason.MODEL_NOT_FOUND, message)
    if "config.json" not in names:
        raise refuse("config.json is missing; is this the model's own folder?")
    try:
        config = json.loads(read_config())
    except ValueError as error:
        raise refuse(f"config.json is not valid JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise refuse("config.json names no model_type; models with code of their own are not run")
    if weights and not any(name.endswith(".safetensors") and "/" not in name for name in names):
        raise refuse("there are no *.safetensors weights; other formats are not read. Convert with save_pretrained()")
    if image and not IMAGE_PROCESSORS & set(names):
        raise refuse("there is no image processor (preprocessor_config.json)")
    if not image and not TOKENIZERS & set(names):
        raise refuse("there is no tokenizer (tokenizer.json)")
    return config


def _check_targets(plan: TrainingPlan, config: Mapping[str, Any]) -> None:
    """Refuse adapters at embeddings that are the output head, too; `methods.adapters` looks at the model itself."""
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    if tied is not True or plan.method.lora is None or plan.task not in GENERATING:
        return
    found = [name for name in plan.method.lora.target_modules if name.rpartition(".")[2] in ENDS]
    if found:
        message = (
            f"spec.method.lora.targetModules: {' and '.join(found)}: in this model embeddings and output head are the "
            "same weights (tie_word_embeddings), and an adapter would change one of them only: remove it from the list "
            "(all-linear leaves it out), or set method.type: Full"
        )
        raise UserError(Reason.INVALID_SPEC, message)


# ---- where results go


def _check_room(uri: str, needed: int) -> None:
    """Refuse a volume that is too small for the model before it is trained.

    It is at least as large as the one that training starts from.
    """
    claim = in_place("/".join(uri.split("/")[:3]))
    free = shutil.disk_usage(claim).free if claim is not None else None
    if free is not None and needed > free:
        message = (
            f"spec.output.uri: the model takes {needed / 1e6:,.0f} MB or more, and {uri} has {free / 1e6:,.0f} MB "
            "left: make room there, make the PersistentVolumeClaim larger, or save the adapter alone (output.save: "
            "Adapter)"
        )
        raise UserError(Reason.DISK_FULL, message)


def _check_writable(store: ObjectStore, uri: str, field: str) -> None:
    probe = f"{uri.rstrip('/')}/{PROBE}"
    try:
        store.put_bytes(probe, keys.MANAGED_BY.encode())
        store.delete(probe)
    except UserError as error:
        raise UserError(error.reason, f"{field}: {error.message}", error.exit_code) from error
