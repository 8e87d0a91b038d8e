"""The operator on a real API server: defaults are no drift, hand edits are undone, and what is others' is left alone."""

import json
import time
from datetime import UTC, datetime

from support import make
from support.fakekubelet import container_of, ended, running
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport

ARTIFACT = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)
QUANTIZED = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=ARTIFACT)
# every form that the API server turns into another: amounts, and tolerations that say little
PODS = {
    "resources": {"cpu": "1000m", "memory": "1024Mi"},
    "tolerations": [{"key": "a"}, {"operator": "Exists"}],
}


def script(pod):
    return ended(pod, 0, QUANTIZED) if container_of(pod)["name"] == keys.QUANTIZE_CONTAINER else running(pod)


def patch(stage, kind, name, change):
    stage.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps(change))


def both(stage):
    """A job that trains and a deployment that answers."""
    stage.kubelet.script = script
    stage.apply(
        make.finetunejob("tune", stage.namespace, workers=PODS, activeDeadlineSeconds=900),
        make.modeldeployment("serve", stage.namespace, **PODS),
    )
    stage.wait("workers", lambda: stage.get("ftj", "tune").get("status", {}).get("display", {}).get("workers") == "2/2")
    stage.wait_condition("mdep", "serve", "Ready", "True", "ReplicasAvailable")


def writes_to_children(stage, since):
    return [
        f"{event['verb']} {event['objectRef']['resource']} {event['objectRef'].get('name')}"
        for event in stage.cluster.audit_events(since)
        if event["userAgent"].startswith("tunesmith-operator/")
        and event["verb"] in ("create", "patch")
        and event["objectRef"].get("namespace") == stage.namespace
        and event["objectRef"]["resource"] not in ("finetunejobs", "modeldeployments", "events")
    ]


def test_what_the_api_server_adds_is_no_drift_and_every_child_costs_one_write(stage):
    since = datetime.now(UTC)
    both(stage)
    # an event for each child, so that all of them are looked at again
    for kind, name in (("service", "tune-workers"), ("service", "serve"), ("job", "tune-1"), ("deploy", "serve-r1")):
        stage.kubectl("label", kind, name, "looked=at")
    time.sleep(5)
    written = writes_to_children(stage, since)
    assert [it for it in written if it.startswith("patch")] == []
    assert len(written) == 5 + 6


EDITS = [
    ("service", "tune-workers", {"spec": {"selector": {"app": "mine"}}}),
    ("service", "tune-workers", {"spec": {"ports": [{"name": "gcs", "port": 81}]}}),
    ("networkpolicy", "tune-workers", {"spec": {"ingress": [{}]}}),
    ("configmap", "tune-1", {"data": {"plan.json": "{}"}}),
    ("job", "tune-1", {"spec": {"parallelism": 1}}),
    ("job", "tune-1", {"spec": {"backoffLimit": 77}}),
    ("job", "tune-1", {"spec": {"activeDeadlineSeconds": None}}),
    ("service", "serve", {"spec": {"ports": [{"name": "http", "port": 81}]}}),
    ("networkpolicy", "serve", {"spec": {"podSelector": {"matchLabels": {"app": "mine"}}}}),
    ("pdb", "serve", {"spec": {"maxUnavailable": "100%"}}),
    ("pdb", "serve", {"spec": {"selector": {"matchLabels": {"app": "mine"}}}}),
    ("configmap", "serve-r1", {"data": {"plan.json": None}}),
    ("deploy", "serve-r1", {"spec": {"replicas": 0}}),
    ("deploy", "serve-r1", {"spec": {"template": {"spec": {"nodeSelector": {"disk": "fast"}}}}}),
    ("deploy", "serve-r1", {"spec": {"strategy": {"type": "Recreate", "rollingUpdate": None}}}),
]


def test_what_is_changed_by_hand_is_put_right(stage):
    both(stage)

    def own(kind, name):
        raw = stage.get(kind, name)
        return raw.get("spec"), raw.get("data")

    for kind, name, change in EDITS:
        before, version = own(kind, name), stage.get(kind, name)["metadata"]["resourceVersion"]
        patch(stage, kind, name, change)
        assert stage.get(kind, name)["metadata"]["resourceVersion"] != version
        stage.wait(f"{kind} {name} without {change}", lambda k=kind, n=name, b=before: own(k, n) == b)
    notes = [it["note"] for it in stage.items("events.events.k8s.io") if it["reason"] == "Repaired"]
    assert len(notes) == len(EDITS)
    assert all("was changed by somebody else (" in note for note in notes)
    since = datetime.now(UTC)
    time.sleep(4)
    assert writes_to_children(stage, since) == []


def test_bounds_that_are_changed_after_the_start_reach_the_job(stage):
    stage.apply(make.finetunejob("tune", stage.namespace))
    stage.wait("the Job", lambda: stage.get("job", "tune-1"))
    patch(stage, "ftj", "tune", {"spec": {"activeDeadlineSeconds": 3600, "failurePolicy": {"backoffLimit": 9}}})

    def bounds():
        spec = stage.get("job", "tune-1")["spec"]
        return spec.get("activeDeadlineSeconds"), spec["backoffLimit"]

    stage.wait("new bounds", lambda: bounds() == (3600, 9))
    patch(stage, "ftj", "tune", {"spec": {"activeDeadlineSeconds": None}})
    stage.wait("no deadline", lambda: bounds() == (None, 9))


def test_an_object_of_somebody_else_is_left_alone_and_named(stage):
    stage.kubectl("create", "service", "clusterip", "tune-workers", "--tcp=80:80")
    theirs = stage.get("service", "tune-workers")
    stage.apply(make.finetunejob("tune", stage.namespace))
    message = stage.wait_condition("ftj", "tune", "ChildrenApplied", "False", "ApplyFailed")
    assert message.startswith("Service tune-workers: there is one of this name already, which belongs to nobody")
    assert stage.get("service", "tune-workers") == theirs
    assert not stage.get("job", "tune-1")
    stage.kubectl("delete", "service", "tune-workers")
    stage.wait("the Job", lambda: stage.get("job", "tune-1"), 60)


def test_a_child_whose_labels_were_taken_away_gets_them_back(stage):
    both(stage)
    stage.kubectl("label", "service", "serve", f"{keys.LABEL_MANAGED_BY}-")
    stage.wait("the label", lambda: stage.get("service", "serve")["metadata"]["labels"].get(keys.LABEL_MANAGED_BY))
