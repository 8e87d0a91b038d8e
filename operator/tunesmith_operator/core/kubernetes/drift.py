"""Drift: where a live object is not what the operator wrote, and the merge patch that puts it right.

A hash of our own on an object says what was written, and nothing of what became of it since: whoever scales a
Deployment or edits a Service leaves the annotation alone. So every child's own fields are compared, by three rules.

* A field that the manifest doesn't have isn't ours: defaults of the API server stand beside ours, and so may settings
  of others, but for maps that mean something else with one more entry (selectors, node selectors, amounts).
* A list is ours as a whole: one more port or rule is drift. A merge patch replaces the list, where server-side apply
  would leave the entries of another manager in it.
* Of a Job only what Kubernetes lets change is compared, but for `suspend` where Kueue holds the Job in a queue, and the
  queue itself, which Kueue lets change while the Job is suspended; of a ConfigMap, digests of the entries.

`reconcile.children` asks for it, and the engine, of the API server's answer to a write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from tunesmith_api.keys import LABEL_QUEUE, QUEUE_LABELS
from tunesmith_operator.core.kubernetes.manifest import JSON, Manifest
from tunesmith_operator.core.kubernetes.objects import ChildView, digests
from tunesmith_operator.core.kubernetes.resources import CONFIG_MAP, JOB
from tunesmith_operator.core.kubernetes.workloads import JOB_FIELDS, JobView
from tunesmith_operator.core.text import amount

__all__ = ["correction", "fields_of", "fingerprint", "was_written"]

_WHOLE: Final = frozenset(
    {
        "selector",
        "podSelector",
        "namespaceSelector",
        "labelSelector",
        "matchLabels",
        "nodeSelector",
        "requests",
        "limits",
    }
)
"""Maps that are ours as a whole."""
_AMOUNTS: Final = frozenset({"requests", "limits"})


def correction(manifest: Manifest, child: ChildView) -> JSON:
    """The merge patch that makes the child what the manifest says; empty where it is that."""
    found = _change(json.loads(child.content or b"{}"), _compared(manifest, child))
    patch: JSON = found[0] if found else {}
    if manifest.resource == CONFIG_MAP and patch:
        patch = {"data": {name: manifest.body["data"][name] for name in patch["data"]}}
    metadata = manifest.body["metadata"]
    if manifest.resource != JOB and child.spec_hash != manifest.hash:
        patch["metadata"] = {name: metadata[name] for name in ("labels", "annotations")}
    if (
        isinstance(child, JobView)
        and child.suspended
        and metadata["labels"].get(LABEL_QUEUE, child.queue) != child.queue
    ):
        patch["metadata"] = {"labels": {name: metadata["labels"].get(name) for name in QUEUE_LABELS}}
    return patch


def fields_of(patch: JSON) -> str:
    """The fields that a correction writes, for a message."""
    found = ((top, inner) for top in patch if top != "metadata" for inner in patch[top])
    return ", ".join(f"{top}.{inner}" for top, inner in found)


def was_written(difference: JSON, written: JSON) -> bool:
    """Whether every field that differs is one that was just written, and so the API server's own doing."""
    return all(
        name in written
        and (not isinstance(value, dict) or (isinstance(written[name], dict) and was_written(value, written[name])))
        for name, value in difference.items()
    )


def fingerprint(manifest: Manifest, child: ChildView) -> str:
    """Stands for the child as it is now, measured by this manifest."""
    content = hashlib.blake2b(child.content, digest_size=8).hexdigest()
    return f"{child.uid}/{manifest.hash}/{child.spec_hash}/{content}"


def _compared(manifest: Manifest, child: ChildView) -> JSON:
    body = manifest.body
    if manifest.resource == JOB:
        # Kueue's webhook gives a Job of ours a queue, too, where its namespace has a default one
        queued = LABEL_QUEUE in body["metadata"]["labels"] or (isinstance(child, JobView) and child.queue)
        theirs = {"suspend"} if queued else set[str]()
        fields = ((name, default) for name, default in JOB_FIELDS.items() if name not in theirs)
        return {"spec": {name: body["spec"].get(name, default) for name, default in fields}}
    if manifest.resource == CONFIG_MAP:
        return {"data": digests(body["data"])}
    return {"spec": body["spec"]}


def _change(live: Any, wanted: Any, field: str = "") -> tuple[()] | tuple[Any]:
    """What a merge patch has to say at this place, if anything."""
    if isinstance(wanted, Mapping) and isinstance(live, Mapping):
        changes = {name: found[0] for name, value in wanted.items() if (found := _change(live.get(name), value, name))}
        if field in _AMOUNTS:
            changes = {name: value for name, value in changes.items() if amount(live.get(name)) != amount(value)}
        if field in _WHOLE:
            changes |= dict.fromkeys(live.keys() - wanted.keys())
        return (changes,) if changes else ()
    if isinstance(wanted, list) and isinstance(live, list) and len(live) == len(wanted):
        same = not any(_change(one, other, field) for one, other in zip(live, wanted, strict=True))
        return () if same else (wanted,)
    # the API server leaves out an empty value or map, though not an empty object (emptyDir: {})
    left_out = live is None and not wanted and (field in _WHOLE or not isinstance(wanted, Mapping))
    return () if live == wanted or left_out else (wanted,)
