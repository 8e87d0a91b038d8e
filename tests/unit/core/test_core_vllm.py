"""The pods of engine VLLM, on CPU and on GPUs, and what is refused of it."""

from dataclasses import replace

import pytest

from support import make
from tunesmith_api import keys
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1 import ModelDeployment, Storage
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.task import Task
from tunesmith_cli.refusals import refusals
from tunesmith_operator.core.modeldeployment.children import config_map, quantize_job, server_deployment
from tunesmith_operator.core.modeldeployment.engines import engines_of
from tunesmith_operator.core.modeldeployment.heldout import cannot_be_evaluated
from tunesmith_operator.core.modeldeployment.images import image_missing
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.modeldeployment.template import template_of

SOURCE = SourceModel("s3://models/m", "d", Storage())
CONFIG = replace(make.CONFIG, vllm_image="vllm:1", vllm_gpu_image="vllm-gpu:1")


def deployment(**spec):
    engine = {"type": "VLLM", **spec.pop("engine", {})}
    return ModelDeployment.model_validate(make.modeldeployment(engine=engine, **spec))


def pods(**spec):
    """Plan, quantizing container, pod of the server."""
    made = template_of(deployment(**spec), SOURCE, CONFIG)
    plan = ServingPlan.from_json(config_map(made, 1).body["data"][keys.PLAN_FILE])
    quantizer = quantize_job(made, 1, CONFIG).body["spec"]["template"]["spec"]["containers"][0]
    return plan, quantizer, server_deployment(made, 1, 1, CONFIG).body["spec"]["template"]["spec"]


def test_on_cpu_the_pods_run_vllms_image_and_ask_for_no_gpu():
    plan, quantizer, pod = pods()
    (server,) = pod["containers"]
    assert (plan.engine, plan.quantization, plan.gpus) == ("VLLM", "None", 0)
    assert (quantizer["image"], server["image"]) == ("vllm:1", "vllm:1")
    assert not [name for name in server["resources"]["limits"] if "gpu" in name]
    # its processes exchange messages there: 64 MiB, which containers have unless told, can be too few
    assert "/dev/shm" in [mount["mountPath"] for mount in server["volumeMounts"]]


def test_on_gpus_the_server_alone_asks_for_them_and_runs_the_image_for_them():
    plan, quantizer, pod = pods(engine={"gpus": 2, "gpu": {"resourceName": "amd.com/gpu"}}, nodeSelector={"gpu": "yes"})
    (server,) = pod["containers"]
    assert plan.gpus == 2
    assert (quantizer["image"], server["image"]) == ("vllm-gpu:1", "vllm-gpu:1")
    assert server["resources"]["limits"]["amd.com/gpu"] == server["resources"]["requests"]["amd.com/gpu"] == "2"
    assert not [name for name in quantizer["resources"]["limits"] if "gpu" in name]
    assert pod["nodeSelector"] == {"gpu": "yes"}


def test_the_image_of_the_spec_comes_first():
    for engine in ({}, {"gpus": 1}):
        assert pods(engine=engine, image="mine:1")[2]["containers"][0]["image"] == "mine:1"


@pytest.mark.parametrize(("engine", "setting"), [({}, "vllmImage"), ({"gpus": 1}, "vllmGpuImage")])
def test_an_operator_without_an_image_for_it_says_which_setting_is_missing(engine, setting):
    assert setting in image_missing(deployment(engine=engine), make.CONFIG).message
    assert image_missing(deployment(engine=engine), CONFIG) is None
    assert image_missing(deployment(engine=engine, image="mine:1"), make.CONFIG) is None
    assert image_missing(ModelDeployment.model_validate(make.modeldeployment()), make.CONFIG) is None


def test_gpus_make_another_revision_and_their_absence_makes_none():
    plain, spelled, gpus = (
        template_of(deployment(engine=engine), SOURCE, CONFIG)
        for engine in ({}, {"gpus": 0, "gpu": {"resourceName": "amd.com/gpu"}}, {"gpus": 1})
    )
    assert plain.hash == spelled.hash != gpus.hash


def test_the_first_adapter_makes_a_revision_and_others_come_and_go():
    plain, one, two = (
        template_of(deployment(adapters=[{"name": it, "uri": f"s3://a/{it}"} for it in names]), SOURCE, CONFIG)
        for names in ("", "a", "ab")
    )
    assert plain.hash != one.hash == two.hash
    assert (plain.plan.lora, one.plan.lora) == (False, True)
    # llama.cpp loads them whenever they come
    llama = ModelDeployment.model_validate(make.modeldeployment(adapters=[{"name": "a", "uri": "s3://a/a"}]))
    assert not template_of(llama, SOURCE, make.CONFIG).plan.lora


def test_it_serves_texts_and_is_never_chosen_unasked():
    assert EngineType.VLLM in engines_of(Task.CHAT_SFT)
    assert engines_of(Task.CHAT_SFT)[0] is EngineType.LLAMA_CPP
    assert EngineType.VLLM not in engines_of(Task.SEQUENCE_CLASSIFICATION)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"engine": {"type": "LlamaCpp", "gpus": 1}}, "engine.gpus is for engine.type VLLM"),
        ({"engine": {"gpus": 1}}, "engine.gpus is for engine.type VLLM"),
        ({"engine": {"type": "VLLM"}, "quantization": {"method": "Q8_0"}}, "engine.type VLLM takes quantization.method None"),
        ({"engine": {"type": "VLLM", "gpus": 65}}, "64"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_at_admission(spec, words):
    (complaint,) = refusals(make.modeldeployment(**spec), ModelDeployment)
    assert words in complaint


@pytest.mark.parametrize("spec", [{"gate": {"maxSizeBytes": 1}}, {"evaluation": {"dataset": "s3://d/rows.jsonl"}}])
def test_there_is_nothing_to_compare_it_with(spec):
    assert "VLLM serves: leave them out" in cannot_be_evaluated(deployment(**spec), SOURCE).message
