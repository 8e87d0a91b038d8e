"""`tunesmith run` with the real trainer: Ray, a tiny model, files of this machine or an S3 store; no cluster."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from assets.tiny import CHATML, llama
from support import installed
from tunesmith_api.artifacts import ModelManifest
from tunesmith_api.keys import MODEL_MANIFEST, ExitCode

ROOT = Path(__file__).resolve().parents[3]


def conversations(count, offset=0):
    """Small sums, of different lengths."""
    for number in range(offset, offset + count):
        a, b = number * 7 % 23, number * 5 % 19
        question = {"role": "user", "content": f"add {a} and {b}" + " please" * (number % 3)}
        yield {"messages": [question, {"role": "assistant", "content": f"{a + b}"}]}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("model"), template=CHATML)


@pytest.fixture
def home(tmp_path, model):
    """A folder with a name that no URI could hold; in it a model, data, and `manifest()`."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "model").symlink_to(model)
    write_rows(folder / "data" / "train.jsonl", conversations(64))
    write_rows(folder / "data" / "eval.jsonl", conversations(8, 1000))
    return folder


def write_manifest(folder, **spec):
    base = {
        "model": {"uri": "./model"},
        "dataset": {"train": {"uri": "./data/train.jsonl"}, "eval": {"uri": "data/eval.jsonl"}},
        "method": {"type": "Full"},
        "training": {"maxSteps": 6, "learningRate": 1e-2, "globalBatchSize": 8, "microBatchSize": 4, "maxLength": 64},
        "checkpoint": {"uri": "./checkpoints", "everySteps": 5},
        "output": {"uri": "./tuned"},
    }
    document = {"apiVersion": "tunesmith.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "sums"}}
    path = folder / "job.yaml"
    path.write_text(json.dumps({**document, "spec": {**base, **spec}}))  # PyYAML would write 1e-2 without quotes
    return path


FROM_SOURCES = (sys.executable, "-m", "tunesmith_cli")
SOURCES = {"PYTHONPATH": f"{ROOT / 'crds'}:{ROOT / 'operator'}:{ROOT / 'trainer_image'}"}


class Run:
    """One command, its lines as they come."""

    def __init__(self, *arguments, program=FROM_SOURCES, **environ):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {**(SOURCES if program is FROM_SOURCES else {}), "OMP_NUM_THREADS": "1", **environ}
        self.process = subprocess.Popen(
            [*map(str, program), "run", *map(str, arguments)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._came:
                self.lines.append(line.rstrip("\n"))
                self._came.notify_all()

    @property
    def output(self):
        return "\n".join(self.lines)

    def wait_for(self, words, seconds=280):
        with self._came:
            found = self._came.wait_for(lambda: words in self.output or self.process.poll() is not None, seconds)
        assert found, self.output
        assert words in self.output, self.output

    def wait(self, seconds=280):
        code = self.process.wait(timeout=seconds)
        self._reader.join(timeout=10)
        return code


@pytest.fixture
def run(tmp_path):
    started = []

    def begin(*arguments, **environ):
        # a path too long for Ray's sockets, as people have them
        started.append(Run(*arguments, "--work-dir", tmp_path / "temporary files", **environ))
        return started[-1]

    yield begin
    for it in started:
        it.process.kill()
        it.process.wait()
    assert list((tmp_path / "temporary files").iterdir()) == [], "all that was temporary is gone"


def test_there_is_one_way_to_install_it():
    assert installed.pip_lines() == {"pip install '.[cli]'"}


def test_as_installed_it_makes_a_model_with_a_report_of_a_manifest_with_paths(home, run, tmp_path):
    (line,) = installed.pip_lines()
    programs = installed.install(line, tmp_path / "environment")
    job = run("-f", write_manifest(home, workers={"replicas": 2}), program=[programs / "tunesmith"])
    assert job.wait() == ExitCode.SUCCESS, job.output
    manifest = ModelManifest.from_json((home / "tuned" / MODEL_MANIFEST).read_bytes())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {entry.path for entry in manifest.files}
    assert manifest.metrics["evalLoss"] < manifest.metrics["evalLossBefore"]
    assert (home / "tuned" / "report.html").stat().st_size > 1000
    for words in (
        "2 of 2 workers have joined",
        "step 6/6",
        f"model   {home}/tuned",
        f"report  {home}/tuned/report.html",
        "AutoModelForCausalLM",
    ):
        assert words in job.output
    rows = [line.split() for line in job.lines]
    assert [row for row in rows if row[:2] == ["eval", "loss"]]
    assert "pvc://" not in job.output
    assert "Traceback" not in job.output


def test_ctrl_c_saves_and_the_same_command_goes_on(home, run):
    arguments = (
        "-f",
        write_manifest(home),
        "--set",
        "spec.training.maxSteps=80",
        "--set",
        "spec.training.learningRate=1e-3",
    )
    first = run(*arguments)
    first.wait_for("step 10/80")
    first.process.send_signal(signal.SIGINT)
    assert first.wait() == ExitCode.INTERRUPTED, first.output
    assert "is saved in " + str(home / "checkpoints") in first.output
    assert "--set spec.training.maxSteps=80" in first.output
    again = run(*arguments)
    again.wait_for("resumed from step")
    steps = [int(line.split()[1].split("/")[0]) for line in first.lines if line.startswith("step ")]
    resumed = int(again.output.split("resumed from step ")[1].split()[0])
    assert resumed >= max(steps), "nothing that was shown is trained again"
    assert again.wait() == ExitCode.SUCCESS, again.output


def test_a_bad_row_is_told_by_file_and_line(home, run):
    rows = [*conversations(3), {"messages": "no list"}, *conversations(3, 9)]
    write_rows(home / "data" / "train.jsonl", rows)
    job = run("-f", write_manifest(home))
    assert job.wait() == ExitCode.INVALID_INPUT, job.output
    assert "error: DatasetInvalid" in job.output
    assert f"{home}/data/train.jsonl line 4" in job.output
    assert "Traceback" not in job.output


def test_a_bucket_is_used_with_the_keys_of_the_environment(home, run, object_store, bucket):
    object_store.put_folder(home / "model", f"{bucket}/model")
    write_rows(home / "data" / "small.jsonl", conversations(8))
    job = run(
        "-f", write_manifest(home, storage={"endpointURL": object_store.endpoint_url}),
        "--set", f"spec.model.uri={bucket}/model", "--set", f"spec.output.uri={bucket}/tuned",
        "--set", "spec.training.maxSteps=2", "--set", "spec.dataset.eval=null",
        **object_store.credentials.environment(),
    )  # fmt: skip
    assert job.wait() == ExitCode.SUCCESS, job.output
    assert f"model   {bucket}/tuned" in job.output
    assert json.loads(object_store.get_bytes(f"{bucket}/tuned/{MODEL_MANIFEST}"))["digest"]
