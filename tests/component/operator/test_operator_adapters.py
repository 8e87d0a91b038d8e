"""LoRA adapters of a served model: converted once, told to the servers in a list, added and removed without a restart."""

import json

import pytest

from support import make
from support.begun import condition, edit
from support.world import World
from tunesmith_api.adapters import AdapterSet
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.pods.figures import NOTHING, Tally, read_figures
from tunesmith_operator.core.reconcile.progress import ServersSample

KIND = MODELDEPLOYMENT_KIND
PIRATE = {"name": "pirate", "uri": "s3://models/adapters/pirate"}
MADE = {"pirate": "1" * 64, "legal": "2" * 64, "tuned": "3" * 64}
LEGAL = {"name": "legal", "uri": "s3://models/adapters/legal"}


def quantize(world: World, revision: str = "r1", base: str = "b") -> None:
    job = f"sentiment-{revision}-quantize"
    uri = f"s3://models/sentiment/quantized/{revision}"
    model = ModelRef(uri=uri, digest="a" * 64, size_bytes=7, base_digest=base * 64)
    world.ends(world.pod(job), 0, TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=model))
    world.job_is(job, "Complete")
    world.reconcile()


def serving(**spec) -> World:
    world = World()
    world.cluster.put(make.modeldeployment(**spec))
    world.reconcile()
    quantize(world)
    if world.cluster.get("Deployment", "sentiment-r1") is not None:
        world.rolls_out("sentiment-r1")
    world.wait(5)
    return world


def jobs(world: World) -> dict[str, str]:
    """The Jobs that convert adapters, by the name of the adapter."""
    found = {}
    for job in world.cluster.of_kind("Job"):
        name = job["metadata"]["name"]
        if "-adapter-" in name:
            plan = ServingPlan.from_json(world.cluster.get("ConfigMap", name)["data"]["plan.json"])
            found[plan.adapter.name] = name
    return found


def convert(world: World, adapter: str) -> None:
    model = ModelRef(
        uri=f"s3://models/sentiment/quantized/adapters/{adapter}",
        digest=MADE[adapter],
        size_bytes=3,
        base_digest="5" * 64,
    )
    job = jobs(world)[adapter]
    world.ends(world.pod(job), 0, TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=model))
    world.job_is(job, "Complete")
    world.reconcile()


def refuse(world: World, adapter: str, message: str) -> None:
    job = jobs(world)[adapter]
    report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.ADAPTER_INVALID, message=message)
    world.ends(world.pod(job), 40, report)
    world.job_is(job, "Failed")
    world.reconcile()


def told(world: World, revision: str = "r1") -> dict[str, str]:
    """What the servers of a revision are to have: name → digest."""
    data = world.cluster.get("ConfigMap", f"sentiment-{revision}-adapters")["data"]["adapters.json"]
    return {it.name: it.digest for it in AdapterSet.from_json(data).adapters}


def say(world: World, *adapters: str, revision: str = "r1") -> None:
    """All pods of the revision say that they serve these."""
    heard = frozenset(f"{it}@{MADE[it]}" for it in adapters)
    key = Key(KIND, "ml", "sentiment")
    world.samples[key] = ServersSample(f"sentiment-{revision}/adapters", NOTHING, heard)
    world.reconcile()


def phases(world: World) -> dict[str, str]:
    return {it["name"]: it["phase"] for it in world.status(KIND).get("adapters", ())}


def test_adapters_come_and_go_and_the_servers_stay_as_they_are():
    world = serving()
    assert not jobs(world)
    assert condition(world, "AdaptersReady") == ("", "", "")
    before = json.dumps(world.cluster.get("Deployment", "sentiment-r1")["spec"])
    edit(world, adapters=[PIRATE, LEGAL])
    assert phases(world) == {"pirate": "Converting", "legal": "Converting"}
    assert told(world) == {}
    convert(world, "pirate")
    assert told(world) == {"pirate": MADE["pirate"]}
    assert phases(world) == {"pirate": "Loading", "legal": "Converting"}
    convert(world, "legal")
    say(world, "pirate", "legal")
    assert phases(world) == {"pirate": "Served", "legal": "Served"}
    assert condition(world, "AdaptersReady") == ("True", "AdaptersServed", "Served: pirate, legal.")
    (first, _) = world.status(KIND)["adapters"]
    assert (first["digest"], first["artifactDigest"], first["revision"]) == ("5" * 64, MADE["pirate"], "sentiment-r1")
    edit(world, adapters=[LEGAL])
    assert told(world) == {"legal": MADE["legal"]}
    assert list(jobs(world)) == ["legal"]
    assert phases(world) == {"legal": "Served"}
    edit(world, adapters=[])
    assert told(world) == {}
    assert condition(world, "AdaptersReady")[:2] == ("True", "AdaptersServed")
    assert [it["name"] for it in world.status(KIND)["revisions"]] == ["sentiment-r1"]
    assert json.dumps(world.cluster.get("Deployment", "sentiment-r1")["spec"]) == before
    assert condition(world, "Ready")[:2] == ("True", "ReplicasAvailable")


