"""Small pure pieces: text, conditions, manifests, plans, children, policies, revisions' templates."""

import json

import pytest
from pydantic import ValidationError

from support import make
from tunesmith_api import keys
from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_api.v1alpha1 import FineTuneJob, FineTuneJobStatus, ModelDeployment, Storage
from tunesmith_operator.core import text
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.finetunejob.policies import violation
from tunesmith_operator.core.finetunejob.training_plan import training_plan
from tunesmith_operator.core.modeldeployment.children import (
    config_map,
    network_policy,
    quantize_job,
    server_deployment,
)
from tunesmith_operator.core.modeldeployment.policies import violation as deployment_violation
from tunesmith_operator.core.modeldeployment.source import SourceAbsent, SourceModel, of_finetunejob
from tunesmith_operator.core.modeldeployment.template import template_of
from tunesmith_operator.core.status.conditions import FALSE, TRUE, UNKNOWN, Finding, merge
from tunesmith_operator.core.status.transitions import differs, is_urgent, transitions, with_apply_failure


def job(**spec):
    raw = make.finetunejob(**spec)
    raw["metadata"]["uid"] = "0123456789"
    return FineTuneJob.model_validate(raw)


def deployment(**spec):
    return ModelDeployment.model_validate(make.modeldeployment(**spec))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (45, "45s"), (59.6, "1m"), (185, "3m"), (3600, "1h"), (3900, "1h5m"), (90000, "1d1h"), (-5, "0s")],
)
def test_durations_are_short(seconds, shown):
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"), [(0.41234, "0.412"), (12.5, "12.500"), (2.1e-5, "2.1e-05"), (0.0, "0.000")]
)
def test_losses_fit_a_column(value, shown):
    assert text.loss(value) == shown


@pytest.mark.parametrize(
    ("quantity", "value"), [("500m", 0.5), ("2", 2.0), ("1.5", 1.5), ("3Gi", 3 * 2**30), ("1k", 1000)]
)
def test_quantities_are_numbers(quantity, value):
    assert text.cores(quantity) == value


def test_a_condition_keeps_its_time_until_its_status_changes():
    first = merge([], [Finding("A", TRUE, Reason.VALID, "x")], make.at(0), 1)
    second = merge(first, [Finding("A", TRUE, Reason.APPLIED, "y")], make.at(10), 2)
    third = merge(second, [Finding("A", FALSE, Reason.APPLIED, "y")], make.at(20), 2)
    assert [it[0].last_transition_time for it in (first, second, third)] == [
        make.stamp(0),
        make.stamp(0),
        make.stamp(20),
    ]
    assert second[0].reason == "Applied"
    assert second[0].observed_generation == 2


def test_a_condition_of_another_type_stays_and_a_long_message_is_cut():
    first = merge([], [Finding("A", TRUE, Reason.VALID)], make.at(0), 1)
    second = merge(first, [Finding("B", TRUE, Reason.VALID, "x" * 9999)], make.at(1), 1)
    assert [it.type for it in second] == ["A", "B"]
    assert len(second[1].message) == 2048


def test_events_tell_transitions_only():
    old = merge([], [Finding("S", UNKNOWN, Reason.TRAINING, "a")], make.at(0), 1)
    same = merge(old, [Finding("S", UNKNOWN, Reason.TRAINING, "b")], make.at(1), 1)
    moved = merge(old, [Finding("S", UNKNOWN, Reason.RESTARTING, "c")], make.at(1), 1)
    assert transitions("S", old, same, ()) == ()
    (note,) = transitions("S", old, moved, ())
    assert (note.type, note.reason, note.message) == ("Warning", "Restarting", "c")
    assert transitions("S", old, moved, {Reason.RESTARTING}) == ()


