"""The memory estimate against what processes really used: whole runs, from loading the model to writing it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from assets import minilm, smollm2, tiny
from tunesmith_api import keys

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
METHODS = ("Full", "LoRA", "QLoRA")
SIZES = {
    "smollm2": {"task": "CausalLM", "micro": 2, "length": 128},
    "minilm": {"task": "SequenceClassification", "micro": 8, "length": 128},
    "tiny": {"task": "CausalLM", "micro": 2, "length": 64},
}
CLOSE = 0.15


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peaks")
    (folder / "volumes/data").mkdir(parents=True)
    models = {"smollm2": smollm2(), "minilm": minilm(), "tiny": tiny.llama(tmp_path_factory.mktemp("tiny"))}
    for name, model in models.items():
        (folder / "volumes" / name).symlink_to(model)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", keys.ENV_VOLUMES: str(folder / "volumes"),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "crds", ROOT / "trainer_image", ROOT / "tests", HERE))),
    }  # fmt: skip
    cases = json.dumps(
        [{"model": name, "method": method, **sizes} for name, sizes in SIZES.items() for method in METHODS]
    )
    command = [sys.executable, str(HERE / "peaks.py"), str(folder / "scratch")]
    done = subprocess.run(command, env=environment, input=cases, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line.removeprefix("peak: ")) for line in done.stdout.splitlines() if line.startswith("peak: ")]
    return {(case["model"], case["method"]): case for case in found}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", SIZES)
def test_the_estimate_is_near_what_a_run_takes(peaks, model, method, record_property):
    case = peaks[model, method]
    used, estimated = (case[name] >> 20 for name in ("used", "estimated"))
    record_property("estimated_mib", estimated)
    record_property("used_mib", used)
    assert estimated == pytest.approx(used, rel=CLOSE), f"estimated {estimated} MiB, used {used} MiB: {case['parts']}"
