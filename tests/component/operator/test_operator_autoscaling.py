"""Autoscaling on an in-memory cluster: pods follow the requests, to zero and back, and no request is without a way."""

import pytest

from support import make
from support.begun import edit, quantize
from support.world import World
from tunesmith_api import keys
from tunesmith_api.activation import ActivatorSettings
from tunesmith_api.keys import MODELDEPLOYMENT_KIND
from tunesmith_operator.core.kubernetes.resources import Key
from tunesmith_operator.core.pods.figures import NOTHING
from tunesmith_operator.core.pods.load import Load
from tunesmith_operator.core.reconcile.progress import ServersSample

KIND = MODELDEPLOYMENT_KIND
KEY = Key(KIND, "ml", "sentiment")
AUTO = {
    "minReplicas": 0,
    "maxReplicas": 6,
    "targetRequestsInFlight": 4,
    "idleSeconds": 120,
    "scaleDownDelaySeconds": 60,
}


def serving(**changes):
    """The first revision answers, and the activator stands by."""
    world = World()
    world.cluster.put(make.modeldeployment(autoscaling={**AUTO, **changes}))
    world.reconcile()
    comes_up(world, "activator")
    quantize(world)
    comes_up(world, "r1")
    hear(world)
    return world


def comes_up(world, *names):
    for name in names:
        world.rolls_out(f"sentiment-{name}")
        world.reconcile()


def hear(world, in_flight=0.0, active=None, since=0.0):
    """What the pods have said by now: `active` is when something was last asked."""
    now = world.now
    begun = make.at(since)
    load = Load(
        since=begun, heard_at=now, active_at=active or (now if in_flight else begun), in_flight=in_flight, before=in_flight,
        peaks=((begun, in_flight),),
    )  # fmt: skip
    world.samples[KEY] = ServersSample("", NOTHING, load=load)
    world.reconcile()


def falls_asleep(world):
    world.now = make.at(world_seconds(world) + 121)
    hear(world)


def world_seconds(world):
    return (world.now - make.NOW).total_seconds()


def pods(world, revision="r1"):
    return world.cluster.get("Deployment", f"sentiment-{revision}")["spec"]["replicas"]


def led_to(world):
    return world.cluster.get("Service", "sentiment")["spec"]["selector"][keys.LABEL_COMPONENT]


def auto(world):
    return world.status(KIND)["autoscaling"]


def ready(world):
    return world.condition("Ready", KIND)


def test_pods_follow_the_requests_and_the_spec_is_left_alone():
    world = serving()
    assert (pods(world), led_to(world), ready(world)[1]) == (1, "server", "ReplicasAvailable")
    hear(world, in_flight=11)
    assert pods(world) == 3
    assert auto(world)["message"] == "11 requests were in flight, 4 for each replica."
    assert ready(world)[:2] == ("True", "ScalingUp"), "what was there answers"
    comes_up(world, "r1")
    assert ready(world)[:2] == ("True", "ReplicasAvailable")
    assert world.cluster.get(KIND, "sentiment")["spec"].get("replicas", 1) == 1, "it belongs to somebody else"
    world.now = make.at(world_seconds(world) + 61)
    hear(world, in_flight=5)
    assert (pods(world), auto(world)["desiredReplicas"]) == (2, 2)
    before = len(world.cluster.writes)
    world.wait(30)
    assert len(world.cluster.writes) == before


def test_replicas_that_are_added_and_never_come_are_missing_in_the_end():
    world = serving()
    hear(world, in_flight=11)
    world.wait(601)
    assert ready(world)[:2] == ("Unknown", "ReplicasUnavailable")