def test_a_heartbeat_is_no_difference_and_a_step_is_one_that_can_wait():
    def status(**progress):
        return FineTuneJobStatus.model_validate({"phase": "Training", "progress": progress})

    assert not differs(status(lastHeartbeatTime=make.stamp(0)), status(lastHeartbeatTime=make.stamp(9)))
    assert differs(status(globalStep=1), status(globalStep=2))
    assert not is_urgent(status(globalStep=1), status(globalStep=2))
    known = [Finding("Succeeded", UNKNOWN, Reason.STARTING), Finding("WorkersReady", FALSE, Reason.WORKERS_MISSING)]
    before = FineTuneJobStatus(conditions=merge([], known, make.at(0), 1))

    def after(finding):
        return FineTuneJobStatus(conditions=merge(before.conditions, [finding], make.at(1), 1))

    assert not is_urgent(before, after(Finding("WorkersReady", TRUE, Reason.WORKERS_READY)))
    assert not is_urgent(before, after(Finding("Succeeded", UNKNOWN, Reason.PENDING)))
    assert is_urgent(before, after(Finding("Succeeded", UNKNOWN, Reason.TRAINING)))


def test_that_all_is_well_at_the_beginning_is_not_urgent():
    before = FineTuneJobStatus.model_validate(FineTuneJob.model_json_schema()["properties"]["status"]["default"])
    well = [
        Finding("Accepted", TRUE, Reason.VALID),
        Finding("ChildrenApplied", TRUE, Reason.APPLIED),
        Finding("Succeeded", UNKNOWN, Reason.STARTING),
    ]

    def after(*findings, **fields):
        return FineTuneJobStatus(conditions=merge(before.conditions, findings, make.at(0), 1), **fields)

    begun = after(*well, observed_generation=1, start_time=make.stamp(), attempts=[{"number": 1, "job_name": "a"}])
    assert differs(before, begun)
    assert not is_urgent(before, begun)
    assert is_urgent(before, after(*well[:2], Finding("Succeeded", UNKNOWN, Reason.UNSCHEDULABLE)))
    assert is_urgent(before, after(*well, Finding("ChildrenApplied", FALSE, Reason.APPLY_FAILED)))
    assert is_urgent(begun, begun.model_copy(update={"observed_generation": 2})), "an edit was carried out"


def test_that_training_begins_is_an_event_after_trouble_only():
    def told(reason):
        known = merge([], [Finding("S", UNKNOWN, reason)], make.at(0), 1)
        begun = merge(known, [Finding("S", UNKNOWN, Reason.TRAINING)], make.at(1), 1)
        return [note.reason for note in transitions("S", known, begun, {Reason.PENDING, Reason.STARTING})]

    assert told(Reason.PENDING) == told(Reason.STARTING) == []
    assert told(Reason.RESTARTING) == told(Reason.STORAGE_UNREACHABLE) == told(Reason.JOB_DELETED) == ["Training"]


def test_a_refused_child_keeps_the_generation_and_of_a_start_nothing():
    before = FineTuneJobStatus(observed_generation=3)
    planned = FineTuneJobStatus(observed_generation=4, start_time=make.stamp(0), restarts=2)
    starting = with_apply_failure(before, planned, True, "Succeeded", "Job x: no", make.at(0), 4)
    assert (starting.observed_generation, starting.start_time, starting.restarts) == (3, None, 0)
    assert {it.type: it.reason for it in starting.conditions} == {
        "ChildrenApplied": "ApplyFailed",
        "Succeeded": "ApplyFailed",
    }
    running = with_apply_failure(before, planned, False, "Succeeded", "Service x: no", make.at(0), 4)
    assert (running.observed_generation, running.restarts) == (3, 2)


def test_a_plan_has_every_number_resolved():
    plan = training_plan(job(training={"learningRate": 2e-5, "warmupRatio": 0.1}), 1)
    assert plan.training.learning_rate == 2e-5
    assert plan.training.warmup_ratio == 0.1
    assert plan.training.early_stopping is None
    assert plan.loss_spike_factor == 4.0
    assert plan.cpus_per_worker == 1.0
    assert plan.head_host == "sentiment-1-0.sentiment-workers"
    assert plan.tokens_uri == "s3://checkpoints/sentiment/tokens"


