"""Every file of manifests/samples is accepted by a real API server, and says what the API types read from it."""

import json
import re
from pathlib import Path

import kubernetes
import pytest

from devcluster import CommandFailed
from support.make import CONFIG, merged
from support.mistakes import MISTAKES
from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment
from tunesmith_api.v1alpha1.finetunejob import IMMUTABLE_AFTER_START, READ_AT_START
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_cli.refusals import refusals
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.finetunejob.policies import violation as violation_of_job
from tunesmith_operator.core.modeldeployment.policies import violation as violation_of_deployment

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "manifests/samples"
SAMPLES = sorted(FOLDER.glob("*.yaml"))
KINDS = {keys.FINETUNEJOB_KIND: FineTuneJob, keys.MODELDEPLOYMENT_KIND: ModelDeployment}
COLUMNS = {
    keys.FINETUNEJOB_KIND: ["NAME", "PHASE", "PROGRESS", "STEP", "LOSS", "ETA", "WORKERS", "RESTARTS", "AGE"],
    keys.MODELDEPLOYMENT_KIND: ["NAME", "READY", "PHASE", "REVISION", "QUANTIZATION", "URL", "AGE"],
}


def read(sample):
    return parsed(sample.read_text())[0]


def by_name(name):
    return next(sample for sample in SAMPLES if sample.name == name)


def test_the_samples_are_accepted(api, namespace):
    # strict: a field that the API server would drop in silence is an error
    arguments = ("apply", "-n", namespace, "--validate=strict", "-f", str(FOLDER))
    assert api.kubectl(*arguments, "--dry-run=server").count(" created (server dry run)") == len(SAMPLES)
    assert api.kubectl(*arguments).count(" created") == len(SAMPLES)
    versions = ("get", "-n", namespace, "-f", str(FOLDER), "-o", "jsonpath={.items[*].metadata.resourceVersion}")
    before = api.kubectl(*versions)
    api.kubectl(*arguments)
    assert api.kubectl(*versions) == before


def test_the_samples_mean_the_same_to_the_api_types(api, namespace):
    api.kubectl("apply", "-n", namespace, "-f", str(FOLDER))
    listed = json.loads(api.kubectl("get", "-n", namespace, "-o", "json", "-f", str(FOLDER)))["items"]
    stored = {(it["kind"], it["metadata"]["name"]): it for it in listed}
    compared = 0
    for wanted in map(read, SAMPLES):
        if wanted["kind"] not in KINDS:
            continue
        kind = KINDS[wanted["kind"]]
        found = stored[wanted["kind"], wanted["metadata"]["name"]]
        unseen = kind.model_json_schema()["properties"]["status"]["default"]
        mine = kind.model_validate(wanted | {"metadata": found["metadata"], "status": unseen})
        assert mine == kind.model_validate(found), "the API server and the operator must resolve the same defaults"
        compared += 1
    assert compared == len(SAMPLES) - 1, "all but the Secret"


@pytest.mark.parametrize("kind", COLUMNS)
def test_kubectl_get_prints_the_columns(api, namespace, kind):
    api.kubectl("apply", "-n", namespace, "-f", str(FOLDER))
    short = {keys.FINETUNEJOB_KIND: "ftj", keys.MODELDEPLOYMENT_KIND: "mdep"}[kind]
    header, *rows = api.kubectl("get", short, "-n", namespace).splitlines()
    assert header.split() == COLUMNS[kind]
    assert len(rows) == sum(read(sample)["kind"] == kind for sample in SAMPLES)
    everything = api.kubectl("get", "tunesmith", "-n", namespace, "-o", "name").split()
    assert f"{kind.lower()}.{keys.GROUP}/sentiment" in everything


def test_every_field_is_explained_by_kubectl(api):
    assert "Folder with config.json" in api.kubectl("explain", "ftj.spec.model.uri")
    assert "8 bits per weight" in " ".join(api.kubectl("explain", "mdep.spec.quantization.method").split())


