"""4 bits cost the demo's model more than the gate allows: traffic never moves, the status says why, 8 bits go out instead."""

from pathlib import Path

import pytest

import assets
from testbed import Testbed, chat
from testbed.jobs import condition, describe, model_deployment, wait_finished
from tunesmith_cli.kubernetes_yaml import parsed

SAMPLE = Path(__file__).resolve().parents[2] / "manifests/samples/finetunejob.yaml"
HELD_OUT_PER_LABEL = 40


def tuned(testbed: Testbed, namespace: str, folder: Path) -> None:
    """The demo's job, in a namespace of this test."""
    data = assets.tweets(folder, train=1200, eval_per_class=HELD_OUT_PER_LABEL)
    job = parsed(SAMPLE.read_text())[0]
    job["metadata"]["namespace"] = namespace
    spec = job["spec"]
    for part, path in (("train", data.train), ("eval", data.eval)):
        spec["dataset"][part] = {"uri": testbed.store.put_file(path, f"s3://data/{namespace}/{part}.jsonl")}
    spec["training"]["maxEvalSamples"] = 30  # the job's own look; the gate asks all of them
    spec["checkpoint"]["uri"] = f"s3://checkpoints/{namespace}/sentiment"
    spec["output"]["uri"] = f"s3://models/{namespace}/sentiment"
    testbed.apply(job)
    status = wait_finished(testbed, "sentiment", namespace, 900)
    assert status["phase"] == "Succeeded", describe(testbed, "sentiment", namespace)


@pytest.mark.timeout(1500)
def test_four_bits_fail_a_gate_of_three_points_and_eight_go_out_instead(
    testbed: Testbed, user_namespace: str, tweets: str, tmp_path: Path
) -> None:
    tuned(testbed, user_namespace, tmp_path)

    def status() -> dict:
        return testbed.get("mdep", "gated", user_namespace).get("status", {})

    def becomes(what: str, type_: str, *wanted: str) -> dict:
        """Wait until a condition has this status and reason."""

        def holds() -> dict | None:
            found = condition(status(), type_)
            return found if (found.get("status"), found.get("reason")) == wanted else None

        found: dict = testbed.wait_until(holds, f"{what}: {status()}", 600)
        return found

    def answers() -> str:
        return chat(testbed.url(user_namespace, "gated"), "gated", assets.question("What a lovely day!"), 4).strip()

    def leads_to() -> str:
        return str(testbed.get("service", "gated", user_namespace)["spec"]["selector"]["tunesmith.dev/revision"])

    serving = model_deployment("gated", user_namespace, "sentiment", quantization={"method": "Q8_0"})
    testbed.apply(serving)
    becomes("eight bits answer", "Ready", "True", "ReplicasAvailable")
    said = answers()
    assert said in assets.LABELS

    gate = {"maxAccuracyDropPercent": 3}
    serving["spec"] |= {"quantization": {"method": "Q4_0"}, "gate": gate}
    testbed.apply(serving)
    message = becomes("four bits fail", "QualityHeld", "False", "QualityGateFailed")["message"]
    print(f"the gate says: {message}")
    found = status()["revisions"][-1]
    fall = found["evaluation"]["accuracyDropPercent"]
    assert float(fall["value"]) > 3
    assert float(fall["low"]) < float(fall["value"]) < float(fall["high"])
    assert f"accuracy fell {float(fall['value']):.1f} points (95 % interval" in message
    assert "more than gate.maxAccuracyDropPercent 3" in message
    assert found["evaluation"]["examples"] == 3 * HELD_OUT_PER_LABEL
    assert (status()["currentRevision"], leads_to(), answers()) == ("gated-r1", "r1", said)
    assert not testbed.get("deployment", "gated-r2", user_namespace), "nothing of it has ever been started"
    page = testbed.store.get_bytes(found["evaluation"]["reportURI"]).decode()
    assert "Q4_0 against the unquantized model" in page

    serving["spec"]["gate"] = {**gate, "onGateFailure": "FallbackMethod", "fallbackMethod": "Q8_0"}
    testbed.apply(serving)
    testbed.wait_until(lambda: status().get("currentRevision") == "gated-r3", f"eight bits go out: {status()}", 600)
    message = becomes("eight bits are good enough", "QualityHeld", "True", "QualityGatePassed")["message"]
    assert "Q8_0 is tried instead of Q4_0: of gated-r2" in message
    assert (status()["display"]["quantization"], leads_to(), answers()) == ("Q8_0", "r3", said)
