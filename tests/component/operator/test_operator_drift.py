"""Children are what their manifests say, whoever has changed them; and what is somebody else's is never written."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import make
from support.begun import REPAIRED, edit, own_fields, quantize, quantizing, serving, training
from support.world import World
from tunesmith_api.keys import MODELDEPLOYMENT_KIND
from tunesmith_operator.adapters.errors import Transient

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
    (serving, "PodDisruptionBudget", "sentiment", {"spec": {"maxUnavailable": "100%"}}),
    (serving, "PodDisruptionBudget", "sentiment", {"spec": {"selector": {"matchLabels": {"mine": "too"}}}}),
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


SERVING_EDITS = [(kind, name, change) for begin, kind, name, change in HAND_EDITS if begin is serving]
HAPPENINGS = [*SERVING_EDITS, *((kind, name, None) for kind, name, _ in SERVING_EDITS), "crash", "look"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(HAPPENINGS), max_size=8))
def test_whatever_is_done_to_children_by_hand_they_become_what_they_were(happenings):
    logging.disable(logging.CRITICAL)
    try:
        world = serving()
        children = {(kind, name): own_fields(world, kind, name) for kind, name, _ in SERVING_EDITS}
        for happening in happenings:
            if happening == "crash":
                world.cluster.crash_after = len(world.cluster.writes) + 1
            elif happening == "look":
                world.wait(1)
            elif world.cluster.get(*happening[:2]) is not None:
                kind, name, change = happening
                if change is None:
                    world.cluster.remove(kind, "ml", name)
                else:
                    world.cluster.change(kind, name, change)
        for _ in range(3):
            world.wait(300)
        assert {child: own_fields(world, *child) for child in children} == children
        writes = len(world.cluster.writes)
        world.wait(1000)
        assert len(world.cluster.writes) == writes
    finally:
        logging.disable(logging.NOTSET)


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


def test_what_is_changed_while_another_change_is_put_right_is_put_right_too():
    world = serving()
    before, patch = own_fields(world, "Service", "sentiment"), world.cluster.patch

    async def changed_meanwhile(resource, namespace, name, uid, body):
        world.cluster.patch = patch
        world.cluster.change("Service", name, {"spec": {"ports": []}})
        return await patch(resource, namespace, name, uid, body)

    world.cluster.patch = changed_meanwhile
    world.cluster.change("Service", "sentiment", {"spec": {"selector": {"app": "mine"}}})
    world.reconcile()
    assert own_fields(world, "Service", "sentiment") == before


def contested(world: World) -> None:
    """Another controller sets the Service's selector as soon as it sees it otherwise."""
    patch = world.cluster.patch

    async def changed_back(resource, namespace, name, uid, body):
        answer = await patch(resource, namespace, name, uid, body)
        if resource.kind == "Service":
            world.cluster.change("Service", name, {"spec": {"selector": {"app": "mine"}}})
        return answer

    world.cluster.patch = changed_back
    world.cluster.change("Service", "sentiment", {"spec": {"selector": {"app": "mine"}}})


def test_two_loops_do_not_chase_each_other_and_the_rest_goes_on():
    world = serving()
    contested(world)
    for _ in range(720):
        world.wait(5)
    assert 10 < world.cluster.writes.count("patch Service sentiment") < 25
    status, reason, message = world.condition("ChildrenApplied", MODELDEPLOYMENT_KIND)
    assert (status, reason) == ("False", "ApplyFailed")
    assert "Service sentiment: somebody else changes it back each time" in message
    edit(world, replicas=3)
    assert world.cluster.get("Deployment", "sentiment-r1")["spec"]["replicas"] == 3


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
    for _ in range(6):  # each time one more is lost, and is tried again a little later
        world.wait(25)
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


def test_a_kubelet_that_has_not_heard_of_the_secret_yet_costs_no_restart():
    world = training()
    job = world.cluster.get("Job", "sentiment-1")
    world.cluster.remove("Pod", "ml", "sentiment-1-1-x")
    lacks_secret(world, 1, "b")
    world.wait(5)
    assert world.cluster.get("Job", "sentiment-1")["metadata"]["uid"] == job["metadata"]["uid"]


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
