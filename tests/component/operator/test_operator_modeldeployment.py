"""A ModelDeployment's life on an in-memory cluster: quantize, roll out, switch, retire; failures keep the old revision."""

import pytest

from support import make
from support.begun import condition, edit, selected
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport

KIND = MODELDEPLOYMENT_KIND
ARTIFACT = ModelRef(
    uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7, base_digest="b" * 64,
    bits_per_weight=8.6124,
)  # fmt: skip


def started(world: World | None = None, **spec) -> World:
    world = world or World()
    world.cluster.put(make.modeldeployment(**spec))
    world.reconcile()
    return world


def quantize(world: World, revision: str = "r1") -> None:
    job = f"sentiment-{revision}-quantize"
    if world.cluster.get("Job", job) is None:
        return
    pod = world.pod(job)
    world.ends(pod, 0, TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=ARTIFACT))
    world.job_is(job, "Complete")
    world.reconcile()


def serving(world: World | None = None, **spec) -> World:
    world = started(world, **spec)
    quantize(world)
    world.rolls_out("sentiment-r1")
    world.reconcile()
    return world


def test_a_model_is_quantized_rolled_out_and_answers():
    world = started()
    assert world.status(KIND)["phase"] == "Quantizing"
    plan = ServingPlan.from_json(world.cluster.get("ConfigMap", "sentiment-r1")["data"]["plan.json"])
    assert plan.artifact_uri == "s3://models/sentiment/quantized"
    assert world.cluster.get("Deployment", "sentiment-r1") is None
    quantize(world)
    assert world.status(KIND)["phase"] == "RollingOut"
    assert condition(world, "ArtifactReady")[:2] == ("True", "Quantized")
    assert condition(world, "Ready")[:2] == ("False", "RollingOut")
    world.rolls_out("sentiment-r1")
    world.reconcile()
    status = world.status(KIND)
    assert status["phase"] == "Ready"
    assert status["currentRevision"] == "sentiment-r1"
    assert status["display"] == {"ready": "1/1", "quantization": "Q8_0"}
    assert status["url"] == "http://sentiment.ml.svc/v1"
    (revision,) = status["revisions"]
    assert (revision["artifactURI"], revision["artifactDigest"]) == (ARTIFACT.uri, ARTIFACT.digest)
    assert (revision["modelDigest"], revision["bitsPerWeight"]) == (ARTIFACT.base_digest, "8.61")
    assert condition(world, "Ready")[:2] == ("True", "ReplicasAvailable")
    assert (status["replicas"], status["readyReplicas"]) == (1, 1)
    assert "tunesmith.dev/revision=r1" in status["selector"]


def test_it_waits_for_its_finetunejob_and_takes_its_storage():
    world = World()
    spec = {"source": {"uri": None, "fineTuneJobRef": {"name": "tune"}}, "storage": None}
    started(world, **spec)
    assert condition(world, "Ready")[:2] == ("False", "SourceNotFound")
    world.cluster.put(make.finetunejob(name="tune"))
    world.reconcile()
    assert condition(world, "Ready")[:2] == ("False", "SourceNotReady")
    head = world.pod("tune-1", 0)
    world.ends(head, 0, make.succeeded())
    world.job_is("tune-1", "Complete")
    world.reconcile()
    assert world.status(FINETUNEJOB_KIND, "tune")["phase"] == "Succeeded"
    assert world.status(KIND)["phase"] == "Quantizing"
    plan = ServingPlan.from_json(world.cluster.get("ConfigMap", "sentiment-r1")["data"]["plan.json"])
    assert plan.storage.endpoint_url == "http://s3.storage.svc:8333"
    assert plan.model_digest == make.DIGEST
    quantize(world)
    world.rolls_out("sentiment-r1")
    world.reconcile()
    world.cluster.remove(FINETUNEJOB_KIND, "ml", "tune")
    world.reconcile()
    assert condition(world, "Ready")[:2] == ("True", "ReplicasAvailable")


