"""`tunesmith plan`: a manifest in, what it would take and make out; nothing is started and nothing is fetched."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tunesmith_api.keys import ExitCode
from tunesmith_api.v1alpha1.finetunejob import Workers
from tunesmith_cli.errors import Refused
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_cli.plan.capacity import capacity_of, shown
from tunesmith_cli.plan.command import Options, show

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = sorted((ROOT / "manifests/samples").glob("finetunejob*.yaml"))
SAMPLE = ROOT / "manifests/samples/finetunejob.yaml"
FULL = ROOT / "manifests/samples/finetunejob-full.yaml"
QLORA = ROOT / "manifests/samples/finetunejob-qlora.yaml"
LLAMA = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "dtype": "bfloat16", "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """A model of which config.json alone is there."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def printed(path, **options):
    file = io.StringIO()
    code = show(Options(str(path), **options), Console(file=file, width=120))
    return code, file.getvalue()


def document(path, **options):
    code, text = printed(path, as_json=True, **options)
    return code, json.loads(text)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_every_sample_can_be_planned_without_its_model(sample):
    code, found = document(sample)
    assert code == ExitCode.SUCCESS
    assert found["memory"] == {"fits": None}
    wanted = parsed(sample.read_text())[0]["spec"]["workers"]
    assert found["workers"] == wanted["replicas"]
    assert found["gpus"] == wanted["replicas"] * wanted.get("gpusPerWorker", 0)
    assert [child["kind"] for child in found["children"]] == ["Service", "NetworkPolicy", "ConfigMap", "Secret", "Job"]


def test_without_the_model_the_page_says_what_is_missing():
    code, text = printed(SAMPLE)
    assert code == 0
    assert "s3://models/smollm2-135m-instruct isn't on this machine" in text
    assert "--model" in text
    assert "Job sentiment-1, 2 pods" in text


def test_the_children_are_the_operators_own(config):
    _, found = document(SAMPLE, model=config)
    job = found["children"][-1]
    assert job["spec"]["completions"] == 2
    assert job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "3Gi"


def test_a_job_that_fits_says_so(config):
    code, text = printed(SAMPLE, model=config)
    assert code == 0
    assert "It fits." in text
    assert "weights" in text
    assert "guessed from config.json" in text


def test_the_processes_of_a_worker_are_told_and_share_its_memory(config):
    full = ["spec.workers.resources.memory=16Gi"]
    several = [*full, "spec.workers.processesPerWorker=2"]
    _, one = document(FULL, model=config, settings=full)
    _, two = document(FULL, model=config, settings=several)
    assert (two["workers"], two["processes"], two["memory"]["strategy"]) == (2, 4, "DDP")
    assert two["memory"]["workerBytes"] > 1.5 * one["memory"]["workerBytes"]
    assert ", 2 processes in each" in printed(FULL, settings=several)[1]
    assert "in each" not in printed(FULL, settings=full)[1]


@pytest.mark.parametrize(("workers", "strategy"), [(1, "FSDP"), (2, "HSDP")])
def test_hybrid_shares_are_those_of_the_processes_of_one_worker(config, workers, strategy):
    settings = ["spec.workers.processesPerWorker=2", "spec.parallelism.strategy=HSDP"]
    _, found = document(FULL, model=config, settings=[*settings, f"spec.workers.replicas={workers}"])
    _, whole = document(FULL, model=config, settings=["spec.workers.replicas=1"])
    assert found["memory"]["strategy"] == strategy
    for name in ("gradients", "optimizer"):
        assert found["memory"]["process"][name] == whole["memory"]["process"][name] // 2


def test_a_job_that_does_not_fit_names_settings_that_do_and_they_do(config):
    settings = ["spec.training.microBatchSize=64", "spec.training.globalBatchSize=128", "spec.training.maxLength=2048"]
    code, text = printed(SAMPLE, model=config, settings=settings)
    assert code == ExitCode.OUT_OF_MEMORY
    assert "It does not fit." in text
    assert "It would with  --set spec." in text
    _, found = document(SAMPLE, model=config, settings=settings)
    assert found["memory"]["fits"] is False
    for change in found["changes"]:
        more = [
            f"{name}={json.dumps(value)}" if isinstance(value, bool) else f"{name}={value}"
            for name, value in change.items()
        ]
        assert document(SAMPLE, model=config, settings=settings + more)[0] == 0, change
    assert "spec.workers.resources.memory" in found["changes"][-1]
    line = next(line for line in text.splitlines() if "It would with" in line)
    typed = [word for word in line.split() if word.startswith("spec.")]
    assert printed(SAMPLE, model=config, settings=settings + typed)[0] == 0, "the line can be pasted"


