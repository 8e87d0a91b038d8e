"""Thousands of generated and corrupted objects, reports and messages: nothing raises, nothing is done again and again."""

import asyncio
import copy
import json
import logging
import random

import pytest

from support import make
from support.simulation.lifecycle import JOB, SERVICE
from support.simulation.specs import at, fields, other, with_value
from support.world import World
from tunesmith_operator.core.kinds import KINDS
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.pods.reports import read_progress
from tunesmith_operator.core.reconcile.progress import ProgressSample

GENERATED = 1200
CORRUPTED = 800
CHILDREN = 400
JUNK = (None, "", "junk", "💥" * 40, -1, 0, 2**63, 1e308, [], {}, [None], {"a": {"b": 1}}, True, "2026-13-45T99:99:99Z")
TEXTS = ("", "{", "{}", "[]", "null", "💥" * 40, "x" * 5000, '{"schemaVersion": 1}', "-1", "NaN", "2026-13-45")
KEPT = frozenset({"name", "namespace", "uid", "kind", "resourceVersion", "creationTimestamp", "generation"})
TIMES = ("Time", "At", "Timestamp")


class Case:
    """A world, and every complaint of the operator about itself."""

    def __init__(self, complaints):
        self.world, self.complaints = World(), complaints

    def rounds(self, key, *names):
        """Reconcile until it is at rest; what it writes after that, it would write for ever."""
        for _ in range(4):
            asyncio.run(self.world.controller.process(key))
        before = len(self.world.cluster.writes)
        asyncio.run(self.world.controller.process(key))
        assert len(self.world.cluster.writes) == before, (self.world.cluster.writes[-3:], names)


