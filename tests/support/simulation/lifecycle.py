"""The whole life of both kinds, as users have it: train, pause, go on, serve, change, scale, delete; and how it ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from support import make
from support.simulation.kubernetes import STEPS
from support.simulation.world import Simulation
from support.virtualtime import virtually
from tunesmith_api import keys

JSON = dict[str, Any]
JOB, SERVICE = keys.FINETUNEJOB_KIND, keys.MODELDEPLOYMENT_KIND
TUNED, CHAT = "sentiment", "chat"


@dataclass
class Life:
    """What came of one life."""

    final: JSON
    simulation: Simulation
    faults: list[str]
    """What went wrong with the operator; empty where all is well."""


async def _train(it: Simulation) -> None:
    it.kubernetes.last_step = 12
    await it.until("training", lambda: it.status(JOB, TUNED).get("progress", {}).get("globalStep", 0) >= 8)
    it.cluster.change(JOB, TUNED, {"spec": {"suspend": True}})
    await it.until("suspension", lambda: it.status(JOB, TUNED).get("phase") == "Suspended")
    await it.until("the pods' end", lambda: not _pods(it, TUNED))
    it.cluster.change(JOB, TUNED, {"spec": {"suspend": False}})
    it.kubernetes.last_step = STEPS
    await it.until("success", lambda: it.condition(JOB, TUNED, "Succeeded")[0] == "True")


async def _serve(it: Simulation) -> None:
    await it.until("the first revision", lambda: _serves(it, f"{CHAT}-r1", 1))
    it.cluster.change(SERVICE, CHAT, {"spec": {"engine": {"contextLength": 4096}}})
    await it.until("the second revision", lambda: _serves(it, f"{CHAT}-r2", 1))
    it.cluster.change(SERVICE, CHAT, {"spec": {"replicas": 3}})
    await it.until("three replicas", lambda: _serves(it, f"{CHAT}-r2", 3))
    await it.until("the old one's end", lambda: it.cluster.get("Deployment", f"{CHAT}-r1") is None)


def _serves(it: Simulation, revision: str, replicas: int) -> bool:
    raw, status = it.cluster.get(SERVICE, CHAT), it.status(SERVICE, CHAT)
    assert raw is not None
    seen = status.get("observedGeneration") == raw["metadata"]["generation"]
    ready = it.condition(SERVICE, CHAT, "Ready")[0] == "True" and status.get("readyReplicas") == replicas
    return seen and ready and status.get("currentRevision") == revision


def _pods(it: Simulation, name: str) -> list[JSON]:
    return [pod for pod in it.cluster.of_kind("Pod") if pod["metadata"]["labels"].get(keys.LABEL_FINETUNEJOB) == name]


async def _delete(it: Simulation) -> None:
    it.delete(SERVICE, CHAT)
    it.delete(JOB, TUNED)
    await it.until("the end of all children", lambda: not it.cluster.objects, 600)
    await asyncio.sleep(120)
    await it.until("the end of all children", lambda: not it.cluster.objects, 600)


def _summary(it: Simulation, kind: str, name: str) -> JSON:
    raw, status = it.cluster.get(kind, name), it.status(kind, name)
    assert raw is not None
    return {
        "phase": status["phase"],
        "conditions": sorted((one["type"], one["status"], one["reason"]) for one in status["conditions"]),
        "carried out": status["observedGeneration"] == raw["metadata"]["generation"],
        "attempts": [(one["number"], one["outcome"], one.get("reason")) for one in status.get("attempts", ())],
        "revisions": [
            (one["number"], one["phase"], one["hash"], one["weight"], one["reason"])
            for one in status.get("revisions", ())
        ],
        **{
            field: status.get(field)
            for field in ("restarts", "model", "metrics", "currentRevision", "readyReplicas", "url")
        },
        "step": status.get("progress", {}).get("globalStep"),
    }


def final_state(it: Simulation) -> JSON:
    """What must be the same whatever went wrong on the way."""
    return {TUNED: _summary(it, JOB, TUNED), CHAT: _summary(it, SERVICE, CHAT), "children": _children(it)}


def _children(it: Simulation) -> list[str]:
    return sorted(
        f"{kind} {name} {raw['metadata'].get('annotations', {}).get(keys.ANNOTATION_SPEC_HASH, '')}"
        for (kind, _, name), raw in it.cluster.objects.items()
        if kind not in (JOB, SERVICE, "Pod")
    )


async def _canaries(it: Simulation) -> None:
    """A bad canary, a good one, and the way back to the first revision."""
    it.kubernetes.error_percent = lambda pod: 10.0 if pod["spec"]["containers"][0]["image"].endswith(":bad") else 0.0
    steps = [{"weight": 25, "pauseSeconds": 5}, {"weight": 75}]
    analysis = {"maxErrorPercent": 5, "minRequests": 20, "afterSwitchSeconds": 5}
    rollout = {"strategy": "Canary", "steps": steps, "analysis": analysis}
    it.cluster.put(make.modeldeployment(CHAT, replicas=2, rollout=rollout))
    await it.until("the first revision", lambda: _serves(it, f"{CHAT}-r1", 2))
    it.cluster.change(SERVICE, CHAT, {"spec": {"image": "localhost/server:bad"}})
    await it.until("a bad canary's end", lambda: _failed(it, f"{CHAT}-r2", "RolledBack"))
    await it.until("the first revision again", lambda: _serves(it, f"{CHAT}-r1", 2))
    it.cluster.change(SERVICE, CHAT, {"spec": {"image": None}})
    it.cluster.change(SERVICE, CHAT, {"spec": {"engine": {"contextLength": 4096}}})
    await it.until("a pause", lambda: it.status(SERVICE, CHAT).get("phase") == "Paused")
    it.cluster.change(SERVICE, CHAT, {"spec": {"rollout": {"promote": f"{CHAT}-r3"}}})
    await it.until("a good canary's end", lambda: _serves(it, f"{CHAT}-r3", 2))
    it.cluster.change(SERVICE, CHAT, {"spec": {"rollout": {"rollbackTo": f"{CHAT}-r1", "promote": f"{CHAT}-r4"}}})
    await it.until("the first revision's template", lambda: _serves(it, f"{CHAT}-r4", 2))


def _failed(it: Simulation, revision: str, reason: str) -> bool:
    found = [one for one in it.status(SERVICE, CHAT).get("revisions", ()) if one["name"] == revision]
    deployment = it.cluster.get("Deployment", revision)
    ended = deployment is None or deployment["spec"]["replicas"] == 0
    return (
        bool(found) and (found[0]["phase"], found[0]["reason"], found[0]["weight"]) == ("Failed", reason, 0) and ended
    )


def roll_out(prepare: Callable[[Simulation], None] = lambda it: None, seed: int = 1, calm: float = 15.0) -> Life:
    """A deployment's canaries, good and bad, without a job or an end."""
    it = Simulation(seed)
    final: JSON = {}
    faults: list[str] = []

    async def story() -> None:
        prepare(it)
        async with it.running():
            try:
                await _canaries(it)
                await asyncio.sleep(calm)
                children = _children(it)
                final.update(json.loads(json.dumps({CHAT: _summary(it, SERVICE, CHAT), "children": children})))
            except AssertionError as error:
                faults.append(f"{error}: {json.dumps(it.status(SERVICE, CHAT))[:3000]} {list(it.cluster.objects)}")

    virtually(story())
    return Life(final, it, [*faults, *it.journal.violations, *it.bugs])


def live(prepare: Callable[[Simulation], None] = lambda it: None, seed: int = 1, calm: float = 60.0) -> Life:
    """One life from creation to deletion. `prepare` says what goes wrong; after the last step it is calm for a while."""
    it = Simulation(seed)
    final: JSON = {}
    faults: list[str] = []

    async def story() -> None:
        it.cluster.put(make.finetunejob(TUNED))
        source: JSON = {"fineTuneJobRef": {"name": TUNED}, "uri": None}
        it.cluster.put(make.modeldeployment(CHAT, source=source, storage=None))
        prepare(it)
        async with it.running():
            try:
                await _train(it)
                await _serve(it)
                await asyncio.sleep(calm)
                final.update(json.loads(json.dumps(final_state(it))))
                await _delete(it)
            except AssertionError as error:
                state = {name: it.status(kind, name) for kind, name in ((JOB, TUNED), (SERVICE, CHAT))}
                faults.append(f"{error}: {json.dumps(state)[:3000]} {list(it.cluster.objects)}")

    virtually(story())
    return Life(final, it, [*faults, *it.journal.violations, *it.bugs])
