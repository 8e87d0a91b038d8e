"""Kinds are known by their registration: a third one would touch its folder and the registry."""

import ast
from pathlib import Path

import pytest

import tunesmith_operator
from support import make
from tunesmith_api import keys
from tunesmith_operator.core.kinds import KINDS, kind_of, owner_key
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.observed import ObservedObjects
from tunesmith_operator.engine.store import WATCHED

OPERATOR = Path(tunesmith_operator.__file__).parent
EXAMPLES = {keys.FINETUNEJOB_KIND: make.finetunejob, keys.MODELDEPLOYMENT_KIND: make.modeldeployment}
KIND_FOLDERS = {kind.resource.kind.lower() for kind in KINDS}


def modules(*but):
    found = [path for path in OPERATOR.rglob("*.py") if not set(path.relative_to(OPERATOR).parts) & set(but)]
    return [(path.relative_to(OPERATOR), ast.parse(path.read_text())) for path in found]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.resource.kind)
def test_a_registration_is_all_that_is_needed_to_decide(kind):
    raw = EXAMPLES[kind.resource.kind]()
    resource = kind.model.model_validate(raw)
    observed = kind.observe(resource, ObservedObjects(), lambda key: None)
    decision = kind.decide(observed, make.NOW, make.CONFIG)
    assert decision.actions
    assert isinstance(decision.status, kind.status)
    assert kind.summary in {condition.type for condition in decision.status.conditions}
    labels = decision.actions[0].manifest.body["metadata"]["labels"]
    assert owner_key("ml", labels) == kind.key("ml", raw["metadata"]["name"])
    assert kind_of(owner_key("ml", labels)) is kind
    assert kind.resource in WATCHED


def test_a_deployment_is_woken_by_the_job_that_it_names():
    kind = kind_of(Key(keys.MODELDEPLOYMENT_KIND, "ml", "sentiment"))
    assert kind.references("ml", {"source": {"fineTuneJobRef": {"name": "a"}}}) == (Key("FineTuneJob", "ml", "a"),)
    assert kind.references("ml", {"source": {"uri": "s3://models/a"}}) == ()


def test_beside_the_registry_and_the_kinds_own_folders_nobody_names_a_kind():
    named = {
        "FINETUNEJOB_KIND",
        "MODELDEPLOYMENT_KIND",
        "FINETUNEJOB",
        "MODELDEPLOYMENT",
        "FineTuneJob",
        "ModelDeployment",
    }
    for path, tree in modules("kinds.py", "resources.py", *KIND_FOLDERS):
        found = {it.id for it in ast.walk(tree) if isinstance(it, ast.Name)}
        found |= {it.attr for it in ast.walk(tree) if isinstance(it, ast.Attribute)}
        assert not found & named, path


def test_no_module_goes_by_two_names():
    for path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert [entry.asname for entry in node.names if entry.asname] == [], path