def test_servers_have_the_list_mounted_before_there_is_one():
    world = serving()
    pod = world.cluster.get("Deployment", "sentiment-r1")["spec"]["template"]["spec"]
    volume = {"name": "config-0", "configMap": {"name": "sentiment-r1-adapters", "optional": True}}
    assert volume in pod["volumes"]
    mount = {"name": "config-0", "mountPath": "/etc/tunesmith-adapters", "readOnly": True}
    assert mount in pod["containers"][0]["volumeMounts"]


def test_one_that_does_not_fit_is_told_with_its_reason_and_the_others_are_served():
    world = serving(adapters=[PIRATE, LEGAL])
    refuse(world, "pirate", "this adapter doesn't fit the served model: its q_proj is of 8 x 8 weights")
    convert(world, "legal")
    world.rolls_out("sentiment-r1")
    world.reconcile()
    say(world, "legal")
    assert told(world) == {"legal": MADE["legal"]}
    assert phases(world) == {"pirate": "Failed", "legal": "Served"}
    status, reason, message = condition(world, "AdaptersReady")
    assert (status, reason) == ("False", "AdapterInvalid")
    assert "pirate: this adapter doesn't fit" in message
    assert f"kubectl delete job -n ml {jobs(world)['pirate']}" in message
    assert "1 of 2 are served" in message
    assert ("Warning", "AdapterInvalid") in world.cluster.events
    assert condition(world, "Ready")[:2] == ("True", "ReplicasAvailable")
    world.cluster.remove("Job", "ml", jobs(world)["pirate"])
    world.reconcile()
    assert phases(world)["pirate"] == "Converting"


def test_a_pod_that_cannot_start_says_why_and_the_others_are_served():
    world = serving()
    edit(world, adapters=[PIRATE, LEGAL])
    convert(world, "legal")
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    container = {"name": "quantize", "image": "localhost/server:1", "state": waiting}
    world.pod(jobs(world)["pirate"], phase="Pending", containerStatuses=[container])
    world.reconcile()
    (found, _) = world.status(KIND)["adapters"]
    assert found["phase"] == "Converting"
    assert "can't get image localhost/server:1" in found["message"]
    assert told(world) == {"legal": MADE["legal"]}


def test_servers_of_a_first_revision_wait_for_the_adapters_but_not_for_ever():
    world = World()
    world.cluster.put(make.modeldeployment(adapters=[PIRATE], rollout={"progressDeadlineSeconds": 600}))
    world.reconcile()
    assert phases(world) == {"pirate": "Pending"}
    quantize(world)
    assert world.cluster.get("Deployment", "sentiment-r1") is None
    world.wait(590)
    assert world.cluster.get("Deployment", "sentiment-r1") is None
    world.wait(20)
    assert world.cluster.get("Deployment", "sentiment-r1") is not None


def test_a_new_revision_of_the_same_model_has_its_adapters_from_the_start():
    world = serving(adapters=[PIRATE])
    convert(world, "pirate")
    world.rolls_out("sentiment-r1")
    world.wait(5)
    edit(world, resources={"memory": "8Gi"})
    quantize(world, "r2")
    assert told(world, "r2") == {"pirate": MADE["pirate"]}
    assert len(jobs(world)) == 1
    assert world.cluster.get("Deployment", "sentiment-r2") is not None


