"""Seconds from `kubectl apply` to a job's first optimizer step: `python -m bench.first_step [RUNS]`, one JSON line.

Two worker pods on a cluster of two real nodes, the images in both, the tokens in the cache: a first job that doesn't
count sees to that. SmolLM2-135M with LoRA, as the end-to-end tests train it. Where the time goes is what the job itself
reports (`phaseSeconds`), from the moment on when pod 0's first process speaks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import assets
from bench.runs import median, say
from devcluster import Cluster, ClusterSpec
from testbed import Testbed
from testbed.jobs import BASE_MODEL, condition, describe, fine_tune_job
from tunesmith_api import keys
from tunesmith_api.reports import TerminationReport

__all__ = ["PHASES", "measure", "unix"]

NAMESPACE = "bench"
PHASES = ("podStarted", "rayStarted", "workersJoined", "workersStarted", "dataLoaded", "modelLoaded", "firstStep")
"""In the order in which they end. Imports and the model's files take place beside Ray's start, up to workersStarted."""
# what a node of two cores has left; the trainer computes on whole ones
WORKERS = {"replicas": 2, "resources": {"cpu": "1900m", "memory": "3Gi"}}


def measure(runs: int) -> dict[str, float]:
    """Return the median seconds of each phase and of all together.

    Raises:
        UnsupportedMachine: there can be no cluster or no image here; the message says what is missing.
        RuntimeError: a job failed.
    """
    with Cluster.start(ClusterSpec(name="bench", nodes=2), say) as cluster, tempfile.TemporaryDirectory() as scratch:
        bed = Testbed.install(cluster, say)
        bed.create_namespace(NAMESPACE)
        bed.store.put_folder(assets.smollm2(), BASE_MODEL)
        tweets = assets.tweets(Path(scratch), train=96, eval_per_class=4, seed=1)
        data = bed.store.put_file(tweets.train, "s3://data/tweets/train.jsonl")
        found = []
        for number in range(runs + 1):
            seconds = _one_job(bed, f"first-step-{number}", data)
            say(f"first step: {'warm-up' if number == 0 else f'run {number} of {runs}'}: {seconds['total']:.1f} s")
            found.append(seconds)
        return {name: round(median([seconds[name] for seconds in found[1:]]), 1) for name in (*PHASES, "total")}


def _one_job(bed: Testbed, name: str, data: str) -> dict[str, float]:
    """Run a job of three steps to its end; return its phases."""
    dataset = {"train": {"uri": data}, "cacheUri": "s3://data/tokens"}
    training = {"maxSteps": 3, "learningRate": 1e-3, "globalBatchSize": 4, "microBatchSize": 2, "maxLength": 96}
    job = fine_tune_job(name, NAMESPACE, data, dataset=dataset, training=training, workers=WORKERS)
    applied = time.time()
    bed.apply(job)
    kubectl = bed.cluster.kubectl
    # one process that watches: polling would cost the very cores that are measured
    kubectl("wait", "--for=condition=Succeeded", f"ftj/{name}", "-n", NAMESPACE, "--timeout=300s", check=False)
    if condition(bed.get("ftj", name, NAMESPACE).get("status", {}), "Succeeded").get("status") != "True":
        raise RuntimeError(f"{name} has not succeeded: {describe(bed, name, NAMESPACE)}")
    head = bed.list("pods", NAMESPACE, f"{keys.LABEL_FINETUNEJOB}={name},batch.kubernetes.io/job-completion-index=0")[0]
    ended = head["status"]["containerStatuses"][0]["state"]["terminated"]
    reported = TerminationReport.from_json(ended["message"]).phase_seconds
    lines = kubectl("logs", "-n", NAMESPACE, head["metadata"]["name"], "--timestamps")
    kubectl("delete", "ftj", name, "-n", NAMESPACE)
    kubectl("wait", "--for=delete", "pod", "--all", "-n", NAMESPACE, "--timeout=90s", check=False)
    return _durations(unix(lines.split(" ", 1)[0]) - applied, reported)


def unix(stamp: str) -> float:
    """Seconds since 1970 of a container log's time stamp, which has nanoseconds."""
    return datetime.fromisoformat(stamp[:26].rstrip("Z") + "+00:00").timestamp()


def _durations(pod_started: float, reported: dict[str, float]) -> dict[str, float]:
    """Seconds that each phase took, from when each was reached."""
    reached = {"podStarted": pod_started} | {name: pod_started + reported[name] for name in PHASES[1:]}
    before = [0.0, *reached.values()]
    durations = {name: reached[name] - before[number] for number, name in enumerate(PHASES)}
    return durations | {"total": reached[PHASES[-1]]}


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 5)))
