"""The tuned model as a folder that anybody's tools can load: safetensors, tokenizer, model card, metrics.

Called by `loop` on rank 0 once training is done, and by `driver` to see whether an earlier attempt got that far.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest, files_digest
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.reports import ModelRef
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_store.files import entries_below
from tunesmith_store.store import NotFound, ObjectStore
from tunesmith_trainer.report import RunRecord

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Export", "finished_model", "publish", "write_model"]

METRICS = "metrics.json"
CARD = "README.md"


@dataclass(frozen=True)
class Export:
    """What goes into the folder beside the weights."""

    plan: TrainingPlan
    run_digest: str
    base: Path
    metrics: Mapping[str, float]
    history: list[dict[str, float]]
    evaluations: list[dict[str, float]]

    @property
    def record(self) -> RunRecord:
        """What the model card is written from."""
        return RunRecord.of(
            self.plan,
            run_digest=self.run_digest,
            metrics=self.metrics,
            history=self.history,
            evaluations=self.evaluations,
        )


def finished_model(store: ObjectStore, uri: str, run_digest: str) -> tuple[ModelRef, dict[str, float]] | None:
    """Return the model and the metrics that this very run has already published at `uri`."""
    try:
        manifest = ModelManifest.from_json(store.get_bytes(f"{uri.rstrip('/')}/{keys.MODEL_MANIFEST}"))
    except (NotFound, ValueError):
        return None
    if manifest.plan_digest != run_digest:
        return None
    return ModelRef(uri=uri, digest=manifest.digest, size_bytes=manifest.size_bytes), manifest.metrics


def write_model(model: nn.Module, tokenizer: Any, folder: Path, export: Export) -> None:
    """Write the tuned model to a local folder; adapters are merged in float32, then all is stored as the base was."""
    from tunesmith_trainer.lora import merge_adapters
    from tunesmith_trainer.model import stored_dtype
    from tunesmith_trainer.report.card import model_card

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bare: Any = merge_adapters(model) if export.plan.method is MethodType.LORA else model
    bare.config.use_cache = True
    end = tokenizer.convert_tokens_to_ids("<|im_end|>") if "<|im_end|>" in tokenizer.get_vocab() else None
    generation = getattr(bare, "generation_config", None)
    if generation is not None and end is not None:
        known = generation.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else list(known)
        generation.eos_token_id = known if end in known else [*known, end]
        if len(generation.eos_token_id) == 1:
            generation.eos_token_id = generation.eos_token_id[0]
    bare.to(stored_dtype(export.base)).save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    report = {"metrics": dict(export.metrics), "history": export.history, "evaluations": export.evaluations}
    (folder / METRICS).write_text(json.dumps(report, indent=1))
    (folder / CARD).write_text(model_card(export.record))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # save_pretrained leaves 0600: a server of another user couldn't read it


def publish(store: ObjectStore, folder: Path, export: Export) -> ModelRef:
    """Upload a model folder, its manifest last. What an earlier run left at the URI is replaced."""
    uri = export.plan.output_uri.rstrip("/")
    files = entries_below(folder)
    manifest = ModelManifest(
        digest=files_digest(files),
        base_uri=export.plan.model_uri,
        base_digest=files_digest(entries_below(export.base)),
        plan_digest=export.run_digest,
        created_time=datetime.now(UTC).isoformat(timespec="seconds"),
        metrics=dict(export.metrics),
        files=files,
    )
    store.delete(f"{uri}/{keys.MODEL_MANIFEST}")
    for entry in files:
        store.upload(folder / entry.path, f"{uri}/{entry.path}")
    store.put_bytes(f"{uri}/{keys.MODEL_MANIFEST}", manifest.to_json().encode())
    return ModelRef(uri=export.plan.output_uri, digest=manifest.digest, size_bytes=manifest.size_bytes)