def test_a_job_whose_model_cannot_be_served_is_told_at_once_and_an_edit_helps():
    world = World()
    world.cluster.put(make.finetunejob(name="tune", suspend=True, task="Seq2Seq"))
    started(world, source={"uri": None, "fineTuneJobRef": {"name": "tune"}}, storage=None)
    for type_ in ("Ready", "ArtifactReady"):
        assert condition(world, type_)[:2] == ("False", "ModelInvalid")
        assert "task Seq2Seq" in condition(world, type_)[2]
    assert ("Warning", "ModelInvalid") in world.cluster.events
    assert not world.cluster.of_kind("Deployment")
    world.cluster.change(FINETUNEJOB_KIND, "tune", {"spec": {"task": "ChatSFT"}})
    world.reconcile()
    assert condition(world, "Ready")[:2] == ("False", "SourceNotReady")


def test_the_service_is_switched_only_when_every_replica_of_the_new_revision_answers():
    world = serving(replicas=2)
    edit(world, resources={"memory": "8Gi"})
    assert [it["phase"] for it in world.status(KIND)["revisions"]] == ["Active", "Quantizing"]
    quantize(world, "r2")
    world.rolls_out("sentiment-r2", available=1)
    world.reconcile()
    assert selected(world) == "r1"
    assert condition(world, "Ready")[0] == "True"
    assert condition(world, "Progressing")[:2] == ("True", "RollingOut")
    world.rolls_out("sentiment-r2")
    world.reconcile()
    assert selected(world) == "r2"
    assert world.status(KIND)["currentRevision"] == "sentiment-r2"
    assert world.cluster.get("Deployment", "sentiment-r1") is not None, "nodes may still send requests there"
    world.wait(11)
    assert world.cluster.get("Deployment", "sentiment-r1") is None
    assert world.cluster.get("ConfigMap", "sentiment-r1") is not None, "it can be gone back to"
    assert world.cluster.get("Job", "sentiment-r1-quantize") is None
    assert [it["phase"] for it in world.status(KIND)["revisions"]] == ["Retired", "Active"]


def test_a_revision_that_misses_its_deadline_is_given_up_and_the_old_one_goes_on():
    world = serving()
    edit(world, image="localhost/broken:1")
    quantize(world, "r2")
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    world.cluster.change("Deployment", "sentiment-r2", {"status": {"conditions": [late]}})
    world.reconcile()
    status = world.status(KIND)
    assert status["phase"] == "Degraded"
    assert status["revisions"][1]["reason"] == "ProgressDeadlineExceeded"
    assert world.cluster.get("Deployment", "sentiment-r2")["spec"]["replicas"] == 0
    assert selected(world) == "r1"
    assert condition(world, "Ready")[:2] == ("True", "ReplicasAvailable")
    assert "kubectl delete deployment -n ml sentiment-r2" in condition(world, "Progressing")[2]
    world.cluster.remove("Deployment", "ml", "sentiment-r2")
    world.wait(5)
    assert world.status(KIND)["phase"] == "RollingOut"
    assert world.cluster.get("Deployment", "sentiment-r2")["spec"]["replicas"] == 1


def test_a_failed_quantization_tells_the_pods_reason_and_can_be_tried_again():
    world = started()
    pod = world.pod("sentiment-r1-quantize")
    message = "bucket models is read-only for this key: grant s3:PutObject"
    world.ends(pod, 41, TerminationReport(outcome=Outcome.FAILED, reason=Reason.STORAGE_UNWRITABLE, message=message))
    world.job_is("sentiment-r1-quantize", "Failed", "PodFailurePolicy")
    world.reconcile()
    assert world.status(KIND)["phase"] == "Failed"
    assert condition(world, "Ready")[:2] == ("False", "StorageUnwritable")
    assert "s3:PutObject" in condition(world, "Ready")[2]
    before = len(world.cluster.writes)
    world.wait(3600)
    assert len(world.cluster.writes) == before
    world.cluster.remove("Job", "ml", "sentiment-r1-quantize")
    world.wait(5)
    assert world.status(KIND)["phase"] == "Quantizing"
    assert world.cluster.get("Job", "sentiment-r1-quantize") is not None