def test_a_new_model_gets_adapters_of_its_own_before_its_servers_start():
    world = serving(adapters=[PIRATE])
    convert(world, "pirate")
    world.rolls_out("sentiment-r1")
    world.wait(5)
    say(world, "pirate")
    edit(world, source={"uri": "s3://models/other"})
    quantize(world, "r2", base="c")
    assert world.cluster.get("Deployment", "sentiment-r2") is None
    assert phases(world) == {"pirate": "Served"}
    second = next(
        it
        for it in world.cluster.of_kind("Job")
        if it["metadata"]["name"] not in ("sentiment-r1-quantize",) and _is_second(world, it)
    )
    model = ModelRef(uri="s3://models/x", digest="c" * 64, size_bytes=3)
    world.ends(
        world.pod(second["metadata"]["name"]),
        0,
        TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=model),
    )
    world.job_is(second["metadata"]["name"], "Complete")
    world.reconcile()
    assert (told(world, "r1"), told(world, "r2")) == ({"pirate": MADE["pirate"]}, {"pirate": "c" * 64})
    assert world.cluster.get("Deployment", "sentiment-r2") is not None


def _is_second(world: World, job) -> bool:
    name = job["metadata"]["name"]
    if "-adapter-" not in name:
        return False
    plan = ServingPlan.from_json(world.cluster.get("ConfigMap", name)["data"]["plan.json"])
    return plan.adapter.base_digest == "c" * 64


@pytest.mark.parametrize(
    ("job", "reason", "word"),
    [
        (None, "SourceNotFound", "no FineTuneJob tune"),
        ({"method": {"type": "LoRA"}, "output": {"save": "Merged"}}, "AdapterInvalid", "output.save: Adapter"),
        ({"method": {"type": "DoRA"}, "output": {"save": "Adapter"}}, "AdapterInvalid", "DoRA"),
        ({"method": {"type": "Full"}}, "AdapterInvalid", "leaves no adapter"),
        ({"method": {"type": "LoRA"}, "output": {"save": "Adapter"}}, "SourceNotReady", "hasn't succeeded"),
    ],
)
def test_a_finetunejob_that_leaves_no_adapter_is_told_at_once(job, reason, word):
    world = World()
    if job is not None:
        world.cluster.put(make.finetunejob(name="tune", suspend=True, **job))
    entry = {"name": "tuned", "fineTuneJobRef": {"name": "tune"}}
    world.cluster.put(make.modeldeployment(adapters=[entry]))
    world.reconcile()
    quantize(world)
    (found,) = world.status(KIND)["adapters"]
    assert found["reason"] == reason
    assert word in found["message"]


def test_each_success_of_a_finetunejob_is_converted_and_the_one_before_is_served_until_then():
    world = World()
    world.cluster.put(make.finetunejob(name="tune", method={"type": "LoRA"}, output={"save": "Adapter"}))
    world.reconcile()
    world.ends(world.pod("tune-1", 0), 0, make.succeeded())
    world.job_is("tune-1", "Complete")
    world.cluster.put(make.modeldeployment(adapters=[{"name": "tuned", "fineTuneJobRef": {"name": "tune"}}]))
    world.reconcile()
    quantize(world)
    plan = ServingPlan.from_json(world.cluster.get("ConfigMap", jobs(world)["tuned"])["data"]["plan.json"])
    assert (plan.adapter.uri, plan.adapter.digest, plan.adapter.base_digest) == (
        "s3://models/sentiment",
        make.DIGEST,
        "b" * 64,
    )
    convert(world, "tuned")
    assert told(world) == {"tuned": MADE["tuned"]}
    status = world.status(FINETUNEJOB_KIND, "tune")
    world.cluster.change(FINETUNEJOB_KIND, "tune", {"status": {"model": {**status["model"], "digest": "e" * 64}}})
    world.reconcile()
    assert told(world) == {"tuned": MADE["tuned"]}
    assert phases(world) == {"tuned": "Converting"}


def test_what_servers_say_counts_when_all_have_said_it():
    text = (
        'tunesmith_adapter_info{digest="abc",name="pirate"} 1.0\ntunesmith_adapter_info{digest="d",name="gone"} 0.0\n'
    )
    figures = read_figures(text)
    assert figures.adapters == {"pirate@abc"}
    tally = Tally("w").heard("one", figures)
    assert tally.adapters(["one"]) == {"pirate@abc"}
    assert tally.adapters(["one", "two"]) == frozenset()
    assert tally.heard("two", read_figures("")).adapters(["one", "two"]) == frozenset()
