"""Under GitOps a manifest is compared with what the cluster has, for ever: nothing of ours may make a difference.

Each sample is applied to a real API server, by the client and by the server, and compared as Argo CD and kubectl do.
"""

import json
import subprocess
import time
from pathlib import Path

import pytest

from argocd import definitions, drift
from support import make
from tunesmith_api import keys
from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_cli.kubernetes_yaml import parsed

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {name: ROOT / "manifests" / name for name in ("samples", "argocd/train-and-deploy")}
MANAGER = "argocd-controller"
WAYS = {"by the client": (), "by the server": ("--server-side", f"--field-manager={MANAGER}")}
OURS = (keys.FINETUNEJOB_KIND, keys.MODELDEPLOYMENT_KIND)
TOLERATIONS = [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]
"""Entries of a list that the API server completes (`operator`)."""


@pytest.fixture(params=[*FOLDERS, "lists"])
def folder(request, tmp_path):
    if request.param in FOLDERS:
        return FOLDERS[request.param]
    job = make.finetunejob(namespace=None, workers={"tolerations": TOLERATIONS})
    deployment = make.modeldeployment(namespace=None, tolerations=TOLERATIONS)
    for body in (job, deployment):
        del body["metadata"]["namespace"]
        (tmp_path / f"{body['kind']}.json").write_text(json.dumps(body))
    return tmp_path


def manifests(folder):
    documents = [document for path in sorted(folder.iterdir()) for document in parsed(path.read_text())]
    return {(it["kind"], it["metadata"]["name"]): it for it in documents if it["kind"] in OURS}


def named(text):
    return {(it["kind"], it["metadata"]["name"]): it for it in json.loads(text)["items"] if it["kind"] in OURS}


