"""Children are what their manifests say, whoever has changed them; and what is somebody else's is never written."""

import pytest

from support import make
from support.world import World
from tunesmith_api.keys import FINETUNEJOB_KIND, MODELDEPLOYMENT_KIND, Reason
from tunesmith_api.reports import ModelRef, Outcome, TerminationReport
from tunesmith_operator.adapters.errors import Transient
from tunesmith_operator.core.kubernetes.workloads import JOB_FIELDS

REPAIRED = ("Warning", "Repaired")


def training() -> World:
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    world.pod("sentiment-1", 0, ready=True)
    world.pod("sentiment-1", 1, ready=True)
    world.wait(5)
    return world


def quantizing(**spec) -> World:
    world = World()
    world.cluster.put(make.modeldeployment(**spec))
    world.reconcile()
    return world


def quantize(world: World, revision: str = "r1") -> None:
    model = ModelRef(uri="s3://models/sentiment/quantized/q8_0-abc", digest="a" * 64, size_bytes=7)
    report = TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.QUANTIZED, model=model)
    world.ends(world.pod(f"sentiment-{revision}-quantize"), 0, report)
    world.job_is(f"sentiment-{revision}-quantize", "Complete")
    world.reconcile()


def serving(**spec) -> World:
    world = quantizing(**spec)
    quantize(world)
    world.rolls_out("sentiment-r1")
    world.wait(5)
    return world


def edit(world: World, kind: str = MODELDEPLOYMENT_KIND, **spec) -> None:
    world.cluster.change(kind, "sentiment", {"spec": spec})
    world.reconcile()


def own_fields(world: World, kind: str, name: str) -> dict:
    raw = world.cluster.get(kind, name)
    defaults = JOB_FIELDS if kind == "Job" else {}
    return {field: {**defaults, **raw[field]} for field in ("spec", "data") if field in raw}


OTHER_PORTS = [
    {"name": "gcs", "port": 6379, "targetPort": 6379, "protocol": "TCP"},
    {"name": "progress", "port": 9999, "targetPort": 8080, "protocol": "TCP"},
]
ONE_MORE_LABEL = {"podSelector": {"matchExpressions": [{"key": "never", "operator": "Exists"}]}}
HAND_EDITS = [
    (training, "Service", "sentiment-workers", {"spec": {"selector": {"app": "mine"}}}),
    (training, "Service", "sentiment-workers", {"spec": {"ports": OTHER_PORTS}}),
    (training, "Service", "sentiment-workers", {"spec": {"publishNotReadyAddresses": None}}),
    (training, "NetworkPolicy", "sentiment-workers", {"spec": {"ingress": [{}]}}),
    (training, "NetworkPolicy", "sentiment-workers", {"spec": ONE_MORE_LABEL}),
    (training, "ConfigMap", "sentiment-1", {"data": {"plan.json": "{}"}}),
    (training, "Job", "sentiment-1", {"spec": {"parallelism": 0}}),
    (training, "Job", "sentiment-1", {"spec": {"backoffLimit": 99}}),
    (training, "Job", "sentiment-1", {"spec": {"activeDeadlineSeconds": 60}}),
    (training, "Job", "sentiment-1", {"spec": {"suspend": True}}),
    (quantizing, "Job", "sentiment-r1-quantize", {"spec": {"suspend": True}}),
    (quantizing, "Job", "sentiment-r1-quantize", {"spec": {"parallelism": 0}}),
    (serving, "Deployment", "sentiment-r1", {"spec": {"replicas": 0}}),
    (serving, "Deployment", "sentiment-r1", {"spec": {"template": {"spec": {"containers": []}}}}),
    (serving, "Deployment", "sentiment-r1", {"spec": {"template": {"spec": {"automountServiceAccountToken": True}}}}),
    (serving, "Service", "sentiment", {"spec": {"selector": {"tunesmith.dev/revision": "r9"}}}),
    (serving, "NetworkPolicy", "sentiment", {"spec": {"policyTypes": []}}),
    (serving, "ConfigMap", "sentiment-r1", {"data": {"plan.json": "{}"}}),
    (serving, "ConfigMap", "sentiment-r1", {"data": {"template.json": None}}),
]  # fmt: skip


