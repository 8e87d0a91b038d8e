"""The checkpoints of one run in object storage: which there are, which are kept, and the moment in which one appears.

A checkpoint is a folder `step-00000025/`; without its manifest, which is written last, it does not exist. Used by
`checkpointer`, on rank 0 but for `clear`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith_api import keys
from tunesmith_api.artifacts import CheckpointManifest
from tunesmith_store.store import NotFound, ObjectStore
from tunesmith_trainer.data.contents import differences, find_description

__all__ = ["CheckpointStorage"]

STEP_FOLDER = re.compile(r"step-(\d{8,})/")


@dataclass(frozen=True)
class CheckpointStorage:
    """One run's checkpoints below one URI, where those of other runs may lie too."""

    store: ObjectStore
    uri: str
    run_digest: str
    log: Callable[[str], None] = print

    def folder(self, step: int) -> str:
        """Return the URI of a step's checkpoint."""
        return f"{self.uri.rstrip('/')}/step-{step:08d}"

    def _manifest_uri(self, step: int) -> str:
        return f"{self.folder(step)}/{keys.CHECKPOINT_MANIFEST}"

    def _match(self, uri: str) -> re.Match[str] | None:
        return STEP_FOLDER.match(uri.removeprefix(self.uri.rstrip("/") + "/"))

    def clear(self, step: int) -> None:
        """Make what an earlier run may have left at a step stop being a checkpoint: its files get replaced."""
        self.store.delete(self._manifest_uri(step))

    def commit(self, manifest: CheckpointManifest) -> str:
        """Make a checkpoint exist; return its URI. All its files are there by now."""
        self.store.put_bytes(self._manifest_uri(manifest.step), manifest.to_json().encode())
        return self.folder(manifest.step)

    def all_manifests(self) -> list[CheckpointManifest]:
        """Return all readable manifests, newest first, those of other runs among them."""
        found = []
        for info in self.store.list(self.uri):
            if self._match(info.uri) and info.uri.endswith(f"/{keys.CHECKPOINT_MANIFEST}"):
                try:
                    found.append(CheckpointManifest.from_json(self.store.get_bytes(info.uri)))
                except (ValueError, NotFound):
                    self.log(f"warning: {info.uri} is unreadable; the checkpoint is ignored")
        return sorted(found, key=lambda manifest: manifest.step, reverse=True)

    def manifests(self, before: int | None = None) -> list[CheckpointManifest]:
        """Return this run's checkpoints, newest first; with `before`, only those of earlier steps."""
        ours = []
        for manifest in self.all_manifests():
            if manifest.plan_digest != self.run_digest:
                self.log(f"checkpoint of step {manifest.step} {self._whose(manifest)}: ignored")
            elif before is None or manifest.step < before:
                ours.append(manifest)
        return ours

    def _whose(self, manifest: CheckpointManifest) -> str:
        """Say what makes a checkpoint another run's."""
        other, mine = (
            find_description(self.store, self.uri, digest) for digest in (manifest.plan_digest, self.run_digest)
        )
        why = differences(other, mine) if other and mine else ""
        return f"is another run's ({why})" if why else "belongs to another plan or other data"

    def withdraw(self, since: int) -> None:
        """Make this run's checkpoints of step `since` and later stop existing: the run has gone back before them."""
        for manifest in self.manifests():
            if manifest.step >= since:
                self.clear(manifest.step)

    def retain(self, newest: int, keep_last: int, keep_best: bool, higher_is_better: bool) -> None:
        """Delete this run's checkpoints beyond the newest `keep_last` and the best, and torn ones older than `newest`.

        Never fails the run: old checkpoints only cost space.
        """
        try:
            manifests = self.all_manifests()
            complete = {manifest.step for manifest in manifests}
            ours = [manifest for manifest in manifests if manifest.plan_digest == self.run_digest]
            kept = {manifest.step for manifest in ours[:keep_last]}
            if keep_best and (best := best_of(ours, higher_is_better)):
                kept.add(best.step)
            surplus = {manifest.step for manifest in ours} - kept
            objects: dict[int, list[str]] = {}
            for info in self.store.list(self.uri):
                if match := self._match(info.uri):
                    objects.setdefault(int(match[1]), []).append(info.uri)
            for step, uris in objects.items():
                if step in surplus or (step not in complete and step < newest):
                    # the manifest goes first: a half-deleted checkpoint does not exist
                    for uri in sorted(uris, key=lambda uri: not uri.endswith(f"/{keys.CHECKPOINT_MANIFEST}")):
                        self.store.delete(uri)
        except Exception as error:
            self.log(f"warning: old checkpoints were not deleted: {error}")


def best_of(manifests: Sequence[CheckpointManifest], higher_is_better: bool) -> CheckpointManifest | None:
    """Return the checkpoint with the best metric, of equals the earliest; None where none was evaluated."""
    rated = [(manifest.metric, manifest) for manifest in manifests if manifest.metric is not None]
    sign = 1 if higher_is_better else -1
    return max(rated, key=lambda item: (sign * item[0], -item[1].step))[1] if rated else None
