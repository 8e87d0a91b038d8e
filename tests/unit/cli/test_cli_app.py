"""The command itself: help comes at once, refusals have no traceback and their own exit code."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith_api.keys import ExitCode
from tunesmith_cli.run import Options

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "transformers", "ray", "kopf", "kubernetes", "pydantic", "cel")


def tunesmith(*arguments, text=None):
    return subprocess.run(
        [sys.executable, "-m", "tunesmith_cli", *arguments], capture_output=True, text=True, input=text, cwd=ROOT
    )


def test_help_names_the_command_and_its_options():
    done = tunesmith("run", "--help")
    assert done.returncode == 0
    for word in ("--file", "--set", "--volume", "--work-dir", "Ctrl-C"):
        assert word in done.stdout


def test_help_loads_nothing_heavy():
    program = f"import sys, tunesmith_cli.__main__; print([m for m in {HEAVY} if m in sys.modules])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-f", "nowhere.yaml"], ["error: nowhere.yaml: No such file"]),
        (["-f", "manifests/samples/modeldeployment.yaml"], ["holds ModelDeployment"]),
        (
            ["-f", "manifests/samples/finetunejob.yaml", "--set", "spec.training.learningRate=2", "--set", "spec.task=Chat"],
            ['error: spec.task: Unsupported value: "Chat"'],
        ),
        (
            ["-f", "manifests/samples/finetunejob.yaml", "--set", "spec.training.learningRate=2"],
            ['error: spec.training.learningRate: Invalid value: 2: learningRate must lie between 0 and 1'],
        ),
        (["-f", "manifests/samples/finetunejob.yaml", "--set", "spec.model.uri=pvc://m/x"], ["--volume m=FOLDER"]),
    ],
)  # fmt: skip
def test_a_refusal_is_a_line_on_standard_error(arguments, words):
    done = tunesmith("run", *arguments)
    assert done.returncode == ExitCode.INVALID_INPUT
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_plan_says_what_a_sample_would_make_and_what_it_lacks():
    done = tunesmith("plan", "-f", "manifests/samples/finetunejob.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Job sentiment-1, 2 pods" in done.stdout
    assert "--model" in done.stdout


def test_plan_refuses_as_run_does():
    done = tunesmith("plan", "-f", "manifests/samples/finetunejob.yaml", "--set", "spec.task=Chat", "-o", "json")
    assert done.returncode == ExitCode.INVALID_INPUT
    assert done.stdout == ""
    assert 'error: spec.task: Unsupported value: "Chat"' in done.stderr


def test_a_missing_option_is_told_without_a_traceback():
    done = tunesmith("run")
    assert done.returncode == 2
    assert "--file" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_to_go_on_with_can_be_pasted_into_a_shell():
    options = Options("my job.yaml", ["spec.training.maxSteps=10"], ["m=/data/m"], Path("/big disk"))
    assert options.command() == (
        "tunesmith run -f 'my job.yaml' --set spec.training.maxSteps=10 --volume m=/data/m --work-dir '/big disk'"
    )