@pytest.mark.parametrize(("begin", "kind", "name", "change"), HAND_EDITS)
def test_what_is_changed_by_hand_is_put_right_once_and_told(begin, kind, name, change):
    world = begin()
    before, writes = own_fields(world, kind, name), len(world.cluster.writes)
    world.cluster.change(kind, name, change)
    assert own_fields(world, kind, name) != before
    world.reconcile()
    assert own_fields(world, kind, name) == before
    assert [it for it in world.cluster.writes[writes:] if not it.startswith("status")] == [f"patch {kind} {name}"]
    assert world.cluster.events.count(REPAIRED) == 1
    (note,) = [note for note in world.cluster.notes if note.reason == "Repaired"]
    assert note.message.startswith(f"{kind} {name} was changed by somebody else ({next(iter(change))}.")
    writes = len(world.cluster.writes)
    world.wait(600)
    assert world.cluster.writes[writes:] == []


NOT_OURS = [
    (training, "Service", "sentiment-workers", {"spec": {"sessionAffinity": "ClientIP"}, "metadata": {"labels": {"team": "a"}}}),
    (serving, "Service", "sentiment", {"spec": {"type": "NodePort"}}),
    (serving, "Deployment", "sentiment-r1", {"spec": {"template": {"metadata": {"annotations": {"restartedAt": "now"}}}}}),
    (serving, "ConfigMap", "sentiment-r1", {"data": {"note": "mine"}}),
]  # fmt: skip


@pytest.mark.parametrize(("begin", "kind", "name", "change"), NOT_OURS)
def test_what_the_operator_does_not_set_stays_as_others_set_it(begin, kind, name, change):
    world = begin()
    world.cluster.change(kind, name, change)
    changed, writes = world.cluster.get(kind, name), len(world.cluster.writes)
    world.wait(5)
    assert (world.cluster.get(kind, name), world.cluster.writes[writes:]) == (changed, [])


def mirrored(kind, body):
    """An admission webhook that takes images from a mirror and adds a container."""
    if kind == "Deployment":
        containers = [it for it in body["spec"]["template"]["spec"]["containers"] if it["name"] != "sidecar"]
        for container in containers:
            container["image"] = "mirror/" + container["image"].removeprefix("mirror/")
        body["spec"]["template"]["spec"]["containers"] = [*containers, {"name": "sidecar"}]
    return body


def test_what_the_api_server_makes_of_a_write_is_not_undone_again_and_again():
    world = quantizing()
    world.cluster.admit = mirrored
    quantize(world)
    world.rolls_out("sentiment-r1")
    world.wait(5)
    world.wait(600)
    assert [it for it in world.cluster.writes if "Deployment sentiment-r1" in it] == ["create Deployment sentiment-r1"]
    world.cluster.change("Deployment", "sentiment-r1", {"spec": {"replicas": 7}})
    world.reconcile()
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 1
    assert world.cluster.writes.count("patch Deployment sentiment-r1") == 1
    world.controller._store._answers.clear()
    world.wait(600)
    assert world.cluster.writes.count("patch Deployment sentiment-r1") == 2, "one write after a restart of the operator"


def test_a_repair_that_is_refused_is_told_until_it_is_made():
    world = serving()
    world.cluster.refuse = lambda write: "denied by policy" if write == "patch Service sentiment" else None
    world.cluster.change("Service", "sentiment", {"spec": {"selector": {"app": "mine"}}})
    world.reconcile()
    assert world.condition("ChildrenApplied", MODELDEPLOYMENT_KIND)[:2] == ("False", "ApplyFailed")
    assert "Service sentiment: denied by policy" in world.condition("ChildrenApplied", MODELDEPLOYMENT_KIND)[2]
    assert REPAIRED not in world.cluster.events
    world.cluster.refuse = lambda write: None
    world.wait(5)
    assert world.condition("ChildrenApplied", MODELDEPLOYMENT_KIND)[0] == "True"
    assert REPAIRED in world.cluster.events


