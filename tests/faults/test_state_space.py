"""Every field of the CRDs changed in turn on a live object, well and badly, and children that people meddle with.

The declared state is reached, or the change is refused in words; a good spec recovers; nobody else is touched.
"""

import asyncio
import copy
import random

import pytest

from support import make
from support.simulation.kubernetes import STEPS
from support.simulation.lifecycle import JOB, SERVICE
from support.simulation.specs import admission, at, fields, other, with_value, wrong
from support.simulation.world import Simulation
from support.virtualtime import virtually
from tunesmith_api import keys

OF_THAT_NAME = {(kind, "it") for kind in ("Service", "NetworkPolicy", "PodDisruptionBudget")}
BYSTANDERS = ((JOB, "bystander-tuned"), (SERVICE, "bystander-chat"))


class Scene:
    """A live object of the kind under test, `it`, beside a bystander of each kind."""

    def __init__(self, kind):
        self.kind, self.sim, self.outcomes = kind, Simulation(), {}

    def put(self, name="it", **spec):
        made = make.finetunejob(name, **spec) if self.kind == JOB else make.modeldeployment(name, **spec)
        return self.sim.cluster.put(made)

    @property
    def raw(self):
        return self.sim.cluster.get(self.kind, "it")

    def is_carried_out(self):
        accepted = self.sim.condition(self.kind, "it", "Accepted")[0] == "True"
        if (
            not accepted
            or self.sim.status(self.kind, "it").get("observedGeneration") != self.raw["metadata"]["generation"]
        ):
            return False
        return self.kind == JOB or self.sim.condition(SERVICE, "it", "Ready")[0] == "True"

    def is_accepted(self, status="True"):
        found = [it for it in self.sim.status(self.kind, "it").get("conditions", ()) if it["type"] == "Accepted"]
        seen = found and found[0]["observedGeneration"] == self.raw["metadata"]["generation"]
        return bool(seen and found[0]["status"] == status and (status == "True" or len(found[0]["message"]) > 20))

    def replace(self, spec):
        raw = copy.deepcopy(self.raw)
        raw["spec"] = copy.deepcopy(spec)
        raw["metadata"]["generation"] += 1
        self.sim.cluster.put(raw)

    async def begin(self):
        """The bystanders come to rest first."""
        self.sim.cluster.put(make.finetunejob(BYSTANDERS[0][1]))
        self.sim.cluster.put(make.modeldeployment(BYSTANDERS[1][1]))
        await self.sim.until(
            "the bystander's end", lambda: self.sim.condition(*BYSTANDERS[0], "Succeeded")[0] == "True"
        )
        await self.sim.until("the bystander's start", lambda: self.sim.condition(*BYSTANDERS[1], "Ready")[0] == "True")
        await asyncio.sleep(60)
        self.begun = len(self.sim.journal.writes)
        self.sim.kubernetes.last_step = STEPS // 2

    def check(self):
        meddled = [it for it in self.sim.journal.writes[self.begun :] if it.name.startswith("bystander")]
        assert meddled == []
        assert self.sim.bugs + self.sim.journal.violations == []

    async def live(self):
        """Until the object is at work."""
        if self.kind == JOB:
            await self.sim.until("training", lambda: self.sim.condition(JOB, "it", "Succeeded")[1] == "Training")
        await self.sim.until("a carried out spec", self.is_carried_out, 600)

    async def try_(self, path, good, value, reached):
        if value is None:
            return "no other value"
        changed = {**copy.deepcopy(self.raw), "spec": with_value(self.kind, good, path, value)}
        complaints = admission(changed, self.raw)
        if complaints:
            assert all(len(words) > 20 for words in complaints)
            return "refused"
        self.replace(changed["spec"])
        await self.sim.until(f"an answer to {path}", lambda: reached() or self.is_accepted("False"), 900)
        return "carried out" if reached() else "not accepted"


def run(kind, act):
    async def scenario():
        scene = Scene(kind)
        async with scene.sim.running():
            await scene.begin()
            await act(scene)
            await asyncio.sleep(30)
        scene.check()
        return scene

    return virtually(scenario())