def test_a_plan_carries_the_parts_of_the_spec_as_they_are():
    spec = {
        "task": "SequenceClassification", "classification": {"labels": ["bad", "good"]},
        "method": {"type": "DoRA", "lora": {"r": 4}}, "dataset": {"splitPercent": 5, "columns": {"text": "tweet"}},
        "huggingFace": {"endpointURL": "http://hub.local"}, "output": {"save": "Both", "dtype": "BF16", "overwrite": True},
        "parallelism": {"strategy": "FSDP", "tensorParallel": 2}, "tracking": {"tensorBoard": True},
    }  # fmt: skip
    wanted = job(**spec)
    plan = training_plan(wanted, 1)
    assert (plan.dataset, plan.method, plan.classification) == (
        wanted.spec.dataset, wanted.spec.method, wanted.spec.classification,
    )  # fmt: skip
    assert (plan.strategy, plan.tensor_parallel, plan.save, plan.output_dtype) == ("FSDP", 2, "Both", "BF16")
    assert plan.output_overwrite
    assert plan.hub_endpoint_url == "http://hub.local"
    assert plan.tracking.tensor_board
    assert type(plan).from_json(plan.to_json()) == plan


def test_workloads_pass_the_restricted_standard_and_hold_no_secrets_in_plain_text():
    children = build(job(), make.CONFIG, 1)
    made = template_of(deployment(), SourceModel("s3://models/sentiment", "", Storage()), make.CONFIG)
    for manifest in (children.job, server_deployment(made, 1, 1, make.CONFIG)):
        pod = manifest.body["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            secret = [it for it in container["env"] if it["name"].startswith(("AWS_", "RAY_AUTH_TOKEN"))]
            assert all("value" not in it for it in secret)
    assert "data" not in children.secret.body


def test_progress_is_open_to_the_operators_namespace_only():
    policy = build(job(), make.CONFIG, 1).network_policy.body["spec"]
    siblings, operator = policy["ingress"]
    assert siblings["from"][0]["podSelector"]["matchLabels"] == {keys.LABEL_FINETUNEJOB: "sentiment"}
    home = {"kubernetes.io/metadata.name": "tunesmith-system"}
    assert operator["from"] == [{"namespaceSelector": {"matchLabels": home}}]
    assert operator["ports"][0]["port"] == keys.PORT_PROGRESS


def served(**spec):
    """The template of a deployment, and the spec of its server pods."""
    made = template_of(deployment(**spec), SourceModel("s3://models/m", "d", Storage()), make.CONFIG)
    return made, server_deployment(made, 1, 1, make.CONFIG).body["spec"]["template"]["spec"]


def test_the_health_port_of_servers_is_open_to_the_operators_namespace_only():
    everyone, operator = network_policy(deployment(), make.CONFIG).body["spec"]["ingress"]
    assert everyone == {"ports": [{"port": keys.PORT_SERVER, "protocol": "TCP"}]}
    assert operator["ports"] == [{"port": keys.PORT_HEALTH, "protocol": "TCP"}]
    (source,) = operator["from"]
    assert source["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": make.CONFIG.operator_namespace}


def test_api_keys_are_mounted_as_files_that_may_be_missing():
    _, plain = served()
    assert not [it for it in plain["volumes"] if "secret" in it]
    made, pod = served(api={"keysSecretRef": {"name": "clients"}})
    (volume,) = [it for it in pod["volumes"] if "secret" in it]
    # a pod that waits for a volume says nothing in its status: this one starts, and says that it has no keys
    assert volume["secret"] == {"secretName": "clients", "optional": True}
    (mount,) = [it for it in pod["containers"][0]["volumeMounts"] if it["name"] == volume["name"]]
    assert (mount["mountPath"], mount["readOnly"]) == (keys.API_KEYS_DIRECTORY, True)
    assert "clients" not in json.dumps(pod["containers"][0]["env"])
    assert made.hash != served()[0].hash
    plan = ServingPlan.from_json(config_map(made, 1).body["data"][keys.PLAN_FILE])
    assert plan.api.keys_secret_ref.name == "clients"


def test_servers_get_the_time_to_finish_that_the_spec_says():
    assert served()[1]["terminationGracePeriodSeconds"] == 60
    assert served(api={"terminationGracePeriodSeconds": 300})[1]["terminationGracePeriodSeconds"] == 300


def test_a_manifest_has_the_same_hash_until_something_in_it_changes():
    first, again = build(job(), make.CONFIG, 1), build(job(), make.CONFIG, 1)
    other = build(job(training={"seed": 7}), make.CONFIG, 1)
    assert first.config_map.hash == again.config_map.hash
    assert first.config_map.hash != other.config_map.hash
    assert first.service.hash == other.service.hash
    assert first.job.body["metadata"]["annotations"][keys.ANNOTATION_SPEC_HASH] == first.job.hash
    json.dumps(first.job.body)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"output": {"uri": "s3://checkpoints/sentiment/out"}}, "spec.checkpoint.uri"),
        ({"checkpoint": {"uri": "s3://models/base/ckpt"}}, "spec.model.uri"),
        ({"dataset": {"train": {"uri": "s3://checkpoints/sentiment/t.jsonl"}}}, "spec.dataset.train.uri"),
        ({"dataset": {"train": {"uri": "s3://data"}}, "output": {"uri": "s3://data/out"}}, "spec.dataset.train.uri"),
        ({"dataset": {"eval": {"uri": "s3://models/sentiment/eval.jsonl"}}}, "spec.dataset.eval.uri"),
        ({"dataset": {"cacheUri": "s3://models/sentiment/cache"}}, "spec.dataset.cacheUri"),
        ({"dataset": {"cacheUri": "s3://models/base"}}, "spec.model.uri"),
        ({"dataset": {"cacheUri": "hf://owner/name"}}, "spec.dataset.cacheUri"),
        (
            {"method": {"distillation": {"teacherUri": "s3://models/sentiment/teacher"}}},
            "spec.method.distillation.teacherUri",
        ),
        (
            {
                "dataset": {
                    "augmentation": {
                        "backTranslation": {"forwardUri": "hf://a/b", "backwardUri": "s3://checkpoints/sentiment/back"}
                    }
                }
            },
            "spec.dataset.augmentation.backTranslation.backwardUri",
        ),
        ({"output": {"uri": "pvc://work"}, "model": {"uri": "pvc://work/base"}}, "spec.model.uri"),
        ({"output": {"uri": "pvc://work/../models"}}, "spec.output.uri"),
        ({"storage": {"endpointURL": "http://me:secret@s3:8333"}}, "spec.storage.endpointURL"),
        ({"huggingFace": {"endpointURL": "https://me:secret@hub.example"}}, "spec.huggingFace.endpointURL"),
        (
            {"tracking": {"mlflow": {"trackingURI": "http://me:secret@mlflow:5000/a"}}},
            "spec.tracking.mlflow.trackingURI",
        ),
    ],
)
def test_policies_name_the_field(spec, words):
    assert words in violation(job(**spec)).message


