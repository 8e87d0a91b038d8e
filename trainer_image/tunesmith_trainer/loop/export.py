"""The tuned model as a folder that anybody's tools can load: safetensors, tokenizer, model card, metrics.

Called by `finish` on rank 0 once training is done, and by `driver` to see whether an earlier attempt got that far.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api import keys
from tunesmith_api.artifacts import FileEntry, ModelManifest, files_digest
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import ModelRef
from tunesmith_store.files import entries_below
from tunesmith_store.pretrained import reads_images
from tunesmith_store.store import ObjectStore
from tunesmith_trainer.loop.compatibility import save_model, save_processor
from tunesmith_trainer.loop.output_folder import find_published, make_room
from tunesmith_trainer.report import RunRecord

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Export", "describe", "finished_model", "publish", "upload", "write_model"]

METRICS = "metrics.json"
CARD = "README.md"


@dataclass(frozen=True)
class Export:
    """What goes into the folder beside the weights."""

    plan: TrainingPlan
    run_digest: str
    base: Path
    record: RunRecord
    """What report and model card are written from."""


def finished_model(store: ObjectStore, plan: TrainingPlan, run_digest: str) -> tuple[ModelRef, dict[str, float]] | None:
    """Return the model and the metrics that this very run has already published, in the form that is asked for."""
    manifest = find_published(store, plan.output_uri)
    if manifest is None or (manifest.plan_digest, manifest.output_form) != (run_digest, plan.output_form):
        return None
    return _reference(plan.output_uri, manifest), manifest.metrics


def write_model(model: nn.Module, processor: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a finished model (adapters merged) and its processor, in the number format `dtype`."""
    bare: Any = model
    if hasattr(bare.config, "use_cache"):
        bare.config.use_cache = True
    _end_turns(bare, processor)
    save_model(bare.to(dtype), folder, max_shard_size="5GB")
    save_processor(processor, folder)


def _end_turns(model: Any, processor: Any) -> None:
    """Let generation end where ChatML ends a turn, too."""
    tokenizer = getattr(processor, "tokenizer", processor)
    generation = getattr(model, "generation_config", None)
    if generation is None or "<|im_end|>" not in getattr(tokenizer, "get_vocab", dict)():
        return
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    known = generation.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    known = known if end in known else [*known, end]
    generation.eos_token_id = known[0] if len(known) == 1 else known


def describe(folder: Path, export: Export) -> None:
    """Write metrics, report and model card beside the weights, readable for a server of any user."""
    from tunesmith_trainer import report
    from tunesmith_trainer.report.card import model_card

    record = export.record
    numbers = record.model_dump(mode="json", by_alias=True, include={"metrics", "history"})
    numbers["evaluations"] = [{"step": done.step, **done.metrics} for done in record.evaluations]
    (folder / METRICS).write_text(json.dumps(numbers, indent=1))
    (folder / CARD).write_text(model_card(record))
    report.write(record, folder)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # save_pretrained leaves 0600


def upload(store: ObjectStore, folder: Path, uri: str, there: Sequence[FileEntry] = ()) -> tuple[FileEntry, ...]:
    """Upload a folder's files, but for what is `there`; return them all. Without a manifest they are no model yet.

    So the other pods can read what is written so far. What an earlier run has left is deleted first.
    """
    uri = uri.rstrip("/")
    files = entries_below(folder)
    make_room(store, uri, {entry.path for entry in files})
    for entry in files:
        if entry not in there:
            store.upload(folder / entry.path, f"{uri}/{entry.path}")
    return files


def publish(store: ObjectStore, folder: Path, export: Export, there: Sequence[FileEntry] = ()) -> ModelRef:
    """Upload a model folder, but for what is `there`; its manifest last. What an earlier run left is replaced."""
    files = upload(store, folder, export.plan.output_uri, there)
    manifest = ModelManifest(
        digest=files_digest(files),
        base_uri=export.plan.model_uri,
        base_digest=files_digest(entries_below(export.base)),
        plan_digest=export.run_digest,
        output_form=export.plan.output_form,
        rehearsed=_rehearsed(export.plan),
        reads_images=reads_images(json.loads((export.base / "config.json").read_bytes())) or None,
        created_time=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics=dict(export.record.metrics),
        files=files,
    )
    store.put_bytes(f"{export.plan.output_uri.rstrip('/')}/{keys.MODEL_MANIFEST}", manifest.to_json().encode())
    return _reference(export.plan.output_uri, manifest)


def _reference(uri: str, manifest: ModelManifest) -> ModelRef:
    return ModelRef(
        uri=uri,
        digest=manifest.digest,
        size_bytes=manifest.size_bytes,
        rehearsed=manifest.rehearsed,
        reads_images=manifest.reads_images,
    )


def _rehearsed(plan: TrainingPlan) -> str | None:
    method = plan.method.qat.rehearses if plan.method.qat is not None else None
    return method.value if method is not None else None