def test_an_object_of_the_same_name_that_took_a_childs_place_is_not_patched():
    world = serving()
    world.cluster.change("Service", "sentiment", {"spec": {"selector": {"app": "mine"}}})
    patch = world.cluster.patch

    async def replaced_meanwhile(resource, namespace, name, uid, body):
        world.cluster.patch = patch
        world.cluster.objects.pop(("Service", namespace, name))
        world.cluster.put({"kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": {"mine": 1}})
        return await patch(resource, namespace, name, uid, body)

    world.cluster.patch = replaced_meanwhile
    world.reconcile()
    assert world.cluster.get("Service", "sentiment")["spec"] == {"mine": 1}


# --- what is somebody else's ---


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy", "ConfigMap", "Job"])
def test_what_somebody_else_has_under_a_childs_name_is_left_alone(kind):
    world = World()
    name = "sentiment-workers" if kind in ("Service", "NetworkPolicy") else "sentiment-1"
    theirs = world.cluster.put({"kind": kind, "metadata": {"name": name, "namespace": "ml"}, "data": {"mine": "1"}})
    world.cluster.put(make.finetunejob())
    world.reconcile()
    assert world.cluster.get(kind, name) == theirs
    status, reason, message = world.condition("ChildrenApplied")
    assert (status, reason) == ("False", "ApplyFailed")
    assert message.startswith(f"{kind} {name}: there is one of this name already, which belongs to nobody")
    assert world.cluster.get("Job", "sentiment-1") == (theirs if kind == "Job" else None)
    world.cluster.remove(kind, "ml", name)
    world.wait(5)
    assert world.condition("ChildrenApplied")[0] == "True"
    assert world.cluster.get("Job", "sentiment-1")


def test_two_kinds_whose_children_have_a_name_in_common_do_not_take_it_from_each_other():
    world = World()
    # made before its name was refused at admission
    world.cluster.put(make.modeldeployment(name="sentiment-workers"))
    world.reconcile()
    service, policy = (world.cluster.get(kind, "sentiment-workers") for kind in ("Service", "NetworkPolicy"))
    world.cluster.put(make.finetunejob())
    world.wait(5)
    assert world.cluster.get("Service", "sentiment-workers") == service
    assert world.cluster.get("NetworkPolicy", "sentiment-workers") == policy
    assert world.condition("ChildrenApplied")[2] == (
        "Service sentiment-workers: there is one of this name already, which belongs to ModelDeployment "
        "sentiment-workers and is left as it is. Give this FineTuneJob or that ModelDeployment another name"
    )
    assert world.condition("Succeeded")[:2] == ("Unknown", "ApplyFailed")
    world.cluster.remove(MODELDEPLOYMENT_KIND, "ml", "sentiment-workers")
    world.wait(5)
    assert world.cluster.get("Job", "sentiment-1")


def test_a_create_whose_answer_was_lost_is_found_again():
    world, create = World(), FakeLoss()
    world.cluster.put(make.finetunejob())
    create.on(world)
    world.reconcile()
    world.wait(5)
    assert create.lost == {"Service", "NetworkPolicy", "ConfigMap", "Secret", "Job"}
    assert world.condition("ChildrenApplied")[0] == "True"
    made = [write for write in world.cluster.writes if write.startswith("create")]
    assert len(made) == len(set(made)) == 5


class FakeLoss:
    """The first create of each kind takes effect, and its answer is lost; the watch is silent about it for a while."""

    def __init__(self):
        self.lost = set()

    def on(self, world):
        create = world.cluster.create

        async def lossy(resource, namespace, body):
            made = await create(resource, namespace, body)
            if resource.kind not in self.lost:
                self.lost.add(resource.kind)
                raise Transient("timed out")
            return made

        world.cluster.create = lossy


def test_a_child_whose_labels_were_taken_away_is_found_and_gets_them_back():
    world = serving()
    world.cluster.change("Service", "sentiment", {"metadata": {"labels": {"tunesmith.dev/modeldeployment": None}}})
    world.reconcile()
    labels = world.cluster.get("Service", "sentiment")["metadata"]["labels"]
    assert labels["tunesmith.dev/modeldeployment"] == "sentiment"
    assert world.condition("ChildrenApplied", MODELDEPLOYMENT_KIND)[0] == "True"


