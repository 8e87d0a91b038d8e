"""From `kubectl apply` to an answer and past a quality gate, on real nodes, in a namespace that enforces the restricted Pod Security Standard.

All tests here look at one job, the demo's: nothing else takes these nodes as long. The operator's leader is killed while it trains.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import assets
from testbed import Testbed, chat
from testbed.bed import OPERATOR_NAMESPACE
from testbed.jobs import condition, describe, history, model_deployment, wait_finished, wait_for_step
from testbed.pytest_plugin import fresh_namespace
from tunesmith_api import keys
from tunesmith_cli.kubernetes_yaml import parsed

SAMPLE = Path(__file__).resolve().parents[2] / "manifests/samples/finetunejob.yaml"
NAME = "sentiment"
STEPS = 80
HELD_OUT_PER_LABEL = 40
PATIENCE = 900
pytestmark = pytest.mark.timeout(2 * PATIENCE)


@dataclass
class Tuned:
    """The job, and what was seen of it while it trained."""

    namespace: str
    columns: str
    pods: list[dict[str, Any]]
    followed_seconds: float
    status: dict[str, Any]
    serving: dict[str, Any] = field(default_factory=dict)
    """The deployment that was applied with it."""


def sample_job(testbed: Testbed, namespace: str, folder: Path) -> dict[str, Any]:
    """The demo's job, in a namespace of ours."""
    data = assets.tweets(folder, train=1200, eval_per_class=HELD_OUT_PER_LABEL)
    job: dict[str, Any] = parsed(SAMPLE.read_text())[0]
    job["metadata"]["namespace"] = namespace
    spec = job["spec"]
    for part, path in (("train", data.train), ("eval", data.eval)):
        spec["dataset"][part] = {"uri": testbed.store.put_file(path, f"s3://data/{namespace}/{part}.jsonl")}
    spec["training"]["maxEvalSamples"] = 30  # the job's own look; the gate asks all of them
    spec["checkpoint"]["uri"] = f"s3://checkpoints/{namespace}/{NAME}"
    spec["output"]["uri"] = f"s3://models/{namespace}/{NAME}"
    return job


def kill_leader(testbed: Testbed) -> float:
    """SIGKILL the operator's pod that leads; returns the seconds until another does."""

    def lease() -> dict[str, Any]:
        spec: dict[str, Any] = testbed.get("lease", "tunesmith-operator", OPERATOR_NAMESPACE)["spec"]
        return spec

    before = lease()
    pod = str(before["holderIdentity"]).rpartition("_")[0]
    for process in testbed.cluster.pod_pids(OPERATOR_NAMESPACE, pod):
        os.kill(process.pid, signal.SIGKILL)
    began = time.monotonic()
    testbed.wait_until(lambda: lease()["acquireTime"] != before["acquireTime"], "another operator leads", 120, poll=0.2)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def tuned(testbed: Testbed, tweets: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuned]:
    """The job and its deployment, applied together, and the job trained to its end."""
    with fresh_namespace(testbed) as namespace:
        serving = model_deployment(NAME, namespace, NAME, quantization={"method": "Q8_0"})
        testbed.apply(sample_job(testbed, namespace, tmp_path_factory.mktemp("demo")), serving)
        wait_for_step(testbed, NAME, namespace, 2, PATIENCE)
        columns, pods = testbed.cluster.kubectl("get", "ftj", NAME, "-n", namespace), testbed.list("pods", namespace)
        followed_seconds = kill_leader(testbed)
        status = wait_finished(testbed, NAME, namespace, PATIENCE)
        assert status["phase"] == "Succeeded", describe(testbed, NAME, namespace)
        yield Tuned(namespace, columns, pods, followed_seconds, status, serving)


def test_a_job_trains_and_says_so(testbed: Testbed, tuned: Tuned) -> None:
    for word in ("Training", f"/{STEPS}", "2/2"):
        assert word in tuned.columns
    assert len(tuned.pods) == 2
    for pod in tuned.pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
        mounts = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        assert "/var/run/secrets/kubernetes.io/serviceaccount" not in mounts
    status = tuned.status
    assert condition(status, "Succeeded")["reason"] == "Completed"
    assert float(status["metrics"]["evalLoss"]) < float(status["metrics"]["evalLossBefore"])
    manifest = json.loads(testbed.store.get_bytes(f"{status['model']['uri']}/{keys.MODEL_MANIFEST}"))
    assert manifest["digest"] == status["model"]["digest"]


