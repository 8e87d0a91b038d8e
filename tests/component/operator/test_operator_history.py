"""What is known of an object outlives fields that can't be read, a status that was lost, and edits after the end.

On an in-memory cluster, engine and core together.
"""

import asyncio
import copy
from datetime import timedelta

import pytest

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_operator.core.kubernetes.resources import Key

NEWER = {"spec": {"training": {"optimizer": "Muon"}}}
"""A field of a newer version: it passed another CRD's admission."""
KNOWN = {"spec": {"training": {"optimizer": None}}}


def started(**spec):
    world = World()
    world.cluster.put(make.finetunejob(**spec))
    world.reconcile()
    world.wait(10)
    return world


def ended(code=0, report=None):
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    world.ends(head, code, report or make.succeeded())
    if code:
        world.job_is("sentiment-1", "Failed", "PodFailurePolicy")
    else:
        world.job_is("sentiment-1", "Complete", "SuccessPolicy")
    world.wait(1)
    assert world.condition("Succeeded")[0] == ("False" if code else "True")
    return world


def edit(world, changes, kind=FINETUNEJOB_KIND):
    world.cluster.change(kind, "sentiment", changes)
    world.wait(20)


def without_generations(status):
    status = copy.deepcopy(status)
    for part in (status, *status["conditions"]):
        part.pop("observedGeneration", None)
    return status


def generations(status):
    return {part.get("observedGeneration") for part in (status, *status["conditions"])}


# --- specs that can't be read


@pytest.mark.parametrize("code", [0, 40])
def test_a_job_that_has_ended_stays_so_when_its_spec_can_not_be_read_and_when_it_can_again(code):
    world = ended(code, make.failed() if code else None)
    before, writes = world.status(), world.cluster.writes.count("create Job sentiment-1")
    world.cluster.remove("Job", "ml", "sentiment-1")
    edit(world, NEWER)
    assert without_generations(world.status()) == without_generations(before)
    assert generations(world.status()) == {2}, "who waits for a condition has it"
    edit(world, KNOWN)
    assert without_generations(world.status()) == without_generations(before)
    assert world.cluster.writes.count("create Job sentiment-1") == writes


def test_an_unreadable_job_that_has_not_started_fails_as_it_stands_and_starts_once_it_is_corrected():
    world = started(training={"optimizer": "Muon"})
    assert world.condition("Succeeded")[:2] == ("False", "InvalidSpec")
    assert "spec.training.optimizer" in world.condition("Succeeded")[2]
    assert (world.status()["phase"], generations(world.status())) == ("Failed", {1})
    edit(world, KNOWN)
    assert world.condition("Succeeded")[0] == "Unknown"
    assert world.cluster.get("Job", "sentiment-1") is not None


def test_an_unreadable_job_that_trains_may_still_succeed_and_does():
    world = started()
    head = world.pod("sentiment-1", 0, ready=True)
    edit(world, NEWER)
    assert world.condition("Succeeded")[:2] == ("Unknown", "InvalidSpec")
    world.ends(head, 0, make.succeeded())
    world.job_is("sentiment-1", "Complete", "SuccessPolicy")
    edit(world, KNOWN)
    assert world.condition("Succeeded")[:2] == ("True", "Completed")
    assert world.cluster.writes.count("create Job sentiment-1") == 1


def test_a_job_that_becomes_unreadable_before_its_first_status_is_known_to_have_started():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", NEWER)
    world.wait(10)
    assert world.condition("Succeeded")[:2] == ("Unknown", "InvalidSpec")
    assert world.cluster.get("Job", "sentiment-1") is not None


# --- statuses that can't be read, or were lost


def test_of_a_status_of_another_version_all_that_can_be_read_is_kept():
    world = ended()
    status = world.status()
    odd = {"type": "Evicted", "status": "Perhaps", "reason": "x", "lastTransitionTime": make.stamp()}
    changed = {**status, "phase": "Archived", "conditions": [*status["conditions"], odd], "restarts": "many"}
    world.cluster.remove("Job", "ml", "sentiment-1")
    edit(world, {"status": changed})
    assert world.condition("Succeeded")[:2] == ("True", "Completed")
    assert world.status()["model"] == status["model"]
    assert world.cluster.get("Job", "sentiment-1") is None


def test_a_running_job_whose_status_can_not_be_read_in_full_goes_on():
    world = started()
    world.pod("sentiment-1", 0, ready=True)
    edit(world, {"status": {"phase": "Dreaming", "checkpoint": {"step": "five", "uri": "s3://c"}, "restarts": 2}})
    assert world.condition("Accepted")[0] == "True"
    assert world.status()["restarts"] == 2
    assert "checkpoint" not in world.status()
    assert len(world.status()["attempts"]) == 1


@pytest.mark.parametrize(("code", "verdict"), [(0, ("True", "Completed")), (40, ("False", "DatasetInvalid"))])
def test_a_lost_status_comes_back_from_the_job_that_has_ended(code, verdict):
    world = ended(code, make.failed() if code else None)
    before = world.status()
    raw = world.cluster.get(FINETUNEJOB_KIND, "sentiment")
    world.cluster.put({name: value for name, value in raw.items() if name != "status"})
    world.wait(20)
    assert world.condition("Succeeded")[:2] == verdict
    for field in ("phase", "model", "completionTime", "checkpoint"):
        assert world.status().get(field) == before.get(field)
    assert world.cluster.writes.count("create Job sentiment-1") == 1


# --- edits after the end, and before the start