def test_a_deployment_sample_scales_like_any_other(api, namespace):
    api.kubectl("apply", "-n", namespace, "-f", str(by_name("modeldeployment.yaml")))
    api.kubectl("scale", "mdep", "sentiment", "-n", namespace, "--replicas=3")
    replicas = api.kubectl("get", "mdep", "sentiment", "-n", namespace, "-o", "jsonpath={.spec.replicas}")
    assert replicas == "3"


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if read(s)["kind"] == keys.FINETUNEJOB_KIND], ids=lambda sample: sample.name
)
def test_the_workers_of_a_sample_are_accepted(api, sample):
    wanted = read(sample)
    wanted["metadata"] |= {"namespace": "default", "uid": "00000000-0000-0000-0000-000000000000"}
    children = build(FineTuneJob.model_validate(wanted), CONFIG, attempt=1)
    client = api.api_client()
    for child in (children.config_map, children.service, children.network_policy, children.job):
        kubernetes.utils.create_from_dict(client, child.body, dry_run="All")
    client.rest_client.close()


def test_the_samples_fit_together():
    job, deployment = read(by_name("finetunejob.yaml")), read(by_name("modeldeployment.yaml"))
    secret = read(by_name("storage-secret.example.yaml"))
    assert deployment["spec"]["source"]["fineTuneJobRef"]["name"] == job["metadata"]["name"]
    assert set(secret["stringData"]) == set(keys.STORAGE_SECRET_KEYS)
    for sample in SAMPLES:
        storage = read(sample).get("spec", {}).get("storage", {})
        if "secretRef" in storage:
            assert storage["secretRef"]["name"] == secret["metadata"]["name"]


# --- a slip in a sample is refused, and the message says which field and what to do ---


@pytest.fixture(scope="module")
def answer_to(api):
    """What the API server says against a manifest, without kubectl: dozens of them take seconds."""
    client = api.api_client()
    custom = kubernetes.client.CustomObjectsApi(client)

    def answer(job):
        where = (keys.GROUP, keys.VERSION, "default", keys.FINETUNEJOB_PLURAL)
        with pytest.raises(kubernetes.client.ApiException) as refused:
            custom.create_namespaced_custom_object(*where, job, dry_run="All", field_validation="Strict")
        return json.loads(refused.value.body)["message"]

    yield answer
    client.rest_client.close()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_in_the_sample_is_refused(answer_to, mistake):
    job = merged(read(by_name("finetunejob.yaml")), mistake.change)
    answer = answer_to(job)
    assert mistake.complaint in answer
    assert not mistake.field or f"{mistake.field}: " in answer
    # the command line refuses it in the same words
    words = refusals(job)
    assert words
    assert [line for line in words if line not in answer] == []


# something to change in each field that decides the result
CHANGES = {
    "task": "DPO",
    "model": {"revision": "main"},
    "dataset": {"onBadRow": "Skip"},
    "method": {"lora": {"r": 4}},
    "training": {"seed": 1},
    "parallelism": {"strategy": "FSDP"},
    "classification": {},
    "preference": {},
    "maskedLM": {},
    "translation": {"sourceLanguage": "en", "targetLanguage": "de"},
    "generation": {"numBeams": 2},
    "workers": {"replicas": 1},
    "checkpoint": {"keepLast": 9},
    "output": {"save": "Both"},
    "storage": {"region": "eu-west-1"},
}
# and in each that the pods have read by then
READ = {
    "huggingFace": {"secretRef": {"name": "x"}},
    "tracking": {"tensorBoard": True},
    "failurePolicy.maxRestarts": 1,
    "failurePolicy.maxRollbacks": 1,
    "failurePolicy.lossSpikeFactor": 9,
    "failurePolicy.collectiveTimeoutSeconds": 99,
}


