"""The operator's ClusterRole is exactly what the operator uses: nothing refused, nothing granted in vain.

The real operator runs with the token of the chart's ServiceAccount, on a control plane without nodes; this test plays
the kubelet by writing pod statuses. What was asked for comes from the API server's audit log.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from tunesmith_api import keys
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_cli.kubernetes_yaml import parsed

ROOT = Path(__file__).resolve().parents[2]
CHART = str(ROOT / "charts/tunesmith")
NAME = "rights"


class Stage:
    """One namespace with the operator at work in it."""

    def __init__(self, server, namespace):
        self.server, self.namespace = server, namespace

    def kubectl(self, *arguments, **more):
        return self.server.kubectl("-n", self.namespace, *arguments, **more)

    def get(self, kind, name):
        return self.server.get(kind, name, self.namespace)

    def until(self, what, check, seconds=40.0):
        end = time.monotonic() + seconds
        while not (answer := check()):
            if time.monotonic() > end:
                everything = self.kubectl("get", "ftj,mdep,jobs,pods,deployments", "-o", "wide", check=False)
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{everything}")
            time.sleep(0.2)
        return answer

    def pods(self, selector):
        return [
            pod
            for pod in self.server.get_all("pods", self.namespace, selector)
            if "deletionTimestamp" not in pod["metadata"]
        ]

    def status(self, pod, **status):
        patch = json.dumps({"status": status})
        self.kubectl("patch", "pod", pod["metadata"]["name"], "--subresource=status", "--type=merge", "-p", patch)

    def finish(self, pod, report):
        """What a kubelet writes when the only container has ended well."""
        name = pod["spec"]["containers"][0]["name"]
        now = timestamp()
        ended = {"exitCode": 0, "reason": "Completed", "message": report.to_json(), "startedAt": now, "finishedAt": now}
        box = {
            "name": name,
            "image": "x",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": ended},
        }
        self.status(pod, phase="Succeeded", containerStatuses=[box])

    def make_ready(self, pod):
        """What a kubelet writes when the readiness probe has passed."""
        name, now = pod["spec"]["containers"][0]["name"], timestamp()
        box = {"name": name, "image": "x", "imageID": "", "ready": True, "started": True, "restartCount": 0}
        conditions = [
            {"type": kind, "status": "True", "lastTransitionTime": now}
            for kind in ("PodScheduled", "ContainersReady", "Ready")
        ]
        self.status(
            pod,
            phase="Running",
            conditions=conditions,
            containerStatuses=[box | {"state": {"running": {"startedAt": now}}}],
        )


def timestamp(back=0):
    return (datetime.now(UTC) - timedelta(seconds=back)).strftime("%Y-%m-%dT%H:%M:%SZ")


def report(reason, uri):
    model = ModelRef(uri=uri, digest="0" * 64, size_bytes=1)
    return TerminationReport(
        outcome=Outcome.SUCCEEDED, reason=reason, message="done", model=model, max_steps=1, global_step=1
    )


@pytest.fixture
def granted(control_plane, namespace):
    """Install the account and its rights; return the rights as (group, resource, verb)."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-k", str(ROOT / "crds"))
    names = ("serviceaccount", "clusterrole", "bindings", "admissionpolicy")
    parts = [part for name in names for part in ("-s", f"templates/{name}.yaml")]
    values = f"watchNamespaces={{{namespace}}},fullnameOverride={NAME}"
    rendered = control_plane.helm("template", "tunesmith", CHART, "-n", namespace, "--set", values, *parts)
    control_plane.kubectl("apply", "-f", "-", stdin=rendered)
    role = next(o for o in yaml.safe_load_all(rendered) if o and o["kind"] == "ClusterRole")
    yield {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    control_plane.kubectl("delete", "clusterrole", NAME)
    for kind in ("validatingadmissionpolicy", "validatingadmissionpolicybinding"):
        control_plane.kubectl("delete", kind, f"{NAME}-owned", f"{NAME}-pods")


def kubeconfig_of_account(server, namespace, folder):
    config = json.loads(server.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    token = server.kubectl("create", "token", NAME, "-n", namespace).strip()
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.write_text(json.dumps(config))
    return path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def stage(control_plane, namespace, granted, tmp_path):
    """The operator at work as the account."""
    port = free_port()
    environment = os.environ | {
        "KUBECONFIG": str(kubeconfig_of_account(control_plane, namespace, tmp_path)),
        "PYTHONPATH": f"{ROOT}/crds:{ROOT}/operator",
        "TUNESMITH_TRAINER_IMAGE": "trainer:test",
        "TUNESMITH_NAMESPACES": namespace,
        "TUNESMITH_HEALTH_PORT": str(port),
        "TUNESMITH_METRICS_PORT": "0",
        "TUNESMITH_LOG_FORMAT": "text",
    }
    log = tmp_path / "operator.log"
    with log.open("w") as output:
        argv = [sys.executable, "-m", "tunesmith_operator"]
        operator = subprocess.Popen(argv, env=environment, stdout=output, stderr=subprocess.STDOUT)
    acting = Stage(control_plane, namespace)

    def healthy():
        assert operator.poll() is None, log.read_text()
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=2) as answer,
        ):
            return answer.status == 200

    try:
        acting.until("the operator is healthy", healthy)
        yield acting
        assert operator.poll() is None, "the operator has ended"
    finally:
        operator.terminate()
        operator.wait(20)
        print(log.read_text()[-6000:])


