"""Bad input ends in a condition with a stable reason that names the object, line or field; no pod loops, no other job notices."""

import time

from testbed import Testbed
from testbed.jobs import condition, describe, fine_tune_job, storage, wait_finished

ONE_WORKER = {"replicas": 1, "resources": {"cpu": "400m", "memory": "2Gi"}}


def test_pods_that_cannot_start_say_why_and_stop(testbed: Testbed, user_namespace: str, tweets: str) -> None:
    bound = {"backoffLimit": 1, "startupTimeoutSeconds": 40}
    bad_image = fine_tune_job(
        "bad-image",
        user_namespace,
        tweets,
        failurePolicy=bound,
        workers={**ONE_WORKER, "image": "localhost/no-such-image:1"},
    )
    no_secret = fine_tune_job(
        "no-secret", user_namespace, tweets, failurePolicy=bound, workers=ONE_WORKER, storage=storage("no-such-secret")
    )
    started = time.monotonic()
    testbed.apply(bad_image, no_secret)

    def reason(name: str) -> str:
        status = testbed.get("ftj", name, user_namespace).get("status", {})
        return condition(status, "WorkersReady").get("reason", "")

    testbed.wait_until(lambda: reason("bad-image") == "ImagePullFailed", "the image's reason", 30)
    testbed.wait_until(lambda: reason("no-secret") == "SecretNotFound", "the secret's reason", 30)
    assert time.monotonic() - started < 30
    for name, expected, named in (
        ("bad-image", "ImagePullFailed", "no-such-image"),
        ("no-secret", "SecretNotFound", "no-such-secret"),
    ):
        status = wait_finished(testbed, name, user_namespace, timeout=90)
        succeeded = condition(status, "Succeeded")
        assert (status["phase"], succeeded["status"], succeeded["reason"]) == ("Failed", "False", expected)
        assert named in succeeded["message"]
    testbed.wait_until(lambda: not testbed.list("pods", user_namespace), "no pod is left", 60)


def test_bad_data_and_a_read_only_bucket_are_named(testbed: Testbed, user_namespace: str, tweets: str) -> None:
    good = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
    testbed.store.put_text(good * 2 + "not json\n", "s3://data/bad/not-json.jsonl")
    testbed.store.put_text(good + '{"text": "hello"}\n', "s3://data/bad/no-column.jsonl")
    testbed.apply_secret(user_namespace, "reader", read_only=True)
    jobs = {
        "not-json": fine_tune_job("not-json", user_namespace, "s3://data/bad/not-json.jsonl", workers=ONE_WORKER),
        "no-column": fine_tune_job("no-column", user_namespace, "s3://data/bad/no-column.jsonl", workers=ONE_WORKER),
        "read-only": fine_tune_job("read-only", user_namespace, tweets, workers=ONE_WORKER, storage=storage("reader")),
    }
    testbed.apply(*jobs.values())
    expected = {
        "not-json": ("DatasetInvalid", ("not-json.jsonl", "3")),
        "no-column": ("DatasetInvalid", ("no-column.jsonl", "2", "messages")),
        "read-only": ("StorageUnwritable", ("s3://",)),
    }
    for name, (reason, words) in expected.items():
        status = wait_finished(testbed, name, user_namespace, timeout=180)
        succeeded = condition(status, "Succeeded")
        assert (succeeded["status"], succeeded["reason"]) == ("False", reason), describe(testbed, name, user_namespace)
        for word in words:
            assert word in succeeded["message"]
        pods = testbed.list("pods", user_namespace, f"tunesmith.dev/finetunejob={name}")
        assert len(pods) <= 1, "a user error is not retried"