def test_a_killed_leader_is_followed_within_20_seconds_and_loses_nothing(testbed: Testbed, tuned: Tuned) -> None:
    assert tuned.followed_seconds < 20
    assert [record["step"] for record in history(testbed, tuned.status)] == list(range(1, STEPS + 1))
    assert (tuned.status["restarts"], len(tuned.status["attempts"])) == (0, 1)


def becomes(testbed: Testbed, tuned: Tuned, type_: str, *wanted: str) -> dict[str, Any]:
    """Wait until a condition of the deployment has this status and reason."""

    def holds() -> dict[str, Any] | None:
        found = condition(status_of(testbed, tuned), type_)
        return found if (found.get("status"), found.get("reason")) == wanted else None

    try:
        found: dict[str, Any] = testbed.wait_until(holds, f"{type_} {wanted}", PATIENCE)
    except TimeoutError as error:
        raise AssertionError(f"{error}: {status_of(testbed, tuned)}") from None
    return found


def status_of(testbed: Testbed, tuned: Tuned) -> dict[str, Any]:
    status: dict[str, Any] = testbed.get("mdep", NAME, tuned.namespace).get("status", {})
    return status


def answer(testbed: Testbed, tuned: Tuned) -> str:
    return chat(testbed.url(tuned.namespace, NAME), NAME, assets.question("What a lovely day!"), 4).strip()


def test_its_model_answers(testbed: Testbed, tuned: Tuned) -> None:
    becomes(testbed, tuned, "Ready", "True", "ReplicasAvailable")
    line = testbed.cluster.kubectl("get", "mdep", NAME, "-n", tuned.namespace)
    for word in ("1/1", f"{NAME}-r1", "Q8_0", f"http://{NAME}.{tuned.namespace}.svc"):
        assert word in line
    assert answer(testbed, tuned) in assets.LABELS


def test_four_bits_fail_a_gate_of_three_points_and_eight_go_out_instead(testbed: Testbed, tuned: Tuned) -> None:
    """4 bits cost the demo's model more than the gate allows: traffic never moves, the status says why."""

    def leads_to() -> str:
        return str(testbed.get("service", NAME, tuned.namespace)["spec"]["selector"]["tunesmith.dev/revision"])

    becomes(testbed, tuned, "Ready", "True", "ReplicasAvailable")
    said, serving = answer(testbed, tuned), tuned.serving
    gate = {"maxAccuracyDropPercent": 3}
    serving["spec"] |= {"quantization": {"method": "Q4_0"}, "gate": gate}
    testbed.apply(serving)
    message = becomes(testbed, tuned, "QualityHeld", "False", "QualityGateFailed")["message"]
    print(f"the gate says: {message}")
    status = status_of(testbed, tuned)
    found = status["revisions"][-1]
    fall = found["evaluation"]["accuracyDropPercent"]
    assert float(fall["value"]) > 3
    assert float(fall["low"]) < float(fall["value"]) < float(fall["high"])
    assert f"accuracy fell {float(fall['value']):.1f} points (95 % interval" in message
    assert "more than gate.maxAccuracyDropPercent 3" in message
    assert found["evaluation"]["examples"] == 3 * HELD_OUT_PER_LABEL
    assert (status["currentRevision"], leads_to(), answer(testbed, tuned)) == (f"{NAME}-r1", "r1", said)
    assert not testbed.get("deployment", f"{NAME}-r2", tuned.namespace), "nothing of it has ever been started"
    page = testbed.store.get_bytes(found["evaluation"]["reportURI"]).decode()
    assert "Q4_0 against the unquantized model" in page

    serving["spec"]["gate"] = {**gate, "onGateFailure": "FallbackMethod", "fallbackMethod": "Q8_0"}
    testbed.apply(serving)
    # of the third revision: the condition may still be the second's
    third = lambda: status_of(testbed, tuned).get("currentRevision") == f"{NAME}-r3"  # noqa: E731
    testbed.wait_until(third, "eight bits go out", PATIENCE)
    message = becomes(testbed, tuned, "QualityHeld", "True", "QualityGatePassed")["message"]
    assert f"Q8_0 is tried instead of Q4_0: of {NAME}-r2" in message
    assert status_of(testbed, tuned)["display"]["quantization"] == "Q8_0"
    assert (leads_to(), answer(testbed, tuned)) == ("r3", said)
