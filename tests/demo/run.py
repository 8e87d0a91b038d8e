"""The demo's story, top to bottom."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import assets
from demo.models import base_accuracy, base_gguf
from demo.screen import Phase, Screen
from demo.table import gate_table
from devcluster import Cluster, ClusterSpec, binaries, reaper
from images import build_images
from testbed import Testbed, chat
from tunesmith_cli.kubernetes_yaml import parsed

CLUSTER = "demo"
NAMESPACE = "ml"
NAME = "sentiment"
ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "manifests" / "samples"
TRAIN_EXAMPLES = 1200
HELD_OUT_PER_LABEL = 67
# the job's own evaluations before and after take a part of them; accuracy is measured on all
JOB_EVALUATION_EXAMPLES = 30
MIN_GAIN = 0.15
GATE = {
    "evaluation": {"dataset": "s3://data/tweets/held-out.jsonl", "maxExamples": 3 * HELD_OUT_PER_LABEL},
    "gate": {"maxAccuracyDropPercent": 3, "maxPerplexityIncreasePercent": 5},
}
TWEETS = (
    "The crew was wonderful, best flight of my life!",
    "Three hours late and they lost my bag. Never again.",
    "The new phone goes on sale on Friday.",
)


def run_demo() -> dict[str, Any]:
    """Run everything and return the summary.

    Raises:
        UnsupportedMachine: something is missing here.
        RuntimeError, TimeoutError: a step failed; the cluster is left for a look.
    """
    with Screen() as screen, tempfile.TemporaryDirectory() as scratch:
        screen.line("Tunesmith demo: a chat model learns to tell the sentiment of tweets, on a Kubernetes of its own.")
        data = _prepare(screen, Path(scratch))
        with screen.phase("base_accuracy", "accuracy before tuning (measured once)", 3 * HELD_OUT_PER_LABEL) as phase:
            before, examples = base_accuracy(data.eval, phase.tick)
        bed = _boot(screen)
        first_step = _train(screen, bed, data)
        url = _deploy(screen, bed)
        evaluation = _evaluation(bed)
        labels = bed.get("namespace", NAMESPACE, "")["metadata"]["labels"]
        total = round(time.monotonic() - screen.started, 1)
    tuned, quantized = (float(evaluation[it]["accuracyPercent"]) / 100 for it in ("baseline", "quantized"))
    good = tuned >= before + MIN_GAIN and evaluation["examples"] == examples
    _tell(screen, bed, url, before, evaluation)
    return {
        "demo": "ok" if good else "accuracy too low",
        "accuracy_base": round(before, 4),
        "accuracy_tuned": round(tuned, 4),
        "accuracy_quantized": round(quantized, 4),
        "examples": examples,
        "pod_security": labels.get("pod-security.kubernetes.io/enforce", ""),
        "seconds": {"total": total, "apply_to_first_step": first_step, **screen.seconds},
    }


def _prepare(screen: Screen, scratch: Path) -> assets.Tweets:
    """Kubernetes compiles beside the images and the model's conversion: the longest wait is paid once."""
    if reaper.remove_cluster(CLUSTER):
        screen.line("removed the cluster of an earlier demo")
    with ThreadPoolExecutor(1) as pool, screen.phase("prepare", "programs, images, model and tweets") as phase:
        building: Future[Any] = pool.submit(binaries.ensure, phase.say)
        build_images(phase.say)
        phase.say("model and tweets")
        base_gguf()
        data = assets.tweets(scratch / "tweets", train=TRAIN_EXAMPLES, eval_per_class=HELD_OUT_PER_LABEL)
        phase.say("Kubernetes (compiled once, about ten minutes on two cores)")
        building.result()
    return data


def _boot(screen: Screen) -> Testbed:
    with screen.phase("cluster", "two-node Kubernetes cluster") as phase:
        cluster = Cluster.start(ClusterSpec(name=CLUSTER, nodes=2, keep=True), phase.say)
    with screen.phase("install", "S3 store, images, operator") as phase:
        return Testbed.install(cluster, phase.say)