def test_before_the_last_pods_go_requests_have_another_way():
    world = serving()
    falls_asleep(world)
    assert (led_to(world), pods(world)) == ("activator", 1), "nodes have to hear of it first"
    world.wait(9)
    assert pods(world) == 1
    world.wait(1)
    assert (led_to(world), pods(world)) == ("activator", 0)
    comes_up(world, "r1")
    status = world.status(KIND)
    assert (status["phase"], status["display"]["ready"]) == ("Ready", "0/0")
    assert ready(world)[:2] == ("True", "ScaledToZero")
    assert world.condition("Available", KIND)[:2] == ("True", "ScaledToZero")
    assert "Nothing was asked for 2m. The next request wakes it." in ready(world)[2]
    servers = world.cluster.get("Service", "sentiment-servers")["spec"]["selector"]
    assert servers == {
        keys.LABEL_MODELDEPLOYMENT: "sentiment",
        keys.LABEL_COMPONENT: "server",
        keys.LABEL_REVISION: "r1",
    }
    world.wait(20)  # numbers are written at a pace of their own
    before = len(world.cluster.writes)
    world.wait(86_400)
    assert len(world.cluster.writes) == before, "an idle deployment writes nothing"


def test_a_request_wakes_it_and_gets_a_way_to_the_first_server():
    world = serving()
    falls_asleep(world)
    world.wait(10)
    comes_up(world, "r1")
    world.wait(3600)
    hear(world, in_flight=1, since=world_seconds(world) - 60)
    assert (pods(world), led_to(world)) == (1, "activator")
    assert (world.status(KIND)["phase"], ready(world)[:2]) == ("Waking", ("Unknown", "Waking"))
    assert world.condition("Available", KIND)[:2] == ("True", "Waking")
    assert ("Normal", "Waking") in world.cluster.events
    comes_up(world, "r1")
    assert (led_to(world), ready(world)[:2]) == ("server", ("True", "ReplicasAvailable"))


def test_a_request_while_it_falls_asleep_keeps_it_awake():
    world = serving()
    falls_asleep(world)
    world.now = make.at(world_seconds(world) + 5)
    hear(world, active=world.now)
    world.wait(10)
    assert (led_to(world), pods(world), auto(world)["desiredReplicas"]) == ("server", 1, 1)


def test_nothing_goes_to_sleep_without_somebody_who_holds_requests():
    world = serving()
    world.rolls_out("sentiment-activator", available=0)
    falls_asleep(world)
    world.wait(60)
    assert (led_to(world), pods(world)) == ("server", 1)
    edit(world, KIND, autoscaling={"minReplicas": 1})
    assert world.cluster.get("Deployment", "sentiment-activator") is None


def test_requests_wait_for_the_first_server_of_all_and_for_one_that_is_moved():
    world = World()
    world.cluster.put(make.modeldeployment(autoscaling=AUTO))
    world.reconcile()
    assert led_to(world) == "server", "nobody holds requests yet"
    comes_up(world, "activator")
    assert led_to(world) == "activator"
    quantize(world)
    assert pods(world) == 1
    comes_up(world, "r1")
    assert led_to(world) == "server"
    world.rolls_out("sentiment-r1", available=0)
    world.reconcile()
    assert (led_to(world), ready(world)[1]) == ("activator", "Waking")


def test_a_new_revision_of_a_sleeping_deployment_proves_itself_and_sleeps_again():
    world = serving()
    falls_asleep(world)
    world.wait(10)
    comes_up(world, "r1")
    edit(world, KIND, resources={"memory": "8Gi"})
    assert pods(world) == 0, "as long as its files are being made, nobody has to answer"
    quantize(world, "r2")
    world.reconcile()
    assert (pods(world), pods(world, "r2")) == (1, 1)
    assert world.status(KIND)["currentRevision"] == "sentiment-r1"
    comes_up(world, "r1")
    assert led_to(world) == "server"
    comes_up(world, "r2")
    assert world.status(KIND)["currentRevision"] == "sentiment-r2"
    world.wait(11)
    falls_asleep(world)
    world.wait(11)
    assert (led_to(world), pods(world, "r2")) == ("activator", 0)


