"""The operator process on a real control plane: a ModelDeployment's life as users see it. Pod statuses are scripted."""

import json

import pytest

from devcluster import CommandFailed
from support import make
from support.fakekubelet import container_of, ended, running, waiting
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport

ARTIFACT = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)
QUANTIZED = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=ARTIFACT)


def healthy(pod):
    name = container_of(pod)["name"]
    return ended(pod, 0, QUANTIZED) if name == keys.QUANTIZE_CONTAINER else running(pod)


def healthy_but(image):
    def script(pod):
        return waiting(pod, "ErrImagePull", "not found") if container_of(pod)["image"] == image else healthy(pod)

    return script


def deployment(stage, **spec):
    return make.modeldeployment("sentiment", stage.namespace, **spec)


def ready(stage):
    return stage.wait_condition("mdep", "sentiment", "Ready", "True", "ReplicasAvailable")


def edit(stage, spec):
    stage.kubectl("patch", "mdep", "sentiment", "--type=merge", "-p", json.dumps({"spec": spec}))


def selected(stage):
    return stage.get("service", "sentiment")["spec"]["selector"][keys.LABEL_REVISION]


def test_a_model_is_quantized_and_served_and_kubectl_shows_it(stage):
    stage.kubelet.script = healthy
    stage.apply(deployment(stage, replicas=2))
    ready(stage)
    header, row = stage.kubectl("get", "mdep", "sentiment").splitlines()
    columns = dict(zip(header.split(), row.split(), strict=True))
    columns.pop("AGE")
    assert columns == {
        "NAME": "sentiment", "READY": "2/2", "PHASE": "Ready", "REVISION": "sentiment-r1", "QUANTIZATION": "Q8_0",
        "URL": f"http://sentiment.{stage.namespace}.svc/v1",
    }  # fmt: skip
    assert stage.get("mdep", "sentiment")["status"]["revisions"][0]["artifactDigest"] == ARTIFACT.digest


def test_a_deployment_follows_a_finetunejob_of_the_same_name(stage):
    def script(pod):
        return ended(pod, 0, make.succeeded()) if container_of(pod)["name"] == keys.TRAINER_CONTAINER else healthy(pod)

    stage.apply(deployment(stage, source={"uri": None, "fineTuneJobRef": {"name": "sentiment"}}, storage=None))
    stage.wait_condition("mdep", "sentiment", "Ready", "False", "SourceNotFound")
    stage.apply(make.finetunejob("sentiment", stage.namespace))
    stage.wait_condition("mdep", "sentiment", "Ready", "False", "SourceNotReady")
    stage.kubelet.script = script
    ready(stage)
    plan = json.loads(stage.get("configmap", "sentiment-r1")["data"]["plan.json"])
    assert plan["modelDigest"] == make.DIGEST
    assert plan["storage"]["endpointURL"] == "http://s3.storage.svc:8333"


def test_scale_and_autoscalers_reach_the_pods_through_the_scale_subresource(stage):
    stage.kubelet.script = healthy
    stage.apply(deployment(stage))
    ready(stage)
    stage.kubectl("scale", "mdep", "sentiment", "--replicas=3")
    stage.wait("three", lambda: stage.get("mdep", "sentiment")["status"]["display"]["ready"] == "3/3")
    scale = json.loads(
        stage.cluster.kubectl(
            "get", "--raw",
            f"/apis/tunesmith.dev/v1alpha1/namespaces/{stage.namespace}/modeldeployments/sentiment/scale",
        )
    )  # fmt: skip
    assert scale["status"]["replicas"] == 3
    assert "tunesmith.dev/revision=r1" in scale["status"]["selector"]
    stage.kubectl("scale", "mdep", "sentiment", "--replicas=0")
    stage.wait_condition("mdep", "sentiment", "Ready", "True", "ScaledToZero")
    assert len(stage.get("mdep", "sentiment")["status"]["revisions"]) == 1


def test_a_new_revision_takes_over_and_the_old_one_goes(stage):
    stage.kubelet.script = healthy
    stage.apply(deployment(stage))
    ready(stage)
    edit(stage, {"engine": {"contextLength": 512}})
    stage.wait("r2", lambda: stage.get("mdep", "sentiment")["status"]["currentRevision"] == "sentiment-r2")
    assert selected(stage) == "r2"
    stage.wait("r1's Deployment to go", lambda: not stage.get("deployment", "sentiment-r1"))
    assert [it["phase"] for it in stage.get("mdep", "sentiment")["status"]["revisions"]] == ["Retired", "Active"]


def test_a_broken_revision_is_given_up_and_the_old_one_goes_on(stage):
    stage.kubelet.script = healthy_but("localhost/broken:1")
    stage.apply(deployment(stage, rollout={"progressDeadlineSeconds": 10}))
    ready(stage)
    edit(stage, {"image": "localhost/broken:1"})
    message = stage.wait_condition("mdep", "sentiment", "ArtifactReady", "False", "ImagePullFailed")
    assert "localhost/broken:1" in message
    stage.wait("giving up", lambda: stage.get("mdep", "sentiment")["status"]["phase"] == "Degraded", 40)
    assert stage.condition("mdep", "sentiment", "Ready")[:2] == ("True", "ReplicasAvailable")
    assert selected(stage) == "r1"
    assert stage.get("job", "sentiment-r2-quantize")["spec"]["suspend"] is True
    edit(stage, {"image": None})
    stage.wait("recovery", lambda: stage.get("mdep", "sentiment")["status"]["phase"] == "Ready")


def test_a_source_without_storage_is_refused_with_the_remedy(stage):
    with pytest.raises(CommandFailed, match=r"source\.uri needs storage"):
        stage.apply(deployment(stage, storage=None))