def test_a_password_in_a_url_is_refused_without_repeating_it():
    message = violation(job(storage={"endpointURL": "http://me:hunter2@s3:8333"})).message
    assert "Secret" in message
    assert "hunter2" not in message
    assert violation(job(tracking={"mlflow": {"trackingURI": "file:///runs/me@home"}})) is None
    refused = deployment_violation(deployment(storage={"endpointURL": "http://me:hunter2@s3:8333"}))
    assert "spec.storage.endpointURL" in refused.message


def test_files_of_a_hub_model_that_is_called_like_a_bucket_are_no_conflict():
    assert violation(job(model={"uri": "hf://models/sentiment"}, output={"uri": "pvc://models/sentiment"})) is None


def mounts(pod):
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    (container,) = pod["containers"]
    return {
        claims[mount["name"]]["claimName"]: (mount["mountPath"], mount.get("readOnly", False), claims[mount["name"]])
        for mount in container["volumeMounts"]
        if mount["name"] in claims
    }


def test_claims_are_mounted_by_their_names_and_written_to_only_where_the_job_writes():
    long = "c" * 200
    spec = {
        "model": {"uri": f"pvc://{long}/base"}, "checkpoint": {"uri": "pvc://work/ckpt"}, "output": {"uri": "pvc://work/out"},
        "dataset": {
            "train": {"uri": "pvc://data/train.jsonl"}, "eval": {"uri": "pvc://held-out"}, "cacheUri": "pvc://cache/tokens",
            "augmentation": {"backTranslation": {"forwardUri": "pvc://mt/there", "backwardUri": "pvc://mt/back"}},
        },
        "method": {"distillation": {"teacherUri": "pvc://work/teacher"}},
    }  # fmt: skip
    found = mounts(build(job(**spec), make.CONFIG, 1).job.body["spec"]["template"]["spec"])
    assert {name: (path, read_only) for name, (path, read_only, _) in found.items()} == {
        name: (f"{keys.VOLUMES_DIRECTORY}/{name}", name not in ("work", "cache"))
        for name in ("cache", long, "data", "held-out", "mt", "work")
    }
    assert found["data"][2]["readOnly"], "a claim that allows reading by many needs this"
    assert "readOnly" not in found["work"][2]