def test_after_the_end_an_edit_is_taken_note_of_once_and_changes_nothing():
    world = ended()
    before, writes = world.status(), len(world.cluster.writes)
    edit(world, {"spec": {"ttlSecondsAfterFinished": 86400, "suspend": True, "activeDeadlineSeconds": 7}})
    assert generations(world.status()) == {2}
    assert without_generations(world.status()) == without_generations(before)
    assert world.cluster.writes[writes:] == ["status FineTuneJob sentiment"]
    assert [reason for _, reason in world.cluster.events][-1] == "Completed"


def test_a_refused_job_has_failed_as_it_stands_and_is_started_by_a_corrected_spec():
    world = started(output={"uri": "s3://checkpoints/sentiment/out"})
    assert world.condition("Succeeded")[:2] == ("False", "InvalidSpec")
    assert (world.status()["phase"], generations(world.status())) == ("Failed", {1})
    assert "completionTime" not in world.status()
    assert "startTime" not in world.status(), "the rules that keep a started job's fields let the correction pass"
    edit(world, {"spec": {"output": {"uri": "s3://checkpoints/sentiment/other"}}})
    assert world.condition("Succeeded")[:2] == ("False", "InvalidSpec")
    assert generations(world.status()) == {2}
    edit(world, {"spec": {"output": {"uri": "s3://models/sentiment"}}})
    assert world.condition("Succeeded")[0] == "Unknown"
    assert world.status()["phase"] in ("Pending", "Starting")
    assert world.cluster.get("Job", "sentiment-1") is not None


# --- a deployment's revisions

ARTIFACT = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)


def serving():
    world = World()
    world.cluster.put(make.modeldeployment())
    world.reconcile()
    quantized(world, "r1")
    world.rolls_out("sentiment-r1")
    world.reconcile()
    return world


def quantized(world, revision):
    job = f"sentiment-{revision}-quantize"
    report = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=ARTIFACT)
    world.ends(world.pod(job), 0, report)
    world.job_is(job, "Complete")
    world.reconcile()


def selected(world):
    return world.cluster.get("Service", "sentiment")["spec"]["selector"]["tunesmith.dev/revision"]


def test_a_deployment_that_lost_its_status_keeps_the_revision_that_clients_are_led_to():
    world = serving()
    edit(world, {"spec": {"quantization": {"method": "None"}}}, MODELDEPLOYMENT_KIND)
    assert selected(world) == "r1"
    world.rolls_out("sentiment-r1", 0)
    raw = world.cluster.get(MODELDEPLOYMENT_KIND, "sentiment")
    world.cluster.put({name: value for name, value in raw.items() if name != "status"})
    world.wait(60)
    assert selected(world) == "r1", "it is down for a moment, the new one has never been up"
    assert world.cluster.get("Deployment", "sentiment-r1") is not None
    status = world.status(MODELDEPLOYMENT_KIND)
    assert (status["currentRevision"], status["latestRevision"]) == ("sentiment-r1", "sentiment-r2")
    quantized(world, "r2")
    world.rolls_out("sentiment-r2")
    world.wait(60)
    assert selected(world) == "r2"


def test_a_deployment_whose_revision_can_not_be_read_rebuilds_it_from_its_children():
    world = serving()
    status = copy.deepcopy(world.status(MODELDEPLOYMENT_KIND))
    status["revisions"][0]["phase"] = "Hibernating"
    edit(world, {"status": status}, MODELDEPLOYMENT_KIND)
    assert selected(world) == "r1"
    found = world.status(MODELDEPLOYMENT_KIND)
    assert found["currentRevision"] == found["latestRevision"] == "sentiment-r1"
    assert [it["phase"] for it in found["revisions"]] == ["Active"]


def test_an_unreadable_deployment_says_so_and_leads_clients_where_it_did():
    world = serving()
    writes = len(world.cluster.writes)
    edit(world, {"spec": {"engine": {"flavour": "new"}}}, MODELDEPLOYMENT_KIND)
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[:2] == ("Unknown", "InvalidSpec")
    assert world.cluster.writes[writes:] == ["status ModelDeployment sentiment"]


def test_a_failed_revisions_long_message_ends_with_an_ellipsis():
    world = World()
    world.cluster.put(make.modeldeployment())
    world.reconcile()
    pod = world.pod("sentiment-r1-quantize")
    report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.MODEL_INVALID, message="x" * 2000)
    world.ends(pod, 40, report)
    world.job_is("sentiment-r1-quantize", "Failed", "PodFailurePolicy")
    world.reconcile()
    (revision,) = world.status(MODELDEPLOYMENT_KIND)["revisions"]
    assert len(revision["message"]) == 1024
    assert revision["message"].endswith("x…")


def test_a_status_worked_out_from_an_older_version_never_replaces_a_newer_one():
    world = started()
    hears, world.cluster.on_change = world.cluster.on_change, lambda type_, raw: None
    newer = {"phase": "Succeeded", "completionTime": world.stamp(), "model": {"uri": "s3://m", "digest": "d"}}
    world.cluster.change(FINETUNEJOB_KIND, "sentiment", {"status": newer})
    world.cluster.on_change = hears
    world.pod("sentiment-1", 0, ready=True)
    world.now += timedelta(seconds=30)
    asyncio.run(world.controller.process(Key(FINETUNEJOB_KIND, "ml", "sentiment")))
    assert world.status()["phase"] == "Succeeded"
    assert world.status()["model"]["digest"] == "d"


def test_numbers_go_on_though_the_clock_has_been_set_back():
    world = started()
    world.pod("sentiment-1", 0, ready=True)
    world.wait(-3600)
    assert world.status()["workers"]["ready"] == 1