# --- the Ray token ---

SECRET = "sentiment-1-ray-uid-1"


def test_the_job_is_made_only_after_its_secret_and_a_conflict_is_no_success():
    world = World()
    create = world.cluster.create

    async def busy(resource, namespace, body):
        if resource.kind == "Secret":
            raise Transient('Operation cannot be fulfilled on resourcequotas "q": the object has been modified')
        return await create(resource, namespace, body)

    world.cluster.create = busy
    world.cluster.put(make.finetunejob())
    world.reconcile()
    assert world.cluster.get("Job", "sentiment-1") is None
    assert "Secret sentiment-1-ray-uid-1: Operation cannot be fulfilled" in world.condition("ChildrenApplied")[2]
    world.cluster.create = create
    world.wait(5)
    assert world.cluster.get("Secret", SECRET)
    assert world.cluster.get("Job", "sentiment-1")


def lacks_secret(world: World, index: int, suffix: str = "") -> str:
    waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": f'secret "{SECRET}" not found'}}
    containers = [{"name": "trainer", "image": "i", "state": waiting}]
    return world.pod("sentiment-1", index, suffix, phase="Pending", containerStatuses=containers)


def test_a_secret_that_is_lost_before_the_pods_start_is_made_again():
    world = World()
    world.cluster.put(make.finetunejob())
    world.reconcile()
    job = world.cluster.get("Job", "sentiment-1")
    world.cluster.remove("Secret", "ml", SECRET)
    lacks_secret(world, 0)
    lacks_secret(world, 1)
    world.wait(5)
    assert world.cluster.get("Secret", SECRET)
    assert world.cluster.get("Job", "sentiment-1")["metadata"]["uid"] == job["metadata"]["uid"]
    assert "the operator makes it again" in world.condition("Succeeded")[2]


def test_a_secret_that_is_lost_while_pods_run_with_it_is_made_again_for_all_of_them():
    world = training()
    job = world.cluster.get("Job", "sentiment-1")
    world.cluster.remove("Secret", "ml", SECRET)
    world.cluster.remove("Pod", "ml", "sentiment-1-1-x")
    lacks_secret(world, 1, "b")
    world.wait(5)
    assert world.cluster.get("Secret", SECRET)
    again = world.cluster.get("Job", "sentiment-1")
    assert again["metadata"]["uid"] != job["metadata"]["uid"]
    assert world.status()["restarts"] == 1


# --- edits of the spec ---