def variables(pod):
    (container,) = pod["containers"]
    return {entry["name"]: entry for entry in container["env"]}


def test_secrets_of_hub_and_tracking_come_by_reference_and_the_trackings_may_lack_keys():
    spec = {
        "huggingFace": {"secretRef": {"name": "hub"}},
        "tracking": {"mlflow": {"trackingURI": "http://mlflow:5000", "secretRef": {"name": "mlflow"}}},
    }
    children = build(job(**spec), make.CONFIG, 1)
    found = variables(children.job.body["spec"]["template"]["spec"])
    assert found["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "HF_TOKEN"}
    for key in keys.MLFLOW_SECRET_OPTIONAL_KEYS:
        assert found[key]["valueFrom"]["secretKeyRef"] == {"name": "mlflow", "key": key, "optional": True}
    assert found[keys.ENV_VOLUMES]["value"] == keys.VOLUMES_DIRECTORY
    without = variables(build(job(), make.CONFIG, 1).job.body["spec"]["template"]["spec"])
    assert not {"HF_TOKEN", *keys.MLFLOW_SECRET_OPTIONAL_KEYS} & without.keys()


def test_neighbouring_folders_are_fine():
    assert violation(job(checkpoint={"uri": "s3://models/sentiment-checkpoints"})) is None


MODEL = SourceModel("s3://models/sentiment", "abc", Storage())


def test_revisions_differ_by_what_the_pods_are_made_of_and_not_by_replicas_or_patience():
    first = template_of(deployment(), MODEL, make.CONFIG)
    assert (
        template_of(deployment(replicas=5, rollout={"progressDeadlineSeconds": 99}), MODEL, make.CONFIG).hash
        == first.hash
    )
    for spec in (
        {"resources": {"cpu": "2"}},
        {"quantization": {"method": "None"}},
        {"image": "x:2"},
        {"engine": {"contextLength": 99}},
    ):
        assert template_of(deployment(**spec), MODEL, make.CONFIG).hash != first.hash
    assert template_of(deployment(), SourceModel(MODEL.uri, "other", Storage()), make.CONFIG).hash != first.hash


def test_artefacts_lie_below_the_model_unless_the_spec_says_where():
    assert template_of(deployment(), MODEL, make.CONFIG).artifact_uri == f"{MODEL.uri}/quantized"
    assert template_of(deployment(artifactsURI="s3://art/x/"), MODEL, make.CONFIG).artifact_uri == "s3://art/x"


def test_a_pinned_digest_is_served_whatever_the_job_makes_next():
    pinned, other = "a" * 64, "b" * 64
    done = FineTuneJobStatus(
        conditions=merge([], [Finding("Succeeded", TRUE, Reason.COMPLETED)], make.at(0), 1),
        model={"uri": MODEL.uri, "digest": other},
    )
    succeeded = job().model_copy(update={"status": done})
    assert of_finetunejob("a", "ml", succeeded, None).digest == other
    assert of_finetunejob("a", "ml", succeeded, None, pinned).digest == pinned
    running = FineTuneJobStatus(
        conditions=merge([], [Finding("Succeeded", FALSE, Reason.DIVERGED)], make.at(0), 1),
        model={"uri": MODEL.uri, "digest": other},
    )
    again = of_finetunejob("a", "ml", job().model_copy(update={"status": running}), None, pinned)
    assert (again.uri, again.digest) == (MODEL.uri, pinned)
    with pytest.raises(ValidationError):
        deployment(source={"fineTuneJobRef": {"name": "a", "digest": "sha256:abc"}})


def claims_of(manifest) -> dict[str, bool]:
    """Claim → whether it is written to."""
    pod = manifest.body["spec"]["template"]["spec"]
    found = (volume.get("persistentVolumeClaim") for volume in pod["volumes"])
    return {claim["claimName"]: not claim.get("readOnly", False) for claim in found if claim}


def test_claims_are_mounted_where_they_are_needed():
    spec = deployment(source={"uri": "pvc://models/base"}, artifactsURI="pvc://served/x")
    template = template_of(spec, SourceModel("pvc://models/base", "", Storage()), make.CONFIG)
    assert claims_of(quantize_job(template, 1, make.CONFIG)) == {"models": False, "served": True}
    assert claims_of(server_deployment(template, 1, 1, make.CONFIG)) == {"served": False}
    below = template_of(
        deployment(source={"uri": "pvc://models/base"}), SourceModel("pvc://models/base", "", Storage()), make.CONFIG
    )
    assert claims_of(quantize_job(below, 1, make.CONFIG)) == {"models": True}
    assert claims_of(server_deployment(below, 1, 1, make.CONFIG)) == {"models": False}
    assert claims_of(quantize_job(template_of(deployment(), MODEL, make.CONFIG), 1, make.CONFIG)) == {}


def test_a_model_of_the_hub_is_read_at_its_revision_with_its_token():
    hub = {"endpointURL": "https://mirror.local", "secretRef": {"name": "hub"}}
    source = {"uri": "hf://owner/name", "revision": "v1"}
    found = SourceModel("hf://owner/name", "", Storage())
    template = template_of(deployment(source=source, artifactsURI="s3://art/x", huggingFace=hub), found, make.CONFIG)
    assert (template.plan.model_revision, template.plan.hub_endpoint_url) == ("v1", "https://mirror.local")
    container = quantize_job(template, 1, make.CONFIG).body["spec"]["template"]["spec"]["containers"][0]
    token = next(it for it in container["env"] if it["name"] == "HF_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "HF_TOKEN"}
    other = template_of(
        deployment(source=source | {"revision": "v2"}, artifactsURI="s3://art/x", huggingFace=hub), found, make.CONFIG
    )
    assert other.hash != template.hash


def test_a_source_is_what_a_finetunejob_has_made():
    assert of_finetunejob("a", "ml", None, None).reason == Reason.SOURCE_NOT_FOUND
    assert isinstance(of_finetunejob("a", "ml", job(), None), SourceAbsent)
    failed = [Finding("Succeeded", FALSE, Reason.DIVERGED)]
    status = FineTuneJobStatus(conditions=merge([], failed, make.at(0), 1))
    absent = of_finetunejob("a", "ml", job().model_copy(update={"status": status}), None)
    assert "has failed (Diverged)" in absent.message


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"task": "Reward"}, "task Reward"),
        ({"task": "Seq2Seq"}, "served are those of CausalLM, ChatSFT, DPO, ImageClassification"),
        ({"output": {"save": "Adapter"}}, "output.save: Merged or Both"),
    ],
)
def test_a_job_whose_model_can_never_be_served_says_so_before_it_has_ended(spec, words):
    absent = of_finetunejob("a", "ml", job(**spec), None)
    assert absent.reason == Reason.MODEL_INVALID
    assert words in absent.message


@pytest.mark.parametrize(
    "spec",
    [{"task": "DPO"}, {"task": "CausalLM"}, {"output": {"save": "Both"}}, {"method": {"type": "Full"}, "output": {"save": "Adapter"}}],
)  # fmt: skip
def test_other_models_are_waited_for(spec):
    assert of_finetunejob("a", "ml", job(**spec), None).reason == Reason.SOURCE_NOT_READY
