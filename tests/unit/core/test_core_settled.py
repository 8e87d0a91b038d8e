"""An idle decide builds no manifest; what differs in anything is looked at anew."""

import pytest

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND
from tunesmith_operator.core.kinds import kind_of
from tunesmith_operator.core.kubernetes.manifest import Owner
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile import settled
from tunesmith_operator.core.reconcile.decision import Delete
from tunesmith_operator.core.reconcile.settled import unless_settled


@pytest.fixture
def built(monkeypatch):
    """Names of the manifests that are built."""
    names, manifest = [], Owner.manifest

    def counting(owner, resource, name, *more):
        names.append(name)
        return manifest(owner, resource, name, *more)

    monkeypatch.setattr(Owner, "manifest", counting)
    return names


@pytest.mark.parametrize("kind", [FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND])
def test_an_idle_decide_builds_no_manifest(built, kind):
    world, key = World(), Key(kind, "ml", "sentiment")
    world.cluster.put(make.finetunejob() if kind == FINETUNEJOB_KIND else make.modeldeployment())
    world.reconcile()
    world.wait(6)

    def decided():
        built.clear()
        return kind_of(key).decide(world.observed(key), world.now, world.config).actions

    decided()
    assert (decided(), built) == ((), [])
    (policy,) = world.cluster.of_kind("NetworkPolicy")
    world.cluster.change("NetworkPolicy", policy["metadata"]["name"], {"spec": {"ingress": [{}]}})
    assert len(decided()) == 1
    assert built
    world.reconcile()
    decided()
    world.cluster.change(kind, "sentiment", {"spec": {"storage": {"region": "eu-west-1"}}})
    decided()
    assert built, "another spec"


def test_only_so_many_cases_are_remembered(monkeypatch):
    monkeypatch.setattr(settled, "_MOST", 3)
    settled._settled.clear()
    asked = []
    for case in (1, 2, 3, 1, 4, 1, 2):
        unless_settled(case, lambda case=case: asked.append(case) or ())
    assert asked == [1, 2, 3, 4, 2], "the one that was asked for longest ago goes first"
    assert len(settled._settled) == 3


def test_what_is_to_be_done_is_worked_out_until_it_is_done():
    action = Delete(None, "ml", "x", "u")
    assert unless_settled("to do", lambda: [action]) == [action]
    assert unless_settled("to do", lambda: [action]) == [action]
