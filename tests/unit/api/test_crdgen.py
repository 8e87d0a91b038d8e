"""The generated schema is structural, complete and documented."""

import pytest
from pydantic import BaseModel

from tunesmith_crdgen.crd import KINDS, custom_resource_definition
from tunesmith_crdgen.schema import structural_schema


def walk(node, path=""):
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            yield from walk(node[key], f"{path}[]")


@pytest.fixture(params=KINDS, ids=lambda info: info.kind)
def schema(request):
    return custom_resource_definition(request.param)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def test_every_node_is_structural(schema):
    for path, node in walk(schema):
        assert not {"$ref", "anyOf", "allOf", "title", "const", "$defs"} & node.keys(), path
        assert "type" in node or node.get("x-kubernetes-int-or-string"), path
        assert not any(key.startswith("x-tunesmith") for key in node), path


def test_every_field_is_described(schema):
    undocumented = [
        path
        for path, node in walk(schema)
        if path and not path.endswith("[]") and path != ".metadata" and len(node.get("description", "")) < 5
    ]
    assert undocumented == []


def test_every_text_list_and_map_of_the_spec_is_bounded(schema):
    for path, node in walk(schema["properties"]["spec"], ".spec"):
        if node.get("type") == "string" and "enum" not in node:
            assert "maxLength" in node, path
        if node.get("type") == "array":
            assert "maxItems" in node, path
        if node.get("type") == "integer":
            assert "minimum" in node, path
        if node.get("type") == "object" and isinstance(node.get("additionalProperties"), dict):
            assert "maxProperties" in node, path


SWITCHES = {  # booleans of which a third value can't be thought; all else is an enumeration
    ".spec.suspend", ".spec.checkpoint.keepBest", ".spec.dataset.streaming", ".spec.method.lora.useRslora", ".spec.output.overwrite",
    ".spec.method.quantizedBase.useDoubleQuant", ".spec.tracking.tensorBoard", ".spec.training.gradientCheckpointing",
    ".spec.training.groupByLength", ".spec.training.loadBestModelAtEnd", ".spec.training.packing",
}  # fmt: skip


def test_fractions_are_numbers_of_0_or_more_and_booleans_are_plain_switches(schema):
    for path, node in walk(schema["properties"]["spec"], ".spec"):
        assert node.get("type") != "number" or node["minimum"] == 0, path
        assert not isinstance(node.get("default"), float) or node["type"] == "number", path
        assert node.get("type") != "boolean" or path in SWITCHES, path


def test_status_has_no_defaults_and_conditions_are_a_map(schema):
    status = schema["properties"]["status"]
    assert not [path for path, node in walk(status) if path and "default" in node]
    (condition,) = status["default"]["conditions"]
    assert condition["type"] in ("Succeeded", "Ready")
    assert (condition["status"], condition["message"]) == ("Unknown", "Waiting for the operator.")
    assert status["default"]["phase"] == "Pending"
    assert status["properties"]["conditions"]["x-kubernetes-list-map-keys"] == ["type"]


def test_an_optional_object_stays_absent_and_a_defaulted_one_is_filled_in():
    class Inner(BaseModel):
        """Inner."""

        size: int = 1

    class Spec(BaseModel):
        """Spec."""

        filled: Inner = Inner()
        absent: Inner | None = None

    class Kind(BaseModel):
        """Kind."""

        spec: Spec
        status: Spec

    spec = structural_schema(Kind)["properties"]["spec"]["properties"]
    assert spec["filled"]["default"] is not None
    assert "default" not in spec["absent"]


def test_a_union_has_no_structural_form():
    class Spec(BaseModel):
        """Spec."""

        value: int | str = 1

    class Kind(BaseModel):
        """Kind."""

        spec: Spec
        status: Spec

    with pytest.raises(ValueError, match="value"):
        structural_schema(Kind)
