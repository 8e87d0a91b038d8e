"""From a file and options to a job: YAML as Kubernetes reads it, overrides, paths for URIs, the operator's policies."""

import io
from pathlib import Path

import pytest

from tunesmith_cli.errors import Refused
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_cli.local_paths import LocalPaths
from tunesmith_cli.manifest import apply_override, checked_job, read_manifest

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = ROOT / "manifests/samples/finetunejob.yaml"


@pytest.fixture
def job():
    return parsed(SAMPLE.read_text())[0]


def read(tmp_path, text):
    (tmp_path / "job.yaml").write_text(text)
    return read_manifest(str(tmp_path / "job.yaml"))


HEAD = "apiVersion: tunesmith.dev/v1alpha1\nkind: FineTuneJob\n"


# --- reading ---


def test_a_number_without_quotes_is_a_number_as_in_a_cluster(tmp_path):
    found = read(tmp_path, HEAD + "spec: {a: 2e-4, b: '2e-4', c: 12, d: 1.5, e: true, f: 2026-11-24, g: 7b}")
    assert found["spec"] == {"a": 2e-4, "b": "2e-4", "c": 12, "d": 1.5, "e": True, "f": "2026-11-24", "g": "7b"}


def test_other_kinds_beside_the_job_are_left_alone(tmp_path):
    text = "kind: Secret\n---\n" + HEAD + "metadata: {name: x}\n---\n"
    assert read(tmp_path, text)["metadata"]["name"] == "x"


def test_standard_input_is_read_too(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(HEAD))
    assert read_manifest("-")["kind"] == "FineTuneJob"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: [", "not valid YAML"),
        (HEAD + "spec: {task: DPO, task: DPO}", "'task' is there twice"),
        ("", "holds nothing; exactly one FineTuneJob is wanted"),
        ("kind: ModelDeployment", "holds ModelDeployment"),
        ("- 1", "holds no object"),
        (f"{HEAD}---\n{HEAD}", "exactly one"),
        ("apiVersion: tunesmith.dev/v9\nkind: FineTuneJob", "this tunesmith knows tunesmith.dev/v1alpha1"),
    ],
)
def test_what_is_no_job_is_refused(tmp_path, text, words):
    with pytest.raises(Refused, match=r"job\.yaml") as refused:
        read(tmp_path, text)
    assert words in str(refused.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(Refused, match="No such file"):
        read_manifest(str(tmp_path / "nothing.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="not text in UTF-8"):
        read_manifest(str(tmp_path / "binary.yaml"))


# --- overrides ---


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("spec.training.maxSteps=10", 10),
        ("spec.training.learningRate=2e-5", 2e-5),
        ("spec.training.packing=false", False),
        ("spec.workers.resources.cpu=2", 2),
        ("spec.method.lora.targetModules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("spec.classification.labels=[a, b]", ["a", "b"]),
        ("spec.model.uri=a=b", "a=b"),
        ("metadata.name=other", "other"),
    ],
)
def test_a_field_is_set_by_its_path_and_read_as_its_type(job, setting, value):
    path = apply_override(job, setting)
    found = job
    for name in path.split("."):
        found = found[name]
    assert found == value


@pytest.mark.parametrize("text", ["", "null"])
def test_an_empty_value_removes_the_field(job, text):
    apply_override(job, f"spec.training.maxSteps={text}")
    assert "maxSteps" not in job["spec"]["training"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("spec.training.maxSteps", "give the field's path and a value"),
        ("training.maxSteps=1", "give the field's path and a value"),
        ("spec=1", "give the field's path and a value"),
        ("spec..x=1", "give the field's path and a value"),
        ("spec.task.name=x", "spec.task is no object with fields"),
        ("spec.method.lora.targetModules=[a", "not valid YAML"),
    ],
)
def test_an_override_that_is_none_is_refused(job, setting, words):
    with pytest.raises(Refused) as refused:
        apply_override(job, setting)
    assert words in str(refused.value)


# --- checking ---


def refused_lines(job, paths=None):
    with pytest.raises(Refused) as refused:
        checked_job(job, paths or LocalPaths())
    return list(refused.value.lines)


def test_a_good_job_is_a_job(job):
    assert checked_job(job, LocalPaths()).spec.training.max_steps == 80


def test_a_typing_error_in_an_override_is_refused_as_in_a_cluster(job):
    apply_override(job, "spec.training.maxStep=10")
    assert refused_lines(job) == ['unknown field "spec.training.maxStep"']


def test_the_operators_policies_hold_here_too(job, tmp_path):
    job["spec"]["checkpoint"]["uri"] = "./out/checkpoints"
    job["spec"]["output"]["uri"] = "./out"
    paths = LocalPaths()
    paths.localize(job, tmp_path)
    (line,) = refused_lines(job, paths)
    assert line.startswith(
        f"spec.checkpoint.uri ({tmp_path}/out/checkpoints) and spec.output.uri ({tmp_path}/out) lie one in"
    )


def test_every_missing_path_is_told_by_its_field(job, tmp_path):
    job["spec"]["model"]["uri"] = "./model"
    job["spec"]["dataset"]["eval"]["uri"] = str(tmp_path / "eval.jsonl")
    paths = LocalPaths()
    paths.localize(job, tmp_path)
    lines = refused_lines(job, paths)
    assert [line.partition(" does not exist")[0] for line in lines] == [
        f"spec.dataset.eval.uri: {tmp_path}/eval.jsonl",
        f"spec.model.uri: {tmp_path}/model",
    ]