def _train(screen: Screen, bed: Testbed, data: assets.Tweets) -> float:
    """Apply the sample job and watch it to its end; return the seconds from apply to the first step."""
    with screen.phase("upload", "model and tweets into the store"):
        bed.create_namespace(NAMESPACE)
        bed.store.put_folder(assets.smollm2(), "s3://models/smollm2-135m-instruct")
        bed.store.put_file(data.train, "s3://data/tweets/train.jsonl")
        few = data.eval.read_text().splitlines(keepends=True)[:JOB_EVALUATION_EXAMPLES]
        bed.store.put_text("".join(few), "s3://data/tweets/eval.jsonl")
        bed.store.put_file(data.eval, "s3://data/tweets/held-out.jsonl")
    bed.cluster.kubectl("apply", "-n", NAMESPACE, "-f", str(SAMPLES / "finetunejob.yaml"))
    bed.apply(_deployment())
    applied = time.monotonic()
    with screen.phase("start", "Ray and the workers start") as phase:
        bed.wait_until(lambda: _progress(bed, phase) >= 1, "the first training step", 600)
        first_step = round(time.monotonic() - applied, 1)
    _show(screen, bed, "ftj")
    with screen.phase("train", "fine-tuning", total=100) as phase:
        half = bed.wait_until(lambda: _progress(bed, phase) >= 15 or _ended(bed), "training goes on", 900)
        if half is True:
            _show(screen, bed, "ftj")
        bed.wait_until(lambda: _progress(bed, phase) >= 0 and _ended(bed), "the job has ended", 1800)
    _show(screen, bed, "ftj")
    return first_step


def _progress(bed: Testbed, phase: Phase) -> int:
    """Move the bar to where the custom resource says training is; return the steps done."""
    status = bed.get("ftj", NAME, NAMESPACE).get("status", {})
    if status.get("phase") == "Failed":
        raise RuntimeError(f"the job failed: {_condition(status, 'Succeeded').get('message')}")
    progress = status.get("progress") or {}
    display = status.get("display") or {}
    phase.advance_to(progress.get("percent", 0), 100)
    texts = (
        status.get("phase", ""),
        f"step {display.get('step', '')}",
        f"loss {display.get('loss', '')}",
        f"ETA {display.get('eta', '')}",
    )
    phase.say(", ".join(texts if progress.get("globalStep") else texts[:1]))
    return int(progress.get("globalStep", 0))


def _ended(bed: Testbed) -> bool:
    return bed.get("ftj", NAME, NAMESPACE).get("status", {}).get("phase") in ("Succeeded", "Failed")


def _deployment() -> dict[str, Any]:
    """The sample, with a gate on all held-out tweets."""
    manifest: dict[str, Any] = parsed((SAMPLES / "modeldeployment.yaml").read_text())[0]
    manifest["metadata"]["namespace"] = NAMESPACE
    manifest["spec"] |= GATE
    return manifest


def _evaluation(bed: Testbed) -> dict[str, Any]:
    """What the quantize Job found out, as the status says."""
    status = bed.get("mdep", NAME, NAMESPACE)["status"]
    found: dict[str, Any] = status["revisions"][-1]["evaluation"]
    return found


def _deploy(screen: Screen, bed: Testbed) -> str:
    """Wait for the deployment that was applied with the job; return a URL on this machine."""
    with screen.phase("deploy", "quantizing, comparing with the unquantized model, rolling out") as phase:

        def ready() -> bool:
            status = bed.get("mdep", NAME, NAMESPACE).get("status", {})
            if status.get("phase") == "Failed":
                raise RuntimeError(f"the deployment failed: {_condition(status, 'Ready').get('message')}")
            phase.say(str(status.get("phase", "")))
            return _condition(status, "Ready").get("status") == "True"

        bed.wait_until(ready, "the deployed model answers", 600)
    _show(screen, bed, "mdep")
    return bed.url(NAMESPACE, NAME)


def _condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((entry for entry in status.get("conditions", []) if entry["type"] == kind), {})


def _show(screen: Screen, bed: Testbed, kind: str) -> None:
    screen.line(f"$ kubectl get {kind}")
    for line in bed.cluster.kubectl("get", kind, "-n", NAMESPACE).splitlines():
        screen.line(line)


def _tell(screen: Screen, bed: Testbed, url: str, before: float, evaluation: dict[str, Any]) -> None:
    screen.line()
    for text in TWEETS:
        screen.line(f"? {text}")
        screen.line(f"> {chat(url, NAME, assets.question(text))}")
    screen.line()
    screen.line(f"accuracy on {evaluation['examples']} held-out tweets before tuning: {before:.1%}")
    for line in gate_table(evaluation):
        screen.line(line)
    held = _condition(bed.get("mdep", NAME, NAMESPACE)["status"], "QualityHeld")
    screen.line(f"the gate says: {held['message']}")
    screen.line()
    folder = bed.cluster.programs.folder
    screen.line("The cluster is still up:")
    screen.line(f"  export KUBECONFIG={bed.cluster.kubeconfig} PATH={folder}:$PATH")
    screen.line(f"  kubectl get ftj,mdep,pods -n {NAMESPACE}")
    screen.line(f"  curl {url}/v1/models")
    screen.line("Remove it with `make demo-down`.")