@pytest.mark.parametrize("kind", [JOB, SERVICE])
def test_every_field_of_a_live_object_can_be_changed_or_says_why_not(kind, record_property):
    async def act(scene):
        scene.put()
        await scene.live()
        good = copy.deepcopy(scene.raw["spec"])
        for path, node in fields(kind):
            value = other(node, at(good, path) if at(good, path) is not None else node.get("default"), random.Random(1))
            for name, changed in (("well", value), ("badly", wrong(node))):
                outcome = scene.outcomes[(*path, name)] = await scene.try_(path, good, changed, scene.is_carried_out)
                if outcome in ("carried out", "not accepted"):
                    scene.replace(good)
                    await scene.live()

    outcomes = run(kind, act).outcomes
    record_property(f"kind:every_field_of_a_live_{kind}", f"{len(outcomes)}/{len(outcomes)}")
    assert {outcome for path, outcome in outcomes.items() if path[-1] == "badly"} == {"refused"}
    well = [outcome for path, outcome in outcomes.items() if path[-1] == "well"]
    assert len(well) == len(fields(kind))
    assert well.count("carried out") >= (4 if kind == JOB else 12), outcomes


def test_every_field_of_a_job_can_be_set_before_the_start_or_says_why_not(record_property):
    async def act(scene):
        for number, (path, node) in enumerate(fields(JOB)):
            scene.put(suspend=True)
            await scene.sim.until("suspension", lambda: scene.sim.status(JOB, "it").get("phase") == "Suspended", 60)
            good = copy.deepcopy(scene.raw["spec"])
            value = other(
                node, at(good, path) if at(good, path) is not None else node.get("default"), random.Random(number)
            )
            outcome = scene.outcomes[path] = await scene.try_(path, good, value, scene.is_accepted)
            if outcome == "carried out":
                scene.replace({**scene.raw["spec"], "suspend": False})
                await scene.sim.until("a carried out spec", scene.is_carried_out, 60)
                assert scene.sim.cluster.get("Job", "it-1") is not None
            scene.sim.delete(JOB, "it")
            await scene.sim.until("the end of it", lambda: not children(scene), 120)

    outcomes = run(JOB, act).outcomes
    record_property("kind:every_field_of_a_waiting_FineTuneJob", f"{len(outcomes)}/{len(outcomes)}")
    assert list(outcomes.values()).count("carried out") > 60, outcomes


def children(scene):
    found = {}
    for (kind, _, name), raw in scene.sim.cluster.objects.items():
        if (kind != "Pod" and name.startswith("it-")) or (kind, name) in OF_THAT_NAME:
            spec = raw.get("spec") or {}
            found[(kind, name)] = copy.deepcopy([spec, raw.get("data"), raw["metadata"].get("labels")])
    return found


def meddlings(scene):
    """What people do to children by hand, as (name, what to do)."""
    cluster = scene.sim.cluster
    for kind, name in children(scene):
        if kind != "Secret":
            yield f"delete {kind} {name}", lambda kind=kind, name=name: cluster.remove(kind, "ml", name, cascade=False)
        if kind == "Service":
            change = {"spec": {"selector": {"app": "mine"}, "ports": []}}
        elif kind == "Deployment":
            change = {"spec": {"replicas": 0}}
        elif kind == "ConfigMap":
            change = {"data": {keys.PLAN_FILE: "{}"}}
        elif kind == "NetworkPolicy":
            change = {"spec": {"ingress": []}}
        elif kind == "PodDisruptionBudget":
            change = {"spec": {"maxUnavailable": "100%"}}
        elif kind == "Job" and scene.kind == JOB:
            change = {"spec": {"suspend": True, "parallelism": 0}}
        else:
            continue
        yield f"edit {kind} {name}", lambda kind=kind, name=name, change=change: cluster.change(kind, name, change)


@pytest.mark.parametrize("kind", [JOB, SERVICE])
def test_whoever_meddles_with_children_is_put_right(kind, record_property):
    tried = []

    async def act(scene):
        scene.put()
        await scene.live()
        await asyncio.sleep(30)
        before = children(scene)
        for name, meddle in list(meddlings(scene)):
            if kind == SERVICE and name.startswith("delete Job"):
                continue  # the Job of a revision that serves isn't needed any more
            tried.append(name)
            meddle()
            await asyncio.sleep(40)
            now = children(scene)
            restarted = kind == JOB and name.startswith("delete Job")
            assert set(now) == set(before), name
            assert restarted or now == before, name
            await scene.live()
        for pod in list(scene.sim.cluster.of_kind("Pod")):
            if pod["metadata"]["name"].startswith("it-"):
                scene.sim.cluster.remove("Pod", "ml", pod["metadata"]["name"])
        await asyncio.sleep(40)
        await scene.live()

    run(kind, act)
    record_property(f"kind:meddling_with_children_of_a_{kind}", f"{len(tried)}/{len(tried)}")
    assert len(tried) >= 6