def test_a_quantize_pod_that_cannot_start_is_suspended_after_its_bound():
    world = started(rollout={"progressDeadlineSeconds": 60})
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x": ErrImagePull: nope'}}
    containers = [{"name": "quantize", "image": "x", "state": waiting}]
    world.pod("sentiment-r1-quantize", phase="Pending", containerStatuses=containers)
    world.reconcile()
    assert condition(world, "Ready")[:2] == ("False", "ImagePullFailed")
    world.wait(61)
    assert world.status(KIND)["phase"] == "Failed"
    assert world.cluster.get("Job", "sentiment-r1-quantize")["spec"]["suspend"] is True


def test_scaling_makes_no_revision():
    world = serving()
    edit(world, replicas=3)
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 3
    assert len(world.status(KIND)["revisions"]) == 1
    assert world.status(KIND)["display"]["ready"] == "1/3"
    assert world.status(KIND)["phase"] == "Degraded"
    edit(world, replicas=0)
    world.rolls_out("sentiment-r1")
    world.wait(5)
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 0
    assert condition(world, "Ready")[:2] == ("True", "ScaledToZero")


def test_the_old_revision_is_scaled_while_the_new_one_is_on_its_way():
    world = serving()
    edit(world, engine={"contextLength": 4096})
    edit(world, replicas=4)
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 4


def test_a_superseded_revision_is_dropped_before_it_ever_answers():
    world = serving()
    edit(world, engine={"contextLength": 4096})
    edit(world, engine={"contextLength": 512})
    assert [it["phase"] for it in world.status(KIND)["revisions"]] == ["Active", "Retired", "Quantizing"]
    assert world.cluster.get("Job", "sentiment-r2-quantize") is None
    assert world.cluster.get("Deployment", "sentiment-r1") is not None


def test_a_lost_status_is_rebuilt_from_the_children():
    world = serving()
    edit(world, engine={"contextLength": 4096})
    before = world.status(KIND)
    raw = world.cluster.get(KIND, "sentiment")
    raw.pop("status")
    world.cluster.put(raw)
    world.wait(5)
    after = world.status(KIND)
    assert after["currentRevision"] == before["currentRevision"] == "sentiment-r1"
    assert [it["number"] for it in after["revisions"]] == [1, 2]
    assert selected(world) == "r1"
    assert len(world.cluster.of_kind("Deployment")) == 1


def test_a_crashing_server_is_explained():
    world = started()
    quantize(world)
    labels = world.cluster.get("Deployment", "sentiment-r1")["spec"]["template"]["metadata"]["labels"]
    ended = {"exitCode": 1, "message": "loading\nout of luck", "reason": "Error"}
    container = {
        "name": "server", "image": "i", "restartCount": 3, "lastState": {"terminated": ended},
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}},
    }  # fmt: skip
    conditions = [{"type": "PodScheduled", "status": "True", "lastTransitionTime": world.stamp()}]
    status = {"phase": "Running", "conditions": conditions, "containerStatuses": [container]}
    world.cluster.put({"kind": "Pod", "metadata": {"name": "p", "namespace": "ml", "labels": labels}, "status": status})
    world.wait(5)
    assert condition(world, "Ready")[:2] == ("False", "ServerFailed")
    assert "out of luck" in condition(world, "Ready")[2]
    assert "kubectl logs -n ml p --previous" in condition(world, "Ready")[2]


def whole_life(world: World) -> None:
    serving(world)
    edit(world, resources={"memory": "8Gi"})
    quantize(world, "r2")
    world.rolls_out("sentiment-r2")
    world.wait(5)
    world.wait(20)


@pytest.mark.parametrize("crash_after", range(1, 24))
def test_a_crash_after_any_write_changes_nothing_about_the_end(crash_after):
    calm, crashed = World(), World()
    whole_life(calm)
    crashed.cluster.crash_after = crash_after
    whole_life(crashed)
    assert {name: raw.get("spec") for name, raw in crashed.cluster.objects.items()} == {
        name: raw.get("spec") for name, raw in calm.cluster.objects.items()
    }
    assert crashed.status(KIND) == calm.status(KIND)