def undone(stage, kind, name, change):
    """Somebody edits a child, and the operator puts it right."""

    def own():
        raw = stage.get(kind, name)
        return raw.get("spec"), raw.get("data")

    before = own()
    stage.kubectl("patch", kind, name, "--type=merge", "-p", json.dumps(change))
    stage.until(f"{kind} {name} is as it was", lambda: own() == before)


def walk_a_job(stage):
    """Start, suspend, resume, lose what is around the pods, have it edited, end, and be removed by the TTL."""
    secret = stage.kubectl(
        "create",
        "secret",
        "generic",
        "s3",
        "--from-literal=AWS_ACCESS_KEY_ID=a",
        "--from-literal=AWS_SECRET_ACCESS_KEY=b",
    )
    assert secret
    job = parsed((ROOT / "manifests/samples/finetunejob.yaml").read_text())[0]
    job["spec"]["ttlSecondsAfterFinished"] = 0
    stage.kubectl("create", "-f", "-", stdin=json.dumps(job))
    mine = f"{keys.LABEL_FINETUNEJOB}=sentiment"
    stage.until("two pods", lambda: len(stage.pods(mine)) == 2)

    stage.kubectl("patch", "ftj", "sentiment", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    stage.until("the Job is suspended", lambda: stage.get("job", "sentiment-1")["spec"]["suspend"])
    stage.until("the phase says so", lambda: stage.get("ftj", "sentiment")["status"]["phase"] == "Suspended")
    stage.kubectl("patch", "ftj", "sentiment", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    head = stage.until(
        "worker 0 is back",
        lambda: [
            pod
            for pod in stage.pods(mine)
            if pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == "0"
        ],
    )[0]

    stage.kubectl("delete", "configmap", "sentiment-1")
    stage.kubectl("delete", "service", "-l", mine)
    stage.until(
        "both are made again",
        lambda: stage.get("configmap", "sentiment-1") and stage.server.get_all("services", stage.namespace, mine),
    )
    undone(stage, "configmap", "sentiment-1", {"data": {"plan.json": "{}"}})
    undone(stage, "networkpolicy", "sentiment-workers", {"spec": {"ingress": [{}]}})

    stage.finish(head, report(keys.Reason.COMPLETED, job["spec"]["output"]["uri"]))
    stage.until("the job is removed", lambda: not stage.get("ftj", "sentiment"))


def walk_a_failing_job(stage):
    """A Job with a pod that can't start in time is deleted by the operator."""
    job = parsed((ROOT / "manifests/samples/finetunejob.yaml").read_text())[0]
    job["metadata"]["name"] = "stuck"
    job["spec"]["failurePolicy"] = {"startupTimeoutSeconds": 5}
    stage.kubectl("create", "-f", "-", stdin=json.dumps(job))
    pod = stage.until("a pod", lambda: stage.pods(f"{keys.LABEL_FINETUNEJOB}=stuck"))[0]
    name = pod["spec"]["containers"][0]["name"]
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    box = {"name": name, "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": waiting}
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": timestamp(60)}
    stage.status(pod, phase="Pending", conditions=[scheduled], containerStatuses=[box])
    stage.until("it has failed", lambda: stage.get("ftj", "stuck")["status"]["phase"] == "Failed")
    stage.until("its Job is gone", lambda: not stage.get("job", "stuck-1"))


def walk_a_queued_job(stage):
    """What it waits for is asked of Kueue, which isn't there."""
    job = parsed((ROOT / "manifests/samples/finetunejob.yaml").read_text())[0]
    job["metadata"] |= {"name": "queued", "labels": {keys.LABEL_QUEUE: "gpus"}}
    stage.kubectl("create", "-f", "-", stdin=json.dumps(job))

    def waits():
        conditions = stage.get("ftj", "queued").get("status", {}).get("conditions", ())
        return keys.Reason.QUOTA_PENDING in {it["reason"] for it in conditions}

    stage.until("it waits", waits)
    stage.kubectl("delete", "ftj", "queued")


def serve_revision(stage, number):
    mine = f"{keys.LABEL_MODELDEPLOYMENT}=smollm2,{keys.LABEL_REVISION}=r{number}"
    quantizer = f"{mine},{keys.LABEL_COMPONENT}={keys.COMPONENT_QUANTIZE}"
    pod = stage.until("a quantize pod", lambda: stage.pods(quantizer))[0]
    stage.finish(pod, report(keys.Reason.QUANTIZED, "s3://models/x/quantized"))
    server = f"{mine},{keys.LABEL_COMPONENT}={keys.COMPONENT_SERVER}"
    stage.make_ready(stage.until("a server pod", lambda: stage.pods(server))[0])
    stage.until(
        "the Service leads to it",
        lambda: (
            (stage.get("service", "smollm2").get("spec") or {}).get("selector", {}).get(keys.LABEL_REVISION)
            == f"r{number}"
        ),
    )


def walk_a_deployment(stage):
    """Two revisions; the second takes over and the first goes."""
    stage.kubectl("create", "-f", str(ROOT / "manifests/samples/modeldeployment-uri.yaml"))
    serve_revision(stage, 1)
    undone(stage, "deployment", "smollm2-r1", {"spec": {"replicas": 2}})
    stage.kubectl(
        "patch",
        "mdep",
        "smollm2",
        "--type=merge",
        "-p",
        '{"spec":{"quantization":{"method":"Q8_0"},"revisionHistoryLimit":1}}',
    )
    serve_revision(stage, 2)
    for kind, name in (("deployment", "smollm2-r1"), ("job", "smollm2-r1-quantize"), ("configmap", "smollm2-r1")):
        stage.until(f"{kind} {name} is gone", lambda kind=kind, name=name: not stage.get(kind, name))


@pytest.mark.timeout(240)
def test_every_right_is_used_and_none_is_missing(stage, granted):
    since = datetime.now(UTC) - timedelta(seconds=30)
    walk_a_job(stage)
    walk_a_failing_job(stage)
    walk_a_queued_job(stage)
    walk_a_deployment(stage)

    account = f"system:serviceaccount:{stage.namespace}:{NAME}"
    used, refused = set(), []
    for event in stage.server.audit_events(since):
        target = event.get("objectRef")
        if event["user"]["username"] != account or target is None:
            continue
        resource = "/".join(part for part in (target["resource"], target.get("subresource")) if part)
        right = (target.get("apiGroup", ""), resource, event["verb"])
        used.add(right)
        if event["responseStatus"]["code"] in (401, 403):
            refused.append((right, event["requestURI"]))
    assert refused == []
    assert used <= granted
    assert granted - used == set(), "granted in vain"
