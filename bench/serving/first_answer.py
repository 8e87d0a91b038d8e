"""Seconds from `kubectl apply` of a ModelDeployment to its first answer, by phase. Called by `figures`.

On a cluster of two real nodes with the images in both; SmolLM2-135M from the object store. Cold: the artefact has to be
made. Warm: another deployment of the same model finds it. A first one of each doesn't count.
"""

from __future__ import annotations

import re
import time
from typing import Any

import assets
from bench.first_step import unix
from bench.runs import median, say
from devcluster import Cluster, ClusterSpec
from testbed import Testbed, chat
from testbed.jobs import BASE_MODEL, condition, storage
from tunesmith_api import keys

__all__ = ["PHASES", "measure"]

NAMESPACE = "bench"
PHASES = ("quantizerStarted", "artifactReady", "serverStarted", "downloaded", "loaded", "answered")
"""In the order in which they end: what a pod does before its program speaks is part of `…Started`."""
READY = re.compile(r"ready as .*: download ([\d.]+) s, load and first answer ([\d.]+) s")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def measure(runs: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of each phase and of all together, `cold` and `warm`.

    Raises:
        UnsupportedMachine: there can be no cluster or no image here; the message says what is missing.
        RuntimeError: a deployment never became ready.
    """
    with Cluster.start(ClusterSpec(name="bench", nodes=2), say) as cluster:
        bed = Testbed.install(cluster, say)
        bed.create_namespace(NAMESPACE)
        bed.store.put_folder(assets.smollm2(), BASE_MODEL)
        found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
        for number in range(runs + 1):
            for kind, taken in found.items():
                taken.append(_one(bed, f"{kind}-{number}", f"s3://models/bench-{number}"))
                turn = f"run {number} of {runs}" if number else "not counted"
                say(f"first answer, {kind}, {turn}: {taken[-1]['total']:.1f} s")
        return {
            kind: {name: round(median([it[name] for it in taken[1:]]), 1) for name in (*PHASES, "total")}
            for kind, taken in found.items()
        }


def _one(bed: Testbed, name: str, artifacts: str) -> dict[str, float]:
    """Deploy, ask, delete; return the seconds of each phase."""
    spec = {
        "source": {"uri": BASE_MODEL},
        "artifactsURI": artifacts,
        "storage": storage(),
        "resources": {"cpu": "1"},
    }
    head = {"apiVersion": keys.API_VERSION, "kind": keys.MODELDEPLOYMENT_KIND}
    applied = time.time()
    bed.apply({**head, "metadata": {"name": name, "namespace": NAMESPACE}, "spec": spec})
    kubectl = bed.cluster.kubectl
    # one process that watches: polling would cost the very cores that are measured
    kubectl("wait", "--for=condition=Ready", f"mdep/{name}", "-n", NAMESPACE, "--timeout=300s", check=False)
    status = bed.get("mdep", name, NAMESPACE).get("status", {})
    if condition(status, "Ready").get("status") != "True":
        raise RuntimeError(f"{name} is not ready: {condition(status, 'Ready').get('message')}")
    chat(bed.url(NAMESPACE, name), name, QUESTION, max_tokens=4)
    answered = time.time()
    reached = _reached(bed, name) | {"answered": answered}
    kubectl("delete", "mdep", name, "-n", NAMESPACE)
    kubectl("wait", "--for=delete", "pod", "--all", "-n", NAMESPACE, "--timeout=90s", check=False)
    before = [applied, *reached.values()]
    durations = {phase: reached[phase] - before[number] for number, phase in enumerate(PHASES)}
    return durations | {"total": answered - applied}


def _reached(bed: Testbed, name: str) -> dict[str, float]:
    """When each phase ended, as the pods' logs say."""
    quantizer = _log(bed, name, keys.COMPONENT_QUANTIZE)
    server = _log(bed, name, keys.COMPONENT_SERVER)
    ready, said = next((at, found) for at, line in server if (found := READY.search(line)) is not None)
    download, load = float(said[1]), float(said[2])
    return {
        "quantizerStarted": quantizer[0][0],
        "artifactReady": quantizer[-1][0],
        "serverStarted": ready - download - load,
        "downloaded": ready - load,
        "loaded": ready,
    }


def _log(bed: Testbed, name: str, component: str) -> list[tuple[float, str]]:
    selector = f"{keys.LABEL_MODELDEPLOYMENT}={name},{keys.LABEL_COMPONENT}={component}"
    pod: dict[str, Any] = bed.list("pods", NAMESPACE, selector)[0]
    lines = bed.cluster.kubectl("logs", "-n", NAMESPACE, pod["metadata"]["name"], "--timestamps").splitlines()
    parts = [line.partition(" ") for line in lines]
    return [(unix(stamp), text) for stamp, _, text in parts if stamp[:2] == "20"]