class Complaints(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append((record.getMessage(), repr(record.exc_info[1]) if record.exc_info else ""))


@pytest.fixture
def complaints():
    handler, log = Complaints(), logging.getLogger("tunesmith_operator")
    handler.setLevel(logging.ERROR)
    before = (log.level, log.propagate)
    log.addHandler(handler)
    log.propagate = False
    yield handler.found
    log.removeHandler(handler)
    log.level, log.propagate = before


def generated(kind, chance):
    """A custom resource with a few fields of other values, valid each for itself."""
    raw = make.finetunejob() if kind == JOB else make.modeldeployment()
    for path, node in chance.sample(FIELDS[kind], chance.randrange(1, 6)):
        value = other(node, at(raw["spec"], path), chance)
        if value is not None:
            raw["spec"] = with_value(kind, raw["spec"], path, value)
    return raw


FIELDS = {kind: fields(kind) for kind in (JOB, SERVICE)}


def places(value, path=()):
    """Every place in a document."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


def corrupt(document, chance, root):
    """Put something else in one place below `root`, or take it away."""
    path = chance.choice(list(places(document[root])) or [()])
    here = document[root]
    for key in path[:-1]:
        here = here[key]
    if path and chance.random() < 0.2 and isinstance(here, dict):
        del here[path[-1]]
    elif path:
        here[path[-1]] = copy.deepcopy(chance.choice(JUNK))


def strange(document, chance, path=()):
    """Other texts and numbers in the places where the API server lets people put any."""
    for key, value in list(document.items()):
        if key in KEPT or key.endswith(TIMES):
            continue
        if isinstance(value, dict):
            strange(value, chance)
        elif isinstance(value, list):
            for entry in value:
                if isinstance(entry, dict):
                    strange(entry, chance)
        elif chance.random() < 0.15:
            document[key] = chance.choice(TEXTS) if isinstance(value, str) else value
        elif isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.2:
            document[key] = chance.choice((-1, 0, 1, 2**31 - 1))


@pytest.mark.parametrize("kind", [JOB, SERVICE])
def test_no_custom_resource_makes_the_operator_fail(kind, complaints, record_property):
    chance = random.Random(7)
    key = Key(kind, "ml", "sentiment")
    for number in range((GENERATED + CORRUPTED) // 2):
        case, raw = Case(complaints), generated(kind, chance)
        case.world.cluster.put(raw)
        case.rounds(key)
        if number < CORRUPTED // 2:
            known = copy.deepcopy(case.world.cluster.get(kind, "sentiment"))
            for _ in range(chance.randrange(1, 4)):
                corrupt(known, chance, chance.choice(("spec", "status")))
            if case.world.cluster.find_invalid(kind, known["status"]) is None:  # no API server holds such a status
                case.world.cluster.put(known)
            case.rounds(key, known)
        assert complaints == []
    record_property("generated", (GENERATED + CORRUPTED) // 2)
    record_property("crashes", len(complaints))


def serving(world):
    """A deployment at work, with pods of its own."""
    world.cluster.put(make.modeldeployment())
    world.reconcile()
    world.pod("sentiment-r1-quantize")


def training(world):
    world.cluster.put(make.finetunejob())
    world.reconcile()
    world.ends(world.pod("sentiment-1", 1), 137)
    world.exits(world.pod("sentiment-1", 0, suffix="a"), 1, make.failed())
    world.pod("sentiment-1", 0, suffix="b", ready=True)
    world.job_is("sentiment-1", "Suspended", "JobResumed", status="False")


@pytest.mark.parametrize(("kind", "begin"), [(JOB, training), (SERVICE, serving)])
def test_no_child_makes_the_operator_fail(kind, begin, complaints, record_property):
    chance = random.Random(11)
    key = Key(kind, "ml", "sentiment")
    for _ in range(CHILDREN // 2):
        case = Case(complaints)
        begin(case.world)
        for (found, _, name), raw in list(case.world.cluster.objects.items()):
            if found in {item.resource.kind for item in KINDS}:
                continue
            raw = copy.deepcopy(raw)
            strange(raw, chance)
            if raw["metadata"]["name"] == name:
                case.world.cluster.put(raw)
        case.world.now = make.at(chance.uniform(0, 100))
        case.rounds(key)
        assert complaints == []
    record_property("generated", CHILDREN // 2)
    record_property("crashes", len(complaints))


PROGRESS = {
    "schemaVersion": 1, "state": "Training", "globalStep": 3, "maxSteps": 9, "epoch": 0.5, "loss": 1.5, "etaSeconds": 5, "restarts": 1,
    "heartbeatUnix": make.NOW.timestamp(), "workersJoined": 2, "checkpoint": {"step": 3, "uri": "s3://c/3"},
    "dataset": {"trainExamples": 5, "firstBadRow": "x"}, "message": "m", "phaseSeconds": {"a": 1.0},
}  # fmt: skip


def test_no_report_of_a_pod_makes_the_operator_fail(complaints, record_property):
    chance, read = random.Random(13), 0
    key = Key(JOB, "ml", "sentiment")
    for _ in range(CHILDREN):
        progress = {"it": copy.deepcopy(PROGRESS)}
        report = {"it": json.loads(make.succeeded().to_json())}
        for document in (progress, report):
            for _ in range(chance.randrange(1, 3)):
                corrupt(document, chance, "it")
        case = Case(complaints)
        case.world.cluster.put(make.finetunejob())
        case.world.reconcile()
        head = case.world.pod("sentiment-1", 0, ready=True)
        sample = read_progress(json.dumps(progress["it"]))
        if sample is not None:
            read += 1
            uid = case.world.cluster.get("Pod", head)["metadata"]["uid"]
            case.world.samples[key] = ProgressSample(uid, sample, case.world.now)
        case.world.now = make.at(10)
        case.rounds(key, progress)
        text = json.dumps(report["it"])
        case.world.ends(head, chance.choice((0, 1, 40)), chance.choice((text, text[: chance.randrange(len(text))])))
        case.world.job_is("sentiment-1", chance.choice(("Complete", "Failed")), "PodFailurePolicy")
        case.world.now = make.at(60)
        case.rounds(key, report)
        assert complaints == [], (progress, report)
        assert case.world.condition("Succeeded")[0] in ("True", "False")
    assert read > CHILDREN // 4, "most of them are no reports at all"
    record_property("generated", CHILDREN)
    record_property("crashes", len(complaints))
