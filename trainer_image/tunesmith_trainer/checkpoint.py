"""What a checkpoint is: trained weights, optimizer state and history as files, and a manifest that is written last.

A checkpoint without a manifest does not exist; one whose files don't match their digests is passed over for the one
before. Nothing in it depends on the number of ranks, and nothing is pickled. `loop` saves and restores, through
`Checkpointer`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunesmith_api import keys
from tunesmith_api.artifacts import CheckpointManifest, DataCursor
from tunesmith_api.reports import CheckpointRef
from tunesmith_store.errors import Retryable
from tunesmith_store.files import entries_below, verify
from tunesmith_store.store import NotFound, ObjectStore

__all__ = ["Checkpointer", "RunState", "Snapshot", "load_snapshot", "restore", "take_snapshot"]

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})/")


@dataclass
class RunState:
    """What a run remembers besides tensors.

    One record per logged step or evaluation. No step is counted twice: a restart goes back to the state that its
    checkpoint holds.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    tokens: int = 0
    restarts: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training state on the CPU, which training can't change any more."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: RunState


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def take_snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState) -> Snapshot:
    """Copy the trained weights of the bare model, the optimizer's state (keyed `<parameter>:<name>`) and the run's."""

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True).contiguous()

    names = {parameter: name for name, parameter in _trained(model)}
    kept = {
        f"{names[parameter]}:{key}": copy(value if isinstance(value, torch.Tensor) else torch.tensor(value))
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    weights = {name: copy(parameter) for name, parameter in _trained(model)}
    return Snapshot(weights, kept, RunState(**json.loads(json.dumps(asdict(state)))))


def restore(snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a snapshot's tensors into the bare model and its optimizer.

    Raises:
        Retryable: it is of another model.
    """
    trained = dict(_trained(model))
    if set(trained) != set(snapshot.weights):
        raise Retryable("the checkpoint's weights are not this model's")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(snapshot.weights[name])
    for key, value in snapshot.optimizer.items():
        name, _, part = key.rpartition(":")
        parameter = trained[name]
        # AdamW counts its steps on the CPU, unless it is fused
        fused = bool(optimizer.param_groups[0].get("fused"))
        device = parameter.device if part != "step" or fused else torch.device("cpu")
        optimizer.state[parameter][part] = value.to(device)


def load_snapshot(folder: Path) -> Snapshot:
    """Read a snapshot that `Checkpointer` has written or fetched."""
    state = RunState(**json.loads((folder / STATE).read_text()))
    return Snapshot(load_file(folder / WEIGHTS), load_file(folder / OPTIMIZER), state)


def _write(snapshot: Snapshot, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(snapshot.weights, folder / WEIGHTS)
    save_file(snapshot.optimizer, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(asdict(snapshot.state)))


@dataclass
class Checkpointer:
    """The checkpoints of one run, below one URI."""

    store: ObjectStore
    uri: str
    folder: Path
    """Private to this process: ranks that share a folder would read each other's half-written files."""
    run_digest: str
    keep_last: int
    describe: Mapping[str, Any]
    """The manifest's fields that don't change during a run: max_steps, seed, world_size, attempt."""
    saved: Callable[[CheckpointRef], None] = lambda reference: None
    log: Callable[[str], None] = print
    newest: CheckpointRef | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
    _pending: Future[CheckpointRef] | None = None

    def _step_uri(self, step: int) -> str:
        return f"{self.uri.rstrip('/')}/step-{step:08d}"

    def _match(self, uri: str) -> re.Match[str] | None:
        return STEP_FOLDER.match(uri.removeprefix(self.uri.rstrip("/") + "/"))

    # ---- saving: rank 0 only

    def save(self, snapshot: Snapshot, cursor: DataCursor) -> None:
        """Upload in the background. Waits for the one before first: at most one is in flight.

        Raises:
            Failure: the save before failed.
        """
        self.wait()
        self._pending = self._pool.submit(self._save, snapshot, cursor)

    def wait(self) -> CheckpointRef | None:
        """Wait for the save in flight; return the newest complete checkpoint.

        Raises:
            Failure: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return self.newest

    def check(self) -> None:
        """Raise what the save in flight failed with, if it has ended."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def _save(self, snapshot: Snapshot, cursor: DataCursor) -> CheckpointRef:
        step = snapshot.state.step
        folder = self.folder / f"save-{step}"
        _write(snapshot, folder)
        uri = self._step_uri(step)
        files = entries_below(folder)
        manifest = CheckpointManifest(
            step=step,
            plan_digest=self.run_digest,
            cursor=cursor,
            created_time=datetime.now(UTC).isoformat(timespec="seconds"),
            files=files,
            **self.describe,
        )
        # what an earlier run may have left here stops being a checkpoint before its files are replaced
        self.store.delete(f"{uri}/{keys.CHECKPOINT_MANIFEST}")
        for entry in files:
            self.store.upload(folder / entry.path, f"{uri}/{entry.path}")
        self.store.put_bytes(f"{uri}/{keys.CHECKPOINT_MANIFEST}", manifest.to_json().encode())
        shutil.rmtree(folder, ignore_errors=True)
        self.newest = CheckpointRef(step=step, uri=uri)
        self.saved(self.newest)
        self._retain()
        return self.newest

    def _retain(self) -> None:
        """Delete our checkpoints beyond the newest `keep_last`, and torn ones older than those. Never fails the run."""
        try:
            manifests = self._manifests()
            complete = {manifest.step for manifest in manifests}
            ours = [manifest.step for manifest in manifests if manifest.plan_digest == self.run_digest]
            newest, surplus = ours[0], set(ours[self.keep_last :])
            objects: dict[int, list[str]] = {}
            for info in self.store.list(self.uri):
                if match := self._match(info.uri):
                    objects.setdefault(int(match[1]), []).append(info.uri)
            for step, uris in objects.items():
                if step in surplus or (step not in complete and step < newest):
                    # the manifest goes first: a half-deleted checkpoint does not exist
                    for uri in sorted(uris, key=lambda uri: not uri.endswith(f"/{keys.CHECKPOINT_MANIFEST}")):
                        self.store.delete(uri)
        except Exception as error:  # old checkpoints only cost space
            self.log(f"warning: old checkpoints were not deleted: {error}")

    # ---- finding and fetching

    def _manifests(self) -> list[CheckpointManifest]:
        """Return all readable manifests, newest first."""
        found = []
        for info in self.store.list(self.uri):
            if self._match(info.uri) and info.uri.endswith(f"/{keys.CHECKPOINT_MANIFEST}"):
                try:
                    found.append(CheckpointManifest.from_json(self.store.get_bytes(info.uri)))
                except (ValueError, NotFound):
                    self.log(f"warning: {info.uri} is unreadable; the checkpoint is ignored")
        return sorted(found, key=lambda manifest: manifest.step, reverse=True)

    def fetch_newest(self) -> tuple[CheckpointManifest, Path] | None:
        """Download the newest complete checkpoint of this run whose files match their digests."""
        for manifest in self._manifests():
            if manifest.plan_digest != self.run_digest:
                self.log(f"checkpoint of step {manifest.step} belongs to another plan or other data: ignored")
                continue
            folder = self.fetch(manifest)
            if folder is not None:
                return manifest, folder
        return None

    def fetch(self, manifest: CheckpointManifest) -> Path | None:
        """Download one checkpoint into this process's own folder; None if a file is missing or damaged."""
        uri = self._step_uri(manifest.step)
        folder = self.folder / f"load-{manifest.step}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            for entry in manifest.files:
                self.store.download(f"{uri}/{entry.path}", folder / entry.path)
        except NotFound as error:
            self.log(f"warning: checkpoint {uri} lacks {error}; trying the one before")
            return None
        if bad := verify(folder, manifest.files):
            self.log(f"warning: checkpoint {uri} is damaged ({bad}); trying the one before")
            return None
        self.newest = CheckpointRef(step=manifest.step, uri=uri)
        return folder
