"""Where pods run, what a platform asks of them, and how they reach a store of its own."""

import pytest

from support import make
from tunesmith_api import keys
from tunesmith_api.plan import TrainingPlan
from tunesmith_api.v1alpha1 import FineTuneJob, ModelDeployment, Storage
from tunesmith_operator.core.finetunejob.children import build
from tunesmith_operator.core.modeldeployment.children import server_deployment
from tunesmith_operator.core.modeldeployment.source import SourceModel
from tunesmith_operator.core.modeldeployment.template import template_of


def job(**spec):
    return FineTuneJob.model_validate(make.finetunejob(**spec))


def test_placement_reaches_the_pods():
    spec = {
        "workers": {
            "nodeSelector": {"gpu": "l4"}, "tolerations": [{"key": "gpu", "operator": "Exists"}], "gpusPerWorker": 1,
            "priorityClassName": "batch", "image": "mine:1",
        }
    }  # fmt: skip
    pod = build(job(**spec), make.CONFIG, 1).job.body["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"gpu": "l4"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert pod["priorityClassName"] == "batch"
    assert pod["containers"][0]["image"] == "mine:1"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    ("workers", "processes", "gpus"),
    [
        ({}, None, None),
        ({"gpusPerWorker": 1}, None, "1"),
        ({"processesPerWorker": 2}, "2", None),
        ({"gpusPerWorker": 8}, "8", "8"),
        ({"gpusPerWorker": 8, "processesPerWorker": 8}, "8", "8"),
    ],
)
def test_a_pod_is_told_of_its_processes_and_gets_a_gpu_for_each(workers, processes, gpus):
    children = build(job(workers={"replicas": 3, **workers}), make.CONFIG, 1)
    spec = children.job.body["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    told = [entry["value"] for entry in container["env"] if entry["name"] == keys.ENV_PROCESSES]
    assert told == ([processes] if processes else []), "Jobs of an operator that knew of one process stay as they are"
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in spec["template"]["spec"]["volumes"], (
        "as large as memory"
    )
    plan = TrainingPlan.from_json(children.config_map.body["data"][keys.PLAN_FILE])
    assert (plan.replicas, plan.processes_per_worker) == (3, int(processes or 1))
    assert plan.world_size == 3 * int(processes or 1)
    assert (spec["completions"], spec["parallelism"]) == (3, 3)


def test_a_store_of_ones_own_is_reached_as_it_wants_to_be_with_its_authorities():
    storage = {"addressingStyle": "Virtual", "caBundleRef": {"name": "corporate-ca", "key": "bundle.pem"}}
    children = build(job(storage=storage), make.CONFIG, 1)
    source = SourceModel("s3://models/m", "d", Storage.model_validate(storage))
    servers = server_deployment(
        template_of(ModelDeployment.model_validate(make.modeldeployment()), source, make.CONFIG), 1, 1, make.CONFIG
    )
    for manifest in (children.job, servers):
        pod = manifest.body["spec"]["template"]["spec"]
        (volume,) = [it for it in pod["volumes"] if it["name"] == "ca"]
        items = [{"key": "bundle.pem", "path": "ca.crt"}]
        assert volume["configMap"] == {"name": "corporate-ca", "items": items, "optional": True}
        (container,) = pod["containers"]
        assert {"name": "AWS_CA_BUNDLE", "value": "/etc/tunesmith-ca/ca.crt"} in container["env"]
        assert {"name": "ca", "mountPath": "/etc/tunesmith-ca", "readOnly": True} in container["volumeMounts"]
    assert '"addressingStyle":"Virtual"' in children.config_map.body["data"][keys.PLAN_FILE]


def test_what_a_platform_asks_of_pods_is_on_them_and_takes_nothing_of_ours_away():
    template = {
        "labels": {"team": "nlp", keys.LABEL_FINETUNEJOB: "another"},
        "annotations": {"karpenter.sh/do-not-disrupt": "true"},
        "imagePullSecrets": [{"name": "registry"}],
    }  # fmt: skip
    made = build(job(workers={"podTemplate": template}), make.CONFIG, 1).job.body["spec"]["template"]
    assert made["metadata"]["labels"].items() >= {"team": "nlp", keys.LABEL_FINETUNEJOB: "sentiment"}.items()
    assert made["metadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}
    pod = made["spec"]
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    plain = build(job(), make.CONFIG, 1).job.body["spec"]["template"]
    assert "annotations" not in plain["metadata"]
    assert "imagePullSecrets" not in plain["spec"]
