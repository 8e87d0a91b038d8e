"""What a FineTuneJob knows of its model decides how it is quantized, through both kinds' own reconciliation."""

from support import make
from support.begun import condition, edit
from support.world import World
from tunesmith_api.keys import MODELDEPLOYMENT_KIND
from tunesmith_api.plan import CalibrationPlan, ServingPlan


def trained(job: dict | None = None, model: dict | None = None, **spec) -> World:
    """A FineTuneJob that has succeeded, and a ModelDeployment of it."""
    world = World()
    world.cluster.put(make.finetunejob(name="tune", **(job or {})))
    source = {"uri": None, "fineTuneJobRef": {"name": "tune"}}
    world.cluster.put(make.modeldeployment(source=source, storage=None, **spec))
    world.reconcile()
    done = make.succeeded()
    world.ends(world.pod("tune-1", 0), 0, done.model_copy(update={"model": done.model.model_copy(update=model or {})}))
    world.job_is("tune-1", "Complete")
    world.reconcile()
    return world


def planned(world: World, revision: str = "r1") -> ServingPlan:
    return ServingPlan.from_json(world.cluster.get("ConfigMap", f"sentiment-{revision}")["data"]["plan.json"])


def test_what_training_rehearsed_is_served_and_another_format_is_remarked_on():
    world = trained(model={"rehearsed": "Q4_0"})
    assert planned(world).quantization == "Q4_0"
    assert condition(world, "Accepted") == ("True", "Valid", "The spec is valid.")
    edit(world, quantization={"method": "Q6_K"})
    assert planned(world, "r2").quantization == "Q6_K"
    status, _, message = condition(world, "Accepted")
    assert status == "True"
    assert "has rehearsed Q4_0 (method.qat of its FineTuneJob) and is served as Q6_K" in message


def test_a_model_that_reads_images_is_refused_before_anything_is_quantized():
    world = trained(model={"reads_images": True})
    status, reason, message = condition(world, "Ready")
    assert (status, reason) == ("False", "ModelInvalid")
    assert "reads images, which no engine serves" in message
    assert world.cluster.get("Job", "sentiment-r1-quantize") is None


def test_calibration_takes_the_training_rows_and_says_where_it_can_not():
    job = {"dataset": {"train": {"uri": "s3://data/train.jsonl"}, "columns": {"messages": "turns"}}}
    world = trained(job, quantization={"method": "Q4_0", "calibration": {"maxExamples": 9}, "ignore": ["lm_head"]})
    plan = planned(world)
    assert plan.calibration == CalibrationPlan(uri="s3://data/train.jsonl", messages_field="turns", max_examples=9)
    assert plan.ignore == ("lm_head",)
    edit(world, quantization={"method": "Q4_0", "calibration": {"dataset": "s3://data/x.csv"}})
    assert condition(world, "Accepted")[:2] == ("False", "InvalidSpec")
    assert "is no JSON Lines" in condition(world, "Accepted")[2]
    assert world.status(MODELDEPLOYMENT_KIND)["phase"] == "Quantizing", "what was accepted goes on"


def test_a_classifiers_held_out_rows_are_those_of_its_job_by_the_names_of_their_columns():
    columns = {"text": "body", "label": "kind"}
    job = {"task": "SequenceClassification", "dataset": {"eval": {"uri": "s3://data/e.jsonl"}, "columns": columns}}
    world = trained(job, quantization={"method": "Int8"}, gate={"maxAccuracyDropPercent": 1})
    evaluation = planned(world).evaluation
    assert (evaluation.uri, evaluation.text_field, evaluation.label_field) == ("s3://data/e.jsonl", "body", "kind")
    other = trained({"task": "TokenClassification"}, gate={"maxSizeBytes": 1})
    assert "compare language models and classifiers of texts" in condition(other, "Accepted")[2]