def test_a_gpu_is_judged_by_what_is_said_of_it(config):
    _, unknown = document(QLORA, model=config)
    assert unknown["memory"]["fits"] is None
    assert unknown["memory"]["strategy"] == "DDP"
    assert document(QLORA, model=config, gpu_memory="24Gi")[1]["memory"]["fits"] is True
    code, small = document(QLORA, model=config, gpu_memory="1Gi")
    assert (code, small["memory"]["fits"]) == (ExitCode.OUT_OF_MEMORY, False)
    assert "Whether it fits can't be said." in printed(QLORA, model=config)[1]
    assert "--gpu-memory" in printed(QLORA, model=config)[1]


def test_where_no_setting_helps_that_is_said(config):
    code, text = printed(QLORA, model=config, gpu_memory="700Mi")
    assert code == ExitCode.OUT_OF_MEMORY
    assert "No setting helps" in text


@pytest.mark.parametrize(
    ("workers", "gib"),
    [
        ({"gpu": {"resourceName": "nvidia.com/mig-3g.40gb"}}, 40e9 / 2**30),
        ({"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}}, 80e9 / 2**30),
        ({"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "nvidia.com/gpu.memory": "81559"}}, 81559 / 1024),
        ({"nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L4"}}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_names_tell_the_memory_of_a_gpu(workers, gib):
    found = capacity_of(Workers.model_validate({"gpusPerWorker": 1, **workers}), None)
    assert found.host == 4 << 30
    assert found.gpu == (None if gib is None else pytest.approx(gib * 2**30, rel=1e-6))
    assert capacity_of(Workers.model_validate(workers), None).gpu is None


def test_quantities_are_rounded_up():
    assert [shown(size) for size in (1, 700 << 20, (2 << 30) + 1)] == ["1Mi", "700Mi", "3Gi"]


def test_a_volume_that_is_here_has_the_model(tmp_path, config):
    settings = ["spec.model.uri=pvc://models/small"]
    (tmp_path / "small").mkdir()
    config.rename(tmp_path / "small/config.json")
    _, found = document(SAMPLE, settings=settings, volumes=[f"models={tmp_path}"])
    assert found["model"]["layers"] == 30
    assert document(SAMPLE, settings=settings)[1]["memory"] == {"fits": None}


def test_a_teacher_that_is_not_here_is_not_counted_and_that_is_said(config):
    settings = ["spec.method.distillation.teacherUri=s3://models/teacher"]
    assert "the teacher is not counted" in printed(SAMPLE, model=config, settings=settings)[1]
    _, found = document(SAMPLE, model=config, teacher=config, settings=settings)
    assert found["memory"]["process"]["teacher"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"settings": ["spec.training.learningRate=2"]}, "learningRate must lie between 0 and 1"),
        ({"settings": ["spec.model.uri=./model"]}, "a URI begins with its scheme"),
        ({"settings": ["spec.output.uri=s3://checkpoints/sentiment/x"]}, "lie one in the other"),
        ({"model": Path("/nowhere")}, "--model: /nowhere: No such file or directory"),
        ({"teacher": Path("/nowhere")}, "--teacher: this job has no spec.method.distillation"),
        ({"gpu_memory": "much"}, "--gpu-memory much: give a quantity"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_and_so_are_options_that_make_no_sense(options, words):
    with pytest.raises(Refused) as refused:
        printed(QLORA if "gpu_memory" in options else SAMPLE, **options)
    assert words in str(refused.value)


def test_damaged_files_are_told(tmp_path, config):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 8)
    with pytest.raises(Refused, match=r"model\.safetensors: it is no safetensors file"):
        printed(SAMPLE, model=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x01")
    with pytest.raises(Refused, match="it is cut off"):
        printed(SAMPLE, model=tmp_path)
    config.write_text("[]")
    with pytest.raises(Refused, match="no model's config"):
        printed(SAMPLE, model=config)