def test_bounds_that_are_changed_after_the_start_are_carried_out_on_the_job():
    world = training()
    edit(world, FINETUNEJOB_KIND, activeDeadlineSeconds=3600, failurePolicy={"backoffLimit": 9})
    spec = world.cluster.get("Job", "sentiment-1")["spec"]
    assert (spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (3600, 9)
    assert world.status()["observedGeneration"] == 2
    assert REPAIRED not in world.cluster.events, "nobody else has changed anything"
    edit(world, FINETUNEJOB_KIND, activeDeadlineSeconds=None)
    assert "activeDeadlineSeconds" not in world.cluster.get("Job", "sentiment-1")["spec"]


def test_the_verdict_quotes_the_bounds_that_the_job_had():
    for change, reason, quoted in (
        ({"activeDeadlineSeconds": 3600}, "DeadlineExceeded", "activeDeadlineSeconds (1m)"),
        ({"failurePolicy": {"backoffLimit": 50}}, "BackoffLimitExceeded", "gave up after 3 retries"),
    ):
        world = World()
        world.cluster.put(make.finetunejob(activeDeadlineSeconds=60))
        world.reconcile()
        world.ends(world.pod("sentiment-1", 0), 1)
        world.job_is("sentiment-1", "Failed", reason)
        edit(world, FINETUNEJOB_KIND, **change)
        assert quoted in world.condition("Succeeded")[2]


INVALID = {"engine": {"contextLength": 1_048_576, "parallelRequests": 64}}


def test_an_edit_that_is_refused_leaves_what_serves_true_and_in_repair():
    world = serving(replicas=2)
    edit(world, **INVALID)
    assert world.condition("Accepted", MODELDEPLOYMENT_KIND)[:2] == ("False", "InvalidSpec")
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[:2] == ("True", "ReplicasAvailable")
    assert world.status(MODELDEPLOYMENT_KIND)["observedGeneration"] == 1
    before = own_fields(world, "Deployment", "sentiment-r1")
    world.cluster.remove("Deployment", "ml", "sentiment-r1")
    world.wait(5)
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[:2] == ("False", "ReplicasUnavailable")
    assert own_fields(world, "Deployment", "sentiment-r1") == before
    world.rolls_out("sentiment-r1", available=1)
    world.wait(5)
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[0] == "Unknown"
    assert world.status(MODELDEPLOYMENT_KIND)["display"]["ready"] == "1/2"
    edit(world, replicas=3)
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 3
    world.cluster.change("Service", "sentiment", {"spec": {"selector": {"app": "mine"}}})
    world.reconcile()
    assert "app" not in world.cluster.get("Service", "sentiment")["spec"]["selector"]
    assert REPAIRED in world.cluster.events
    assert len(world.status(MODELDEPLOYMENT_KIND)["revisions"]) == 1
    edit(world, engine={"contextLength": 4096, "parallelRequests": 1})
    assert world.condition("Accepted", MODELDEPLOYMENT_KIND)[0] == "True"
    assert world.status(MODELDEPLOYMENT_KIND)["latestRevision"] == "sentiment-r2"


def test_a_rollout_under_way_goes_on_when_the_next_edit_is_refused():
    world = quantizing()
    edit(world, **INVALID)
    quantize(world)
    assert world.cluster.get("Deployment", "sentiment-r1")
    world.rolls_out("sentiment-r1")
    world.wait(5)
    assert world.condition("Ready", MODELDEPLOYMENT_KIND)[:2] == ("True", "ReplicasAvailable")
    assert world.condition("Accepted", MODELDEPLOYMENT_KIND)[0] == "False"


def test_what_serves_is_repaired_though_its_source_is_gone():
    world = World()
    world.cluster.put(make.finetunejob(name="tune"))
    world.cluster.put(make.modeldeployment(source={"uri": None, "fineTuneJobRef": {"name": "tune"}}, storage=None))
    world.reconcile()
    world.ends(world.pod("tune-1", 0), 0, make.succeeded())
    world.job_is("tune-1", "Complete")
    world.reconcile()
    quantize(world)
    world.rolls_out("sentiment-r1")
    world.wait(5)
    before = own_fields(world, "Deployment", "sentiment-r1")
    world.cluster.remove(FINETUNEJOB_KIND, "ml", "tune")
    world.cluster.remove("Deployment", "ml", "sentiment-r1")
    world.wait(5)
    assert own_fields(world, "Deployment", "sentiment-r1") == before


def test_the_revision_that_answers_is_repaired_while_a_newer_one_is_on_its_way():
    world = serving()
    before = own_fields(world, "Deployment", "sentiment-r1")
    edit(world, resources={"memory": "8Gi"})
    world.cluster.change("Deployment", "sentiment-r1", {"spec": {"template": {"spec": {"containers": []}}}})
    world.reconcile()
    assert own_fields(world, "Deployment", "sentiment-r1") == before
    world.cluster.remove("Deployment", "ml", "sentiment-r1")
    world.wait(5)
    assert own_fields(world, "Deployment", "sentiment-r1") == before


def test_a_revision_of_an_older_operator_without_a_template_is_left_as_it_is_but_scaled():
    world = serving()
    config_map = world.cluster.get("ConfigMap", "sentiment-r1")
    del config_map["data"]["template.json"]
    config_map["metadata"]["annotations"]["tunesmith.dev/spec-hash"] = "older"
    world.cluster.put(config_map)
    edit(world, **INVALID)
    world.cluster.change("Deployment", "sentiment-r1", {"spec": {"strategy": {"type": "Recreate"}, "replicas": 5}})
    world.reconcile()
    spec = world.cluster.get("Deployment", "sentiment-r1")["spec"]
    assert (spec["strategy"]["type"], spec["replicas"]) == ("Recreate", 1)
