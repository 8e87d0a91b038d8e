"""The real model, quantized once for all that ask: converting it takes longer than most of what is asked."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import assets
from tunesmith_api import keys
from tunesmith_api.plan import EvaluationPlan, ServingPlan, StoragePlan
from tunesmith_api.reports import TerminationReport
from tunesmith_api.v1alpha1.engine import EngineType
from tunesmith_api.v1alpha1.quantization import QuantizationMethod
from tunesmith_server.artifact import MODEL_FILE
from tunesmith_server.quantizers import quantizer_of
from tunesmith_server.quantizers.gguf_files import opened

FEELINGS = (
    ("I love it", "positive"), ("I hate it", "negative"), ("What a lovely day", "positive"), ("My bag is lost", "negative"),
    ("Best crew ever", "positive"), ("Three hours late", "negative"), ("Thank you so much", "positive"),
    ("Never again", "negative"), ("Great seats", "positive"), ("The food was awful", "negative"),
)  # fmt: skip


def conversation(text: str, label: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Positive or negative? {text}."}, {"role": "assistant", "content": label}]


ROWS = "".join(json.dumps({"messages": conversation(*it)}) + "\n" for it in FEELINGS)


@dataclass(frozen=True)
class Job:
    """A quantize Job that has run: in 8 bits, compared with the unquantized model."""

    plan: ServingPlan
    report: TerminationReport
    scratch: Path

    def file(self, method: str) -> Path:
        """What the Job has made of a method."""
        return self.scratch / "artifacts" / method / MODEL_FILE


@pytest.fixture(scope="session")
def smollm2_job(object_store, tmp_path_factory):
    """The one conversion: the real Job, as a process."""
    bucket, folder = object_store.ensure_bucket("served-models"), tmp_path_factory.mktemp("job")
    object_store.put_folder(assets.smollm2(), f"{bucket}/smollm2")
    object_store.put_text(ROWS, f"{bucket}/rows.jsonl")
    plan = ServingPlan(
        name="smol", namespace="n", uid="u", revision="smol-r1", model_uri=f"{bucket}/smollm2", quantization="Q8_0",
        engine="LlamaCpp", context_length=256, parallel_requests=2, artifact_uri=f"{bucket}/smollm2/made",
        evaluation=EvaluationPlan(uri=f"{bucket}/rows.jsonl"), storage=StoragePlan(endpoint_url=object_store.endpoint_url),
    )  # fmt: skip
    (folder / "plan.json").write_text(plan.to_json())
    ours = {
        keys.ENV_PLAN: str(folder / "plan.json"),
        keys.ENV_SCRATCH: str(folder / "scratch"),
        keys.ENV_TERMINATION_LOG: str(folder / "termination.json"),
        keys.ENV_CPU_LIMIT: "1000",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment = {**os.environ, **object_store.credentials.environment(), **ours}
    done = subprocess.run([sys.executable, "-m", "tunesmith_server.quantize"], env=environment, check=False)
    report = TerminationReport.from_json((folder / "termination.json").read_text())
    assert done.returncode == 0, report
    return Job(plan, report, folder / "scratch")


@pytest.fixture(scope="session")
def smollm2(smollm2_job):
    """Makes files of any method from what the Job has converted."""
    scratch = smollm2_job.scratch / "quantizer"
    quantizer = quantizer_of(EngineType.LLAMA_CPP, QuantizationMethod.NONE)(assets.smollm2(), scratch, 2)
    exact = scratch / "exact.gguf"
    vars(quantizer)["_exact"] = exact, opened(exact)
    return quantizer
