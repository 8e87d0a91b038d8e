"""manifests/samples has one for whatever can be asked for, and those that belong together fit."""

from pathlib import Path

import pytest

from support import make
from tunesmith_api import keys
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment
from tunesmith_api.v1alpha1.engine import ENGINE_METHODS, EngineType
from tunesmith_api.v1alpha1.method import MethodType
from tunesmith_api.v1alpha1.rollout import RolloutStrategy
from tunesmith_api.v1alpha1.task import Task
from tunesmith_cli.kubernetes_yaml import parsed
from tunesmith_operator.core.modeldeployment.calibration import cannot_be_calibrated
from tunesmith_operator.core.modeldeployment.heldout import cannot_be_evaluated
from tunesmith_operator.core.modeldeployment.source import SourceModel, Wanted, of_finetunejob

ROOT = Path(__file__).resolve().parents[2]
FILES = [*(ROOT / "manifests/samples").glob("*.yaml"), *(ROOT / "manifests/argocd/train-and-deploy").glob("*.yaml")]
DOCUMENTS = {path: parsed(path.read_text())[0] for path in sorted(FILES)}


def of_kind(model, kind):
    return {path: model.model_validate(it) for path, it in DOCUMENTS.items() if it["kind"] == kind}


JOBS = of_kind(FineTuneJob, keys.FINETUNEJOB_KIND)
DEPLOYMENTS = of_kind(ModelDeployment, keys.MODELDEPLOYMENT_KIND)
METHODS = [job.spec.method for job in JOBS.values()]
SERVED = [it.spec for it in DEPLOYMENTS.values()]


@pytest.mark.parametrize(
    ("possible", "shown"),
    [
        (Task, {job.spec.task for job in JOBS.values()}),
        (MethodType, {method.type for method in METHODS}),
        (("qat", "pruning", "distillation"), {it for one in METHODS for it in one.model_fields_set}),
        (RolloutStrategy, {spec.rollout.strategy for spec in SERVED}),
        (EngineType, {spec.engine.type for spec in SERVED}),
    ],
    ids=["tasks", "methods", "what else a method can do", "rollouts", "engines"],
)
def test_each_has_a_sample(possible, shown):
    assert set(possible) - shown == set()


def test_each_number_format_is_named_in_a_sample():
    text = "".join(path.read_text() for path in DEPLOYMENTS)
    assert [it for methods in ENGINE_METHODS.values() for it in methods if it.value not in text] == []


def test_each_sample_of_a_deployment_can_serve_what_the_sample_of_its_job_makes():
    jobs = {job.metadata.name: job for job in JOBS.values()}
    named = [it for it in DEPLOYMENTS.values() if it.spec.source.fine_tune_job_ref is not None]
    assert len(named) >= 4
    model = {"uri": "s3://models/tuned", "digest": make.DIGEST}
    ended = [{"type": "Succeeded", "status": "True", "reason": "Completed", "lastTransitionTime": make.stamp()}]
    for deployment in named:
        spec = deployment.spec
        job = jobs[spec.source.fine_tune_job_ref.name]
        done = FineTuneJob.model_validate(
            {**job.model_dump(by_alias=True), "status": {"model": model, "conditions": ended}}
        )
        wanted = Wanted(spec.engine.type, spec.quantization.method)
        source = of_finetunejob(job.metadata.name, "ml", done, spec.storage, None, wanted)
        assert isinstance(source, SourceModel), source
        assert cannot_be_evaluated(deployment, source) is None
        assert cannot_be_calibrated(deployment, source) is None