def test_replicas_0_stops_it_and_without_autoscaling_replicas_say_how_many():
    world = serving()
    edit(world, KIND, replicas=0)
    assert (pods(world), led_to(world), ready(world)[1]) == (0, "server", "ScaledToZero")
    assert "as spec.replicas says" in ready(world)[2]
    assert world.cluster.get("Deployment", "sentiment-activator") is None
    edit(world, KIND, replicas=2, autoscaling=None)
    assert (pods(world), led_to(world)) == (2, "server")
    assert "autoscaling" not in world.status(KIND)


@pytest.mark.parametrize("changed", [None, {"minReplicas": 1}])
def test_where_it_may_sleep_no_longer_requests_that_wait_keep_their_way_until_a_server_answers(changed):
    world = serving()
    falls_asleep(world)
    world.wait(10)
    comes_up(world, "r1")
    edit(world, KIND, autoscaling=changed)
    assert (pods(world), led_to(world)) == (1, "activator")
    comes_up(world, "r1")
    assert led_to(world) == "server"
    world.wait(1)
    assert world.cluster.get("Deployment", "sentiment-activator") is None


def test_the_activator_holds_what_servers_take_and_no_rights():
    world = World()
    api = {"keysSecretRef": {"name": "keys"}, "maxWaitingRequests": 10, "maxBodyBytes": 1 << 20}
    world.cluster.put(make.modeldeployment(autoscaling=AUTO, api=api, engine={"parallelRequests": 2}))
    world.reconcile()
    spec = world.cluster.get("Deployment", "sentiment-activator")["spec"]["template"]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert [it["secret"]["secretName"] for it in spec["volumes"]] == ["keys"]
    (container,) = spec["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    (variable, _) = container["env"]
    settings = ActivatorSettings.from_json(variable["value"])
    assert settings.servers_url == "http://sentiment-servers.ml.svc"
    assert (settings.most_requests, settings.asks_keys, settings.hold_seconds) == (12, True, 300)
    policy = world.cluster.get("NetworkPolicy", "sentiment-activator")["spec"]
    assert policy["podSelector"]["matchLabels"][keys.LABEL_COMPONENT] == "activator"
    assert policy["policyTypes"] == ["Egress"]
    assert world.cluster.get("PodDisruptionBudget", "sentiment-activator")["spec"]["maxUnavailable"] == 1


def test_activators_are_asked_often_while_nobody_answers():
    world = serving()
    for name, component, ip in (("a", "activator", "10.0.0.7"), ("s", "server", "10.0.0.8")):
        labels = {keys.LABEL_MODELDEPLOYMENT: "sentiment", keys.LABEL_COMPONENT: component, keys.LABEL_REVISION: "r1"}
        status = {"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]}
        world.cluster.put(
            {"kind": "Pod", "metadata": {"name": name, "namespace": "ml", "labels": labels}, "status": status}
        )
    world.reconcile()
    target = world.controller._poller._targets[KEY]
    assert sorted(target.asked.values()) == ["10.0.0.7", "10.0.0.8"]
    assert (target.load.total, target.load.interval_seconds) == (2, None)
    falls_asleep(world)
    assert world.controller._poller._targets[KEY].load.interval_seconds == 1.0


@pytest.mark.parametrize("write", range(1, 12))
def test_an_operator_that_dies_at_any_write_goes_on_where_it_was(write):
    world = serving()
    world.cluster.crash_after = write
    falls_asleep(world)
    world.wait(11)
    hear(world, since=world_seconds(world) - 200)
    world.wait(11)
    assert (led_to(world), pods(world)) == ("activator", 0)
    comes_up(world, "r1")
    hear(world, in_flight=1, since=world_seconds(world) - 60)
    assert (led_to(world), pods(world)) == ("activator", 1)
    comes_up(world, "r1")
    assert (led_to(world), pods(world), ready(world)[1]) == ("server", 1, "ReplicasAvailable")
