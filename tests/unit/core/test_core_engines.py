"""Which engine serves what, and in which number format, where the spec leaves it open."""

import pytest

from support import make
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment, Storage
from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_api.v1alpha1.task import Task
from tunesmith_cli.refusals import refusals
from tunesmith_operator.core.modeldeployment.engines import engine_for, method_for, rehearsed_for_nothing
from tunesmith_operator.core.modeldeployment.source import SourceModel, Wanted, of_finetunejob
from tunesmith_operator.core.modeldeployment.template import template_of


def deployment(**spec):
    return ModelDeployment.model_validate(make.modeldeployment(**spec))


@pytest.mark.parametrize(
    ("engine", "method", "task", "chosen", "format_"),
    [
        ("Auto", "Auto", None, "LlamaCpp", "Q8_0"),
        ("Auto", "Auto", "ChatSFT", "LlamaCpp", "Q8_0"),
        ("Auto", "Auto", "SequenceClassification", "Transformers", "None"),
        ("Auto", "Int8", "TokenClassification", "Transformers", "Int8"),
        ("Auto", "Int8", None, "Transformers", "Int8"),
        ("Auto", "None", None, "LlamaCpp", "None"),
        ("Transformers", "Auto", None, "Transformers", "None"),
        ("Transformers", "Auto", "ChatSFT", "Transformers", "None"),
        ("LlamaCpp", "None", "DPO", "LlamaCpp", "None"),
    ],
)
def test_engine_and_method_follow_from_each_other_and_the_task(engine, method, task, chosen, format_):
    found = engine_for(EngineType(engine), QuantizationMethod(method), Task(task) if task else None)
    assert (found, method_for(QuantizationMethod(method), found)) == (chosen, format_)


def test_the_plan_and_the_artefact_name_what_was_chosen():
    text, classes = (
        template_of(deployment(), SourceModel("s3://m/x", "d", Storage(), task), make.CONFIG)
        for task in (Task.CHAT_SFT, Task.SEQUENCE_CLASSIFICATION)
    )
    assert (text.plan.engine, text.plan.quantization) == ("LlamaCpp", "Q8_0")
    assert (classes.plan.engine, classes.plan.quantization) == ("Transformers", "None")


def test_writing_down_what_auto_chose_makes_no_revision():
    source = SourceModel("s3://m/x", "d", Storage(), Task.CHAT_SFT)
    chosen = template_of(deployment(), source, make.CONFIG)
    named = template_of(deployment(engine={"type": "LlamaCpp"}, quantization={"method": "Q8_0"}), source, make.CONFIG)
    assert named.hash == chosen.hash
    other = template_of(deployment(engine={"type": "Transformers"}), source, make.CONFIG)
    assert other.hash != chosen.hash


@pytest.mark.parametrize("engine", [it for it in EngineType if it is not EngineType.AUTO])
def test_admission_says_which_methods_an_engine_takes(engine):
    for method in QuantizationMethod:
        spec = make.modeldeployment(engine={"type": engine.value}, quantization={"method": method.value})
        complaints = refusals(spec, ModelDeployment)
        if method is QuantizationMethod.AUTO or method in ENGINE_METHODS[engine]:
            assert complaints == []
        else:
            (complaint,) = complaints
            assert f"engine.type {engine} takes quantization.method" in complaint


def test_every_method_is_read_by_an_engine():
    read = {method for methods in ENGINE_METHODS.values() for method in methods}
    assert read == set(QuantizationMethod) - {QuantizationMethod.AUTO}


@pytest.mark.parametrize(
    ("task", "engine", "method", "words"),
    [
        ("SequenceClassification", "LlamaCpp", "Auto", "set spec.engine.type: Transformers, or leave it out"),
        (
            "SequenceClassification",
            "Auto",
            "Q8_0",
            "set spec.quantization.method to one of None, Int8, Int8Dynamic, NF4",
        ),
        ("Reward", "Transformers", "Auto", "no engine can serve"),
    ],
)
def test_a_job_that_the_engine_cannot_serve_is_refused_with_the_remedy(task, engine, method, words):
    job = FineTuneJob.model_validate(make.finetunejob(task=task))
    absent = of_finetunejob("a", "ml", job, None, None, Wanted(EngineType(engine), QuantizationMethod(method)))
    assert absent.reason == "ModelInvalid"
    assert words in absent.message


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "ImageClassification", "MaskedLM"])
def test_classifiers_and_encoders_are_waited_for(task):
    job = FineTuneJob.model_validate(make.finetunejob(task=task))
    assert of_finetunejob("a", "ml", job, None).reason == "SourceNotReady"


def trained(qat: dict | None = None, **model) -> FineTuneJob:
    job = make.finetunejob(task="ChatSFT", method={"type": "Full", **({"qat": qat} if qat is not None else {})})
    model = {"uri": "s3://models/sentiment", "digest": "d" * 64, **model}
    job["status"] = {
        "model": model,
        "conditions": [
            {"type": "Succeeded", "status": "True", "reason": "Succeeded", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        ],
    }
    return FineTuneJob.model_validate(job)


@pytest.mark.parametrize(
    ("qat", "method"),
    [({"scheme": "Int8"}, "Q8_0"), ({"scheme": "Int4"}, "Q4_0"), ({"scheme": "Int4", "groupSize": 64}, None)],
)
def test_quantization_aware_training_rehearses_a_served_format_or_none(qat, method):
    assert trained(qat).spec.method.qat.rehearses == method


def test_a_model_is_served_in_the_format_that_it_rehearsed_unless_the_spec_names_another():
    source = of_finetunejob("f", "ml", trained(rehearsed="Q4_0"), None)
    assert template_of(deployment(), source, make.CONFIG).plan.quantization == "Q4_0"
    named = template_of(deployment(quantization={"method": "Q6_K"}), source, make.CONFIG)
    assert named.plan.quantization == "Q6_K"
    slower = template_of(deployment(engine={"type": "Transformers"}), source, make.CONFIG)
    assert slower.plan.quantization == "None"
    plain = of_finetunejob("f", "ml", trained(), None)
    assert template_of(deployment(), plain, make.CONFIG).plan.quantization == "Q8_0"


def test_of_a_result_that_is_pinned_and_was_replaced_the_format_is_not_known():
    pinned = of_finetunejob("f", "ml", trained(rehearsed="Q4_0"), None, digest="e" * 64)
    assert pinned.rehearsed is None
    assert of_finetunejob("f", "ml", trained(rehearsed="Q4_0"), None, digest="d" * 64).rehearsed == "Q4_0"


@pytest.mark.parametrize(
    ("asked", "engine", "words"),
    [
        ("Auto", "LlamaCpp", None),
        ("Q4_0", "LlamaCpp", None),
        ("Q8_0", "LlamaCpp", "is served as Q8_0: set quantization.method: Q4_0, or leave it out"),
        ("Auto", "Transformers", "is served as None: engine Transformers can't read that; engine.type: LlamaCpp can"),
    ],
)
def test_another_format_than_the_rehearsed_one_is_remarked_on(asked, engine, words):
    remark = rehearsed_for_nothing(QuantizationMethod(asked), EngineType(engine), QuantizationMethod.Q4_0)
    assert (remark is None) if words is None else words in remark
    assert rehearsed_for_nothing(QuantizationMethod(asked), EngineType(engine), None) is None


def test_a_job_whose_model_reads_images_is_refused_for_serving():
    found = of_finetunejob("f", "ml", trained(readsImages=True), None)
    assert "has trained a model that reads images, which no engine serves" in found.message