def test_what_decides_the_result_cannot_change_once_a_job_has_started_and_the_rest_can(api, namespace):
    def patch(change, *more):
        api.kubectl("patch", "ftj", "sentiment", "-n", namespace, "--type=merge", "-p", json.dumps(change), *more)

    assert CHANGES.keys() == set(IMMUTABLE_AFTER_START)
    assert READ.keys() == set(READ_AT_START)
    api.kubectl("apply", "-n", namespace, "-f", str(by_name("finetunejob.yaml")))
    patch({"spec": {"training": {"seed": 2}}})
    patch({"status": {"startTime": "2026-11-24T12:00:00Z"}}, "--subresource=status")
    for field, change in CHANGES.items():
        with pytest.raises(CommandFailed) as refused:
            patch({"spec": {field: change}})
        assert f"spec.{field} can't change once the job has started" in str(refused.value)
    for field, change in READ.items():
        outer, _, inner = field.partition(".")
        with pytest.raises(CommandFailed) as refused:
            patch({"spec": {outer: {inner: change} if inner else change}})
        assert f"spec.{field} can't change once the job has started: delete it" in str(refused.value)
    patch({"status": {"restarts": 1}}, "--subresource=status")
    bounds = {"backoffLimit": 9, "startupTimeoutSeconds": 99}
    ends = {"activeDeadlineSeconds": 9, "preRunningDeadlineSeconds": 9, "ttlSecondsAfterFinished": 9}
    ends |= {"childrenTTLSecondsAfterFinished": 9}
    patch({"spec": {"suspend": True, "failurePolicy": bounds, **ends}})


def test_a_deployment_is_refused_a_name_whose_service_would_be_a_jobs(api, namespace):
    deployment = read(by_name("modeldeployment-uri.yaml"))
    deployment["metadata"]["name"] = "sentiment-workers"
    with pytest.raises(CommandFailed, match=r"can't end in -workers"):
        api.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(deployment))


def test_a_model_from_a_folder_needs_storage(api, namespace):
    deployment = read(by_name("modeldeployment-uri.yaml"))
    del deployment["spec"]["storage"]
    with pytest.raises(CommandFailed, match=r"source\.uri needs storage"):
        api.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(deployment))
    deployment["spec"]["source"]["uri"] = "pvc://models/base"
    with pytest.raises(CommandFailed, match="artifactsURI needs storage"):
        api.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(deployment))
    del deployment["spec"]["artifactsURI"]
    api.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(deployment))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"uri": "s3://m/x", "fineTuneJobRef": {"name": "a"}}, "source takes either fineTuneJobRef or uri"),
        ({"uri": "s3://m/x", "revision": "v1"}, r"source\.revision is for hf:// models only"),
        ({"uri": "hf://datasets/o/n"}, r"source\.uri is a data set of the Hub"),
        ({"uri": "hf://o/n"}, "a model of the Hub needs artifactsURI"),
        ({"fineTuneJobRef": {"name": "a", "digest": "sha256:abc"}}, r"fineTuneJobRef\.digest"),
    ],
)
def test_a_source_that_can_not_be_served_is_refused(api, namespace, source, words):
    deployment = read(by_name("modeldeployment-uri.yaml"))
    del deployment["spec"]["artifactsURI"]
    deployment["spec"]["source"] = source
    with pytest.raises(CommandFailed, match=words):
        api.kubectl("create", "-n", namespace, "-f", "-", stdin=json.dumps(deployment))


# --- manifests in docs/: complete ones as they are, fragments laid over a sample ---


def manifests_of_docs():
    for page in sorted((ROOT / "docs").glob("*.md")):
        for number, block in enumerate(re.findall(r"^```yaml\n(.+?)^```", page.read_text(), re.M | re.S), 1):
            yield pytest.param(page.stem, parsed(block)[0], id=f"{page.stem} {number}")


def laid_over(base, change):
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    return {name: laid_over(base.get(name), change.get(name, base.get(name))) for name in {**base, **change}}


@pytest.mark.parametrize(("page", "manifest"), list(manifests_of_docs()))
def test_manifests_in_docs_are_accepted(api, namespace, page, manifest):
    if "kind" not in manifest:
        base = read(by_name(f"{page}.yaml"))
        if "source" in manifest["spec"]:
            del base["spec"]["source"]
        manifest = laid_over(base, manifest)
    api.kubectl("create", "-n", namespace, "--validate=strict", "-f", "-", stdin=json.dumps(manifest))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if read(s)["kind"] in KINDS], ids=lambda sample: sample.name)
def test_sample_breaks_no_policy_of_the_operator(sample):
    wanted = read(sample)
    kind = KINDS[wanted["kind"]]
    violation = {FineTuneJob: violation_of_job, ModelDeployment: violation_of_deployment}[kind]
    assert violation(kind.model_validate(wanted)) is None
