"""manifests/argocd: the health checks follow the operator's own statuses, and the samples fit together.

The statuses are those that the operator writes on an in-memory cluster, the Lua runs in Argo CD's interpreter.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

import argocd
from devcluster import UnsupportedMachine, binaries, progress
from support import begun, make
from support.world import World
from tunesmith_api import keys
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.reports import ModelRef, Outcome, ProgressReport, TerminationReport, TrainerState
from tunesmith_api.v1alpha1.gate import Estimate, Evaluation, Figures, Metric
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.reconcile.progress import ProgressSample

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "manifests/argocd"
CHECKS = parsed((FOLDER / "health.yaml").read_text())[0]["data"]
WAVE = "argocd.argoproj.io/sync-wave"


def the(world, kind):
    return world.cluster.get(kind, "sentiment")


# --- a FineTuneJob, from nothing to every end ---


def job(**spec):
    world = World()
    world.cluster.put(make.finetunejob(**spec))
    return world


def pending(**spec):
    world = job(**spec)
    world.reconcile()
    world.wait(6)
    return world


def image_missing():
    world = pending()
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    containers = [{"name": "trainer", "image": "localhost/trainer:1", "state": waiting}]
    world.pod("sentiment-1", phase="Pending", containerStatuses=containers)
    world.wait(1)
    return world


def image_missing_too_long():
    world = image_missing()
    world.wait(61)
    return world


def child_refused():
    world = job()
    world.cluster.refuse = lambda write: "exceeded quota" if write == "create Job sentiment-1" else None
    world.reconcile()
    world.wait(6)
    return world


def training():
    world = pending()
    head = world.pod("sentiment-1", 0, ready=True)
    world.pod("sentiment-1", 1, ready=True)
    report = ProgressReport(state=TrainerState.TRAINING, global_step=6, max_steps=10)
    uid = world.cluster.get("Pod", head)["metadata"]["uid"]
    world.samples[Key(FINETUNEJOB_KIND, "ml", "sentiment")] = ProgressSample(uid, report, world.now)
    world.wait(5)
    return world


def worker_lost():
    world = begun.training()
    world.ends("sentiment-1-0-x", 137)
    world.wait(20)
    return world


def suspended():
    world = training()
    begun.edit(world, FINETUNEJOB_KIND, suspend=True)
    return world


def unreadable():
    world = training()
    begun.edit(world, FINETUNEJOB_KIND, task="Juggling")
    return world


def succeeded():
    world = begun.training()
    world.ends("sentiment-1-0-x", 0, make.succeeded())
    world.job_is("sentiment-1", "Complete", "SuccessPolicy")
    world.reconcile()
    return world


def failed():
    world = begun.training()
    world.ends("sentiment-1-0-x", 40, make.failed())
    world.job_is("sentiment-1", "Failed", "PodFailurePolicy")
    world.reconcile()
    return world


def edited(world, kind, **spec):
    """An edit that the operator has not seen."""
    world.cluster.change(kind, "sentiment", {"spec": spec})
    return world


def seen(world):
    world.reconcile()
    return world


# what is expected: the health, and the condition whose reason and message it tells
JOBS = {
    "created a moment ago": (job, "Progressing", None),
    "waits for pods": (pending, "Progressing", "Succeeded"),
    "an image is missing, which may come": (image_missing, "Progressing", "Succeeded"),
    "given up for it": (image_missing_too_long, "Degraded", "Succeeded"),
    "a quota is used up, which is tried again": (child_refused, "Progressing", "ChildrenApplied"),
    "trains": (training, "Progressing", "Succeeded"),
    "lost a worker": (worker_lost, "Progressing", "Succeeded"),
    "suspended under way": (suspended, "Suspended", "Succeeded"),
    "suspended before the start": (lambda: pending(suspend=True), "Suspended", "Succeeded"),
    "has succeeded": (succeeded, "Healthy", "Succeeded"),
    "has failed": (failed, "Degraded", "Succeeded"),
    "refused": (lambda: pending(output={"uri": "s3://checkpoints/sentiment/out"}), "Degraded", "Succeeded"),
    "a commit that this operator can't read": (unreadable, "Degraded", "Accepted"),
    "a commit after the end": (lambda: edited(succeeded(), FINETUNEJOB_KIND, suspend=True), "Progressing", None),
    "the same, seen": (lambda: seen(edited(succeeded(), FINETUNEJOB_KIND, suspend=True)), "Healthy", "Succeeded"),
}


# --- a ModelDeployment ---

PIRATE = {"name": "pirate", "uri": "s3://models/adapters/pirate"}
TUNED = {"source": {"uri": None, "fineTuneJobRef": {"name": "tune"}}, "storage": None}
CANARY = {"strategy": "Canary", "steps": [{"weight": 25}]}
ANOTHER = {"engine": {"contextLength": 512}}
GATED = {"quantization": {"method": "Q4_0"}, "evaluation": {"dataset": "s3://data/eval.jsonl"}}


def deployment():
    world = World()
    world.cluster.put(make.modeldeployment())
    return world


def changed(**spec):
    """A commit, seen by the operator, to a deployment that answers."""
    world = begun.serving()
    begun.edit(world, **spec)
    return world


def waits_for_job():
    world = begun.quantizing(**TUNED)
    world.cluster.put(make.finetunejob(name="tune"))
    world.wait(5)
    return world


def quantization_failed():
    world = begun.quantizing()
    report = make.failed(Reason.STORAGE_UNWRITABLE, message="no right to put objects")
    world.ends(world.pod("sentiment-r1-quantize"), 41, report)
    world.job_is("sentiment-r1-quantize", "Failed", "PodFailurePolicy")
    world.reconcile()
    return world


def starts():
    world = begun.quantizing()
    begun.quantize(world)
    return world


def at_a_step():
    world = begun.serving(replicas=3, rollout=CANARY)
    begun.edit(world, **ANOTHER)
    begun.quantize(world, "r2")
    world.rolls_out("sentiment-r2")
    world.wait(20)
    return world


def asked_for_another():
    world = at_a_step()
    begun.edit(world, engine={"contextLength": 1024})
    return world


def aborted():
    world = at_a_step()
    begun.edit(world, rollout={"abort": "sentiment-r2"})
    return world


def late():
    world = changed(**ANOTHER)
    begun.quantize(world, "r2")
    reason = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    world.cluster.change("Deployment", "sentiment-r2", {"status": {"conditions": [reason]}})
    world.wait(601)
    return world


def quantized(world, **found):
    digests = {"digest": "a" * 64, "base_digest": "b" * 64}
    model = ModelRef(uri="s3://models/sentiment/quantized/q4_0-abc", size_bytes=7, **digests)
    report = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=model, **found)
    world.ends(world.pod("sentiment-r1-quantize"), 0, report)
    world.job_is("sentiment-r1-quantize", "Complete")
    world.reconcile()
    return world


def evaluated(drop, **gate):
    """The first revision has lost so many points of accuracy, and there is that gate."""
    world = begun.quantizing(**GATED, **({"gate": gate} if gate else {}))
    figures = Figures(perplexity="1.2", accuracy_percent="80.0", tokens_per_second="20", size_bytes=7, memory_bytes=9)
    estimate = Estimate(value=drop, low=drop, high=drop)
    drop_of = {"metric": Metric.EXACT_MATCH, "accuracy_drop_percent": estimate}
    evaluation = Evaluation(examples=200, baseline=figures, quantized=figures, **drop_of)
    return quantized(world, evaluation=evaluation)


def gate_drawn_tighter():
    world = evaluated("2.0")
    world.rolls_out("sentiment-r1")
    world.wait(5)
    begun.edit(world, gate={"maxAccuracyDropPercent": 1})
    return world


def answering(count, **spec):
    world = begun.serving(**spec)
    world.rolls_out("sentiment-r1", available=count)
    world.wait(20)
    return world


def adapter_refused():
    world = quantized(begun.quantizing(adapters=[PIRATE]))
    (name,) = [it["metadata"]["name"] for it in world.cluster.of_kind("Job") if "-adapter-" in it["metadata"]["name"]]
    report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.ADAPTER_INVALID, message="of another model")
    world.ends(world.pod(name), 40, report)
    world.job_is(name, "Failed")
    world.reconcile()
    world.rolls_out("sentiment-r1")
    world.wait(5)
    return world


def service_refused():
    world = begun.serving()
    world.cluster.refuse = lambda write: "denied by policy" if write.startswith("patch Service") else None
    world.cluster.change("Service", "sentiment", {"spec": {"selector": {"app": "another"}}})
    world.wait(20)
    return world


BAD = {"engine": {"contextLength": 1048576, "parallelRequests": 256}}
DEPLOYMENTS = {
    "created a moment ago": (deployment, "Progressing", None),
    "there is no such job": (lambda: begun.quantizing(**TUNED), "Progressing", "Ready"),
    "its job trains": (waits_for_job, "Progressing", "Ready"),
    "is being quantized": (begun.quantizing, "Progressing", "Ready"),
    "can't be quantized": (quantization_failed, "Degraded", "Progressing"),
    "starts": (starts, "Progressing", "Ready"),
    "answers": (begun.serving, "Healthy", "Ready"),
    "the next revision is on its way": (lambda: changed(**ANOTHER), "Progressing", "Progressing"),
    "a step waits for somebody": (at_a_step, "Suspended", "Progressing"),
    "the next but one is asked for": (asked_for_another, "Progressing", "Progressing"),
    "taken back by hand": (aborted, "Degraded", "Progressing"),
    "the next revision never came up": (late, "Degraded", "Progressing"),
    "the gate holds it back": (lambda: evaluated("9.0", maxAccuracyDropPercent=3), "Degraded", "Progressing"),
    "the gate was drawn tighter since": (gate_drawn_tighter, "Degraded", "QualityHeld"),
    "some replicas answer": (lambda: answering(1, replicas=2), "Progressing", "Ready"),
    "none does any more": (lambda: answering(0), "Degraded", "Ready"),
    "scaled to zero": (lambda: changed(replicas=0), "Healthy", "Ready"),
    "an adapter is being converted": (lambda: changed(adapters=[PIRATE]), "Progressing", "AdaptersReady"),
    "an adapter doesn't fit": (adapter_refused, "Degraded", "AdaptersReady"),
    "refused": (lambda: begun.quantizing(**BAD), "Degraded", "Accepted"),
    "a commit is refused": (lambda: changed(**BAD), "Degraded", "Accepted"),
    "a commit that is not seen yet": (lambda: edited(begun.serving(), MODELDEPLOYMENT_KIND, replicas=2), "Progressing", None),
    "a child is refused": (service_refused, "Progressing", "ChildrenApplied"),
}  # fmt: skip


def expected(raw, health, condition):
    if condition is None:
        return health, f"Waiting for the operator to see generation {raw['metadata']['generation']}."
    (found,) = [it for it in raw["status"]["conditions"] if it["type"] == condition]
    return health, f"{found['reason']}: {found['message']}"


@pytest.mark.parametrize(("kind", "table"), [(FINETUNEJOB_KIND, JOBS), (MODELDEPLOYMENT_KIND, DEPLOYMENTS)])
def test_health_follows_the_operators_status(kind, table):
    objects = {name: the(begin(), kind) for name, (begin, _, _) in table.items()}
    wanted = {name: expected(objects[name], *table[name][1:]) for name in table}
    assert judged(kind, objects) == wanted
    assert {health for health, _ in wanted.values()} == {"Healthy", "Progressing", "Suspended", "Degraded"}


@pytest.mark.parametrize("kind", [FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND])
def test_an_object_without_a_status_is_waited_for(kind):
    bare = {"metadata": {"generation": 1}}
    unseen = {"no status": bare, "an empty one": {**bare, "status": {}}}
    assert {health for health, _ in judged(kind, unseen).values()} == {"Progressing"}


def judged(kind, objects):
    script = CHECKS[f"resource.customizations.health.{keys.GROUP}_{kind}"]
    try:
        return dict(zip(objects, argocd.healths(script, list(objects.values())), strict=True))
    except UnsupportedMachine as reason:
        pytest.skip(f"no Lua: this machine {reason}")


# --- what else is in the folder ---


def test_the_health_checks_are_a_component_of_an_argo_cd_that_kustomize_installs(tmp_path):
    try:
        kubectl = binaries.ensure(progress.to_stderr()).path("kubectl")
    except UnsupportedMachine as reason:
        pytest.skip(f"no kubectl: this machine {reason}")
    labels = {"app.kubernetes.io/part-of": "argocd"}
    theirs = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "argocd-cm", "labels": labels}, "data": {"url": "https://cd"},
    }  # fmt: skip
    (tmp_path / "argocd-cm.yaml").write_text(yaml.safe_dump(theirs))
    overlay = {
        "namespace": "argocd",
        "resources": ["argocd-cm.yaml"],
        "components": [os.path.relpath(FOLDER, tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    done = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = parsed(done.stdout)
    assert made["metadata"] == {"name": "argocd-cm", "namespace": "argocd", "labels": labels}
    assert made["data"] == CHECKS | theirs["data"]


def test_a_model_is_served_in_the_wave_after_the_job_that_trains_it():
    names = ("finetunejob", "modeldeployment")
    job, deployment = (parsed((FOLDER / f"train-and-deploy/{name}.yaml").read_text())[0] for name in names)
    waves = [int(it["metadata"]["annotations"][WAVE]) for it in (job, deployment)]
    assert waves == sorted(set(waves))
    assert deployment["spec"]["source"]["fineTuneJobRef"]["name"] == job["metadata"]["name"]
    assert "ttlSecondsAfterFinished" not in job["spec"], "Argo CD would train it anew as often as it is deleted"


@pytest.mark.parametrize("begin", [make.finetunejob, make.modeldeployment])
def test_the_marks_of_argo_cd_are_not_handed_on_to_children(begin):
    """It would take them for objects that are no longer in git, and prune them."""
    body = begin()
    body["metadata"] |= {
        "labels": {"app.kubernetes.io/instance": "marked"},
        "annotations": {"argocd.argoproj.io/tracking-id": "marked"},
    }
    world = World()
    world.cluster.put(body)
    world.reconcile()
    children = [it for it in world.cluster.objects.values() if it["kind"] != body["kind"]]
    assert len(children) >= 3
    assert [it["metadata"]["name"] for it in children if "marked" in json.dumps(it)] == []
