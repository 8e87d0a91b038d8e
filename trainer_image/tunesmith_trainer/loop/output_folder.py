"""The folder that a run publishes into: what lies there already, and whose it is. No torch.

`preflight` asks before anything is trained, `export` makes room before it writes, and `leases` says who writes there.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatch

from tunesmith_api import keys
from tunesmith_api.artifacts import ModelManifest, RunLease
from tunesmith_api.keys import Reason
from tunesmith_api.plan import TrainingPlan
from tunesmith_store.errors import UserError
from tunesmith_store.files import find_readable
from tunesmith_store.store import ObjectStore

__all__ = ["LEASE", "check_lease", "check_output", "find_lease", "find_published", "is_begun", "make_room", "name_of"]

LEASE = "tunesmith-lease.json"
NAMED = 3
"""Foreign files that a message names."""
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*", "adapter_model.bin", "*config.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.spm", "chat_template*",
)  # fmt: skip
"""Names of what loaders look for beside the weights: left from another model, it would be read with the new one."""


def find_lease(store: ObjectStore, uri: str) -> RunLease | None:
    """Return who writes into a folder, or did; None where nobody says so."""
    return find_readable(store, f"{uri.rstrip('/')}/{LEASE}", RunLease)


def name_of(lease: RunLease) -> str:
    """Return a run's namespace and name."""
    return f"{lease.namespace}/{lease.name}"


def find_published(store: ObjectStore, uri: str) -> ModelManifest | None:
    """Return the manifest of the model in a folder; None where there is none that can be read."""
    return find_readable(store, f"{uri.rstrip('/')}/{keys.MODEL_MANIFEST}", ModelManifest)


def check_output(store: ObjectStore, plan: TrainingPlan, run_digest: str) -> None:
    """Check that publishing would replace nothing but what this very run has written.

    Raises:
        UserError: it would, and the spec doesn't ask for that.
    """
    if plan.output_overwrite:
        return
    uri = plan.output_uri
    published = find_published(store, uri)
    if published is not None:
        if published.plan_digest != run_digest:
            made = f"made {published.created_time} from {published.base_uri}"
            raise _refused(uri, f"holds the finished model of another run or other data ({made})")
        return
    lease = find_lease(store, uri)
    if lease is not None and (lease.run_digest == run_digest or lease.uid == plan.uid):
        return  # what it was writing when it was stopped
    if found := [name for name in _direct(store, uri) if name != LEASE]:
        more = f" and {len(found) - NAMED:,} more" if len(found) > NAMED else ""
        whose = "that this run has not written" if lease is None else f"of an unfinished model of {name_of(lease)}"
        raise _refused(uri, f"holds files {whose}: {', '.join(found[:NAMED])}{more}")


def _refused(uri: str, what: str) -> UserError:
    message = (
        f"spec.output.uri: {uri} {what}. Give this run a folder of its own, or set spec.output.overwrite: true to "
        "replace what is there"
    )
    return UserError(Reason.OUTPUT_EXISTS, message)


def is_begun(store: ObjectStore, uri: str) -> bool:
    """Whether files lie in a folder that are no model yet."""
    return find_published(store, uri) is None and any(name != LEASE for name in _direct(store, uri))


def check_lease(store: ObjectStore, plan: TrainingPlan, uri: str, field: str) -> None:
    """Check, before anything is written into a folder, that no other run has taken it meanwhile.

    `field` is the spec's name of it.

    Raises:
        UserError: one has: it began in the same moment, or this run was taken for dead.
    """
    lease = find_lease(store, uri)
    if lease is None or not plan.uid or lease.uid == plan.uid or lease.released:
        return
    message = (
        f"{field}: {uri} was taken over by {name_of(lease)}, which began in the same moment or while this "
        "run could not be seen: nothing more is written. Give each run folders of its own; one with the same "
        "checkpoint.uri goes on from the last checkpoint once the other has ended"
    )
    raise UserError(Reason.FOLDER_IN_USE, message)


def make_room(store: ObjectStore, uri: str, wanted: Collection[str]) -> None:
    """Delete the manifest of an earlier model, and of its files what the new one doesn't have.

    Without a manifest there is no model, so none is ever a mix of two. Files that are neither its own nor of a kind
    that loaders look for stay, as do subfolders: quantized models of servers lie there.
    """
    uri = uri.rstrip("/")
    published = find_published(store, uri)
    earlier = {entry.path for entry in published.files} if published else set()
    store.delete(f"{uri}/{keys.MODEL_MANIFEST}")
    left = earlier | {name for name in _direct(store, uri) if any(fnmatch(name, kind) for kind in MODEL_FILES)}
    for name in sorted(left - set(wanted)):
        store.delete(f"{uri}/{name}")


def _direct(store: ObjectStore, uri: str) -> list[str]:
    """Return the names of the files in a folder, without those below it and hidden ones: nobody's model."""
    base = uri.rstrip("/") + "/"
    names = [info.uri.removeprefix(base) for info in store.list(uri)]
    return [name for name in names if "/" not in name and not name.startswith(".")]
