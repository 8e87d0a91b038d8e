"""Specs by the CRDs' own schema: every field, other values for it, good and bad, and what admission says to a change."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import cel
import yaml

from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment
from tunesmith_cli.refusals import refusals

JSON = dict[str, Any]
Path_ = tuple[str, ...]
CRDS: Final = Path(__file__).resolve().parents[3] / "crds"
MODELS: Final = {keys.FINETUNEJOB_KIND: FineTuneJob, keys.MODELDEPLOYMENT_KIND: ModelDeployment}
FILES: Final = {keys.FINETUNEJOB_KIND: "finetunejobs", keys.MODELDEPLOYMENT_KIND: "modeldeployments"}
BY_PATTERN: Final = (
    ("s3://", ("s3://models/other", "s3://data/more.jsonl", "pvc://claim/path", "hf://owner/name")),
    ("https?|file", ("http://mlflow:5000", "file:///x")),
    ("^https?://", ("http://other.svc:9000", "https://mirror")),
    ("Ki|Mi", ("2", "500m", "2Gi", "3Gi")),
    ("[eE]-?", ("0.3", "1", "2e-4")),
    ("^[a-z0-9](", ("other", "x-1")),
)


@cache
def schema(kind: str) -> JSON:
    """The whole object's schema, as the CRD has it."""
    document = yaml.safe_load((CRDS / f"tunesmith.dev_{FILES[kind]}.yaml").read_text())
    found: JSON = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def fields(kind: str) -> list[tuple[Path_, JSON]]:
    """Every field of the spec that holds a value, by its path."""
    return list(_leaves((), schema(kind)["properties"]["spec"]))


def _leaves(path: Path_, node: JSON) -> Iterator[tuple[Path_, JSON]]:
    if not node.get("properties"):
        yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from _leaves((*path, name), inner)


def other(node: JSON, now: Any, chance: random.Random) -> Any:
    """Another value that the field may have."""
    candidates = [value for value in _values(node, now, chance) if value != now]
    return candidates[0] if candidates else None


def _values(node: JSON, now: Any, chance: random.Random) -> list[Any]:
    kind = node.get("type")
    if "enum" in node:
        return chance.sample(node["enum"], len(node["enum"]))
    if kind == "boolean":
        return [True, False]
    if kind == "integer":
        step, least = node.get("multipleOf", 1), node.get("minimum", 0)
        base = now if isinstance(now, int) else max(least, step)
        found = [base + step, base - step, base]
        return [it for it in found if least <= it <= node.get("maximum", 2**31)]
    if kind == "array":
        return [[_values(node["items"], None, chance)[0]], []][: 1 if node.get("minItems") else 2]
    if kind == "object" and "additionalProperties" in node:
        return [{"zone": "a"}, {}]
    if kind == "object":
        inner = node.get("properties", {})
        return [
            {name: _values(it, None, chance)[0] for name, it in inner.items() if name in node.get("required", inner)}
        ]
    pattern = node.get("pattern", "")
    for part, values in BY_PATTERN:
        if part in pattern:
            return [value for value in values if part != "s3://" or value.startswith("s3") or "pvc" in pattern]
    return ["other", "text"]


def wrong(node: JSON) -> Any:
    """A value that the field can't have."""
    match node.get("type"):
        case "integer":
            return node["minimum"] - 1 if "minimum" in node else "many"
        case "boolean" | "object":
            return "perhaps"
        case "array":
            return {"0": "no list"}
    return "no such value" if "enum" in node else [1]


def at(spec: JSON, path: Path_) -> Any:
    """The value at a path; None where there is none."""
    value: Any = spec
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def with_value(kind: str, spec: JSON, path: Path_, value: Any) -> JSON:
    """The spec with one field set; what the folders on the way require is there too."""
    changed = copy.deepcopy(spec)
    here, node = changed, schema(kind)["properties"]["spec"]
    for name in path[:-1]:
        node = node["properties"][name]
        if not isinstance(here.get(name), dict):
            chance = random.Random(1)
            here[name] = {it: _values(node["properties"][it], None, chance)[0] for it in node.get("required", ())}
        here = here[name]
    here[path[-1]] = value
    return changed


def admission(new: JSON, old: JSON | None = None) -> list[str]:
    """What the API server says against an object, or against the change of one; nothing if it is fine."""
    kind = MODELS[new["kind"]]
    document = {name: new[name] for name in ("apiVersion", "kind", "metadata", "spec")}
    found = refusals({**document, "metadata": {"name": new["metadata"]["name"], "namespace": "ml"}}, kind)
    if found or old is None:
        return found
    after, before = (_resolved(it) for it in (new, old))
    rules = [it for it in schema(new["kind"])["x-kubernetes-validations"] if "oldSelf" in it["rule"]]
    return [it["message"] for it in rules if cel.evaluate(it["rule"], {"self": after, "oldSelf": before}) is not True]


def _resolved(raw: JSON) -> JSON:
    model = MODELS[raw["kind"]].model_validate(raw)
    found: JSON = json.loads(model.model_dump_json(by_alias=True, exclude_none=True))
    if "startTime" not in raw.get("status", {}):
        found.pop("status", None)
    return found