@pytest.mark.parametrize("way", WAYS)
def test_a_manifest_that_was_applied_differs_from_nothing(api, namespace, folder, way):
    where = ("-n", namespace, "-f", str(folder))
    api.kubectl("apply", *WAYS[way], *where)
    live = named(api.kubectl("get", *where, "-o", "json"))
    git = manifests(folder)
    assert live.keys() == git.keys()
    # Argo CD's own comparison, in which no API server completes what git leaves out
    assert {name: found for name in git if (found := list(drift(git[name], live[name])))} == {}
    # with ServerSideDiff=true: what would applying it once more make?
    again = named(
        api.kubectl("apply", *WAYS["by the server"], "--force-conflicts", "--dry-run=server", *where, "-o", "json")
    )
    assert {name: substance(it) for name, it in again.items()} == {name: substance(it) for name, it in live.items()}
    for flags in ((), (*WAYS["by the server"], "--force-conflicts")):
        diff = [api.programs.path("kubectl"), f"--kubeconfig={api.kubeconfig}", "diff", *flags, *where]
        done = subprocess.run(diff, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


def substance(raw):
    """An object without what says who wrote it, and when."""
    metadata = {name: it for name, it in raw["metadata"].items() if name not in ("managedFields", "resourceVersion")}
    notes = {
        name: it
        for name, it in metadata.pop("annotations", {}).items()
        if not name.startswith("kubectl.kubernetes.io/")
    }
    return raw | {"metadata": {**metadata, "annotations": notes}}


def test_what_people_set_beside_git_is_no_difference(api, namespace):
    """Neither a promotion by hand is taken back, nor the replicas that an autoscaler writes where git names none."""
    git = make.modeldeployment(namespace=namespace, rollout={"strategy": "Canary", "steps": [{"weight": 10}]})
    api.kubectl("apply", "-f", "-", stdin=json.dumps(git))
    by_hand = {"spec": {"rollout": {"promote": "sentiment-r2"}}}
    api.kubectl("patch", "mdep", "sentiment", "-n", namespace, "--type=merge", "-p", json.dumps(by_hand))
    api.kubectl("scale", "mdep", "sentiment", "-n", namespace, "--replicas=3")
    for way in WAYS.values():
        api.kubectl("apply", *way, "-f", "-", stdin=json.dumps(git))
        live = api.get("mdep", "sentiment", namespace)
        assert list(drift(git, live)) == []
        assert (live["spec"]["rollout"]["promote"], live["spec"]["replicas"]) == ("sentiment-r2", 3)


def test_the_comparison_finds_a_difference_where_there_is_one():
    live = {"spec": {"replicas": 2, "defaulted": 1, "list": [{"a": 1, "defaulted": 2}]}}
    assert list(drift({"spec": {"replicas": 2, "list": [{"a": 1}]}}, live)) == []
    for changed in ({"replicas": 3}, {"list": []}, {"list": [{"a": 2}]}, {"replicas": True}, {"more": "x"}):
        assert len(list(drift({"spec": changed}, live))) == 1, changed


@pytest.mark.parametrize("way", WAYS)
def test_the_operator_writes_to_the_status_alone(stage, way):
    """Whoever works on an object of git would be at odds with what puts it back."""
    bodies = [make.finetunejob("tuned", stage.namespace), make.modeldeployment("served", stage.namespace)]
    for body in bodies:
        stage.kubectl("apply", *WAYS[way], "-f", "-", stdin=json.dumps(body))
    for kind, name in (("ftj", "tuned"), ("mdep", "served")):
        stage.wait(
            "the operator's status",
            lambda kind=kind, name=name: stage.get(kind, name)["status"].get("observedGeneration"),
        )
    for body in bodies:
        live = json.loads(
            stage.kubectl("get", body["kind"], body["metadata"]["name"], "-o", "json", "--show-managed-fields")
        )
        assert list(drift(body, live)) == []
        assert set(live["metadata"].get("annotations", {})) <= {"kubectl.kubernetes.io/last-applied-configuration"}
        assert not {"labels", "finalizers", "ownerReferences"} & set(live["metadata"])
        assert live["metadata"]["generation"] == 1
        written = {it["manager"]: it for it in live["metadata"]["managedFields"]}
        operator = written.pop(keys.FIELD_MANAGER)
        assert (operator["subresource"], set(operator["fieldsV1"])) == ("status", {"f:status"})
        assert len(written) == 1


def test_each_number_format_is_accepted_with_the_engine_that_reads_it(api, namespace):
    spec = make.modeldeployment()["spec"]
    items = [
        make.modeldeployment(
            f"m-{engine.lower()}-{number}",
            namespace,
            **spec,
            engine={"type": engine.value},
            quantization={"method": it.value},
        )
        for engine in ENGINE_METHODS
        for number, it in enumerate(ENGINE_METHODS[engine])
    ]
    assert {it["spec"]["engine"]["type"] for it in items} == {it.value for it in EngineType} - {"Auto"}
    listed = {"apiVersion": "v1", "kind": "List", "items": items}
    said = api.kubectl(
        "create", "-n", namespace, "--validate=strict", "--dry-run=server", "-f", "-", stdin=json.dumps(listed)
    )
    assert said.count("created (server dry run)") == len(items)


@pytest.fixture
def argo_cd(api):
    """The server with Argo CD's kinds and its namespace."""
    names = [f"{plural}.argoproj.io" for plural in ("applications", "applicationsets")]

    def established(name):
        conditions = api.get("crd", name).get("status", {}).get("conditions") or ()
        return any(it["type"] == "Established" and it["status"] == "True" for it in conditions)

    for path in definitions():
        api.kubectl("apply", "--server-side", "-f", str(path))
    api.kubectl("create", "namespace", "argocd")
    deadline = time.monotonic() + 60
    while not all(map(established, names)) and time.monotonic() < deadline:
        time.sleep(0.2)
    yield api
    api.kubectl("delete", "--wait=false", "ns/argocd", *(f"crd/{name}" for name in names))


def test_argo_cd_accepts_the_samples_for_it(argo_cd):
    files = [str(ROOT / f"manifests/argocd/{name}.yaml") for name in ("application", "applicationset")]
    said = argo_cd.kubectl("create", "--validate=strict", "--dry-run=server", *(f"--filename={it}" for it in files))
    assert said.count("created (server dry run)") == 2


def test_the_health_checks_are_added_to_what_the_configuration_has(api, namespace):
    metadata = {"name": "argocd-cm", "labels": {"app.kubernetes.io/part-of": "argocd"}}
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"url": "https://cd"}}
    api.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(theirs))
    checks = ROOT / "manifests/argocd/health.yaml"
    api.kubectl("patch", "configmap", "argocd-cm", "-n", namespace, "--patch-file", str(checks))
    live = api.get("configmap", "argocd-cm", namespace)
    assert live["metadata"]["labels"] == metadata["labels"]
    assert live["data"] == theirs["data"] | parsed(checks.read_text())[0]["data"]
