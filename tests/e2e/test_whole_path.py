"""From `kubectl apply` to an answer, on real nodes, in a namespace that enforces the restricted Pod Security Standard."""

import json

from testbed import Testbed, chat
from testbed.jobs import condition, describe, fine_tune_job, history, model_deployment, wait_finished, wait_for_step
from tunesmith_api import keys


def test_a_job_trains_and_its_model_answers(testbed: Testbed, user_namespace: str, tweets: str) -> None:
    job = fine_tune_job("tweet", user_namespace, tweets)
    job["spec"]["dataset"]["eval"] = {"uri": "s3://data/tweets/eval.jsonl"}
    testbed.apply(job, model_deployment("tweet", user_namespace, "tweet"))

    wait_for_step(testbed, "tweet", user_namespace, 2)
    columns = testbed.cluster.kubectl("get", "ftj", "tweet", "-n", user_namespace)
    assert "Training" in columns
    assert "/12" in columns
    assert "2/2" in columns
    for pod in testbed.list("pods", user_namespace):
        assert pod["spec"]["automountServiceAccountToken"] is False
        mounts = [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        assert "/var/run/secrets/kubernetes.io/serviceaccount" not in mounts

    status = wait_finished(testbed, "tweet", user_namespace)
    assert status["phase"] == "Succeeded", describe(testbed, "tweet", user_namespace)
    assert condition(status, "Succeeded")["reason"] == "Completed"
    assert float(status["metrics"]["evalLoss"]) < float(status["metrics"]["evalLossBefore"])
    assert [record["step"] for record in history(testbed, status)] == list(range(1, 13))
    manifest = json.loads(testbed.store.get_bytes(f"{status['model']['uri']}/{keys.MODEL_MANIFEST}"))
    assert manifest["digest"] == status["model"]["digest"]

    def ready() -> bool:
        deployment = testbed.get("mdep", "tweet", user_namespace).get("status", {})
        return condition(deployment, "Ready").get("status") == "True"

    testbed.wait_until(ready, "the deployment is ready", 180)
    line = testbed.cluster.kubectl("get", "mdep", "tweet", "-n", user_namespace)
    assert "1/1" in line
    assert "tweet-r1" in line
    assert "Q8_0" in line
    assert f"http://tweet.{user_namespace}.svc" in line
    answer = chat(
        testbed.url(user_namespace, "tweet"), "tweet", [{"role": "user", "content": "Say one word."}], max_tokens=4
    )
    assert answer.strip()
