"""What a person sees while it trains and when it has ended."""

import io

import pytest
from rich.console import Console

from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.reports import CheckpointRef, MemoryFacts, ModelRef, Outcome, ProgressReport, TerminationReport
from tunesmith_api.v1alpha1 import FineTuneJob
from tunesmith_cli import screen
from tunesmith_cli.local_paths import LocalPaths
from tunesmith_cli.run import KILLED, local_plan
from tunesmith_cli.summary import print_outcome

TRAINING = ProgressReport(
    state="Training",
    global_step=12,
    max_steps=80,
    loss=0.41234,
    eval_loss=0.9,
    tokens_per_second=1234.5,
    eta_seconds=185,
)


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=160, color_system=None)


def test_the_numbers_of_a_step_are_told_as_far_as_they_are_known():
    assert screen.numbers_of(TRAINING) == "12/80  loss 0.4123  eval 0.9  1,234 tokens/s  3m05s left"
    assert screen.numbers_of(ProgressReport()) == ""


@pytest.mark.parametrize(("seconds", "words"), [(9, "9s left"), (60, "1m00s left"), (3700, "1h01m left")])
def test_time_left_is_short(seconds, words):
    assert screen.numbers_of(TRAINING.model_copy(update={"eta_seconds": seconds})).endswith(words)


def test_before_the_first_step_the_phase_is_told():
    preparing = ProgressReport(state="Preparing", message="checking data, model and buckets")
    assert screen.phase_of(ProgressReport(state="Preparing")) == "preparing"
    assert screen.phase_of(preparing) == "checking data, model and buckets"
    assert screen.phase_of(ProgressReport(state="Starting", restarts=1)) == "starting again"


def test_on_a_terminal_lines_go_above_a_bar_that_replaces_the_lines_of_steps():
    seen = console(terminal=True)
    bar = screen.open_screen(seen)
    bar.line("2 of 2 workers have joined")
    bar.line("step 12/80  epoch 0.15  loss 0.4123")
    bar.report(TRAINING)
    bar.close()
    text = seen.file.getvalue()
    assert "2 of 2 workers have joined" in text
    assert "epoch 0.15" not in text
    assert "training" in text
    assert "12/80  loss 0.4123" in text
    assert "━" in text


def test_elsewhere_there_are_plain_lines_without_control_characters():
    seen = console(terminal=False)
    lines = screen.open_screen(seen)
    lines.report(ProgressReport(state="Preparing", message="checking data"))
    lines.report(ProgressReport(state="Preparing", message="checking data"))
    lines.line("step 1/80  [bold]not markup[/bold]")
    lines.report(TRAINING)
    lines.close()
    assert seen.file.getvalue() == "checking data\nstep 1/80  [bold]not markup[/bold]\ntraining\n"


def test_a_trainer_that_writes_no_lines_is_heard_of_now_and_then(monkeypatch):
    monkeypatch.setattr(screen, "PLAIN_INTERVAL_SECONDS", 0.0)
    seen = console(terminal=False)
    lines = screen.open_screen(seen)
    for _ in range(2):
        lines.report(TRAINING)
    assert "training  12/80  loss 0.4123" in seen.file.getvalue()


# --- the end ---


def plan(folder, **spec):
    base = {
        "model": {"uri": "s3://models/base"}, "dataset": {"train": {"uri": "s3://data/train.jsonl"}},
        "checkpoint": {"uri": "s3://checkpoints/x"}, "output": {"uri": "s3://models/x"},
    }  # fmt: skip
    document = {"metadata": {"name": "x"}, "spec": {**base, **spec}}
    paths = LocalPaths()
    paths.localize(document, folder)
    return local_plan(FineTuneJob.model_validate(document)), paths


def end(tmp_path, report, code, **spec):
    made, paths = plan(tmp_path, **spec)
    seen = console(terminal=False)
    print_outcome(seen, made, report, code, paths, "tunesmith run -f job.yaml")
    return seen.file.getvalue()


def succeeded(uri, **metrics):
    model = ModelRef(uri=uri, digest="d", size_bytes=1)
    return TerminationReport(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, model=model, metrics=metrics)


def test_success_shows_numbers_before_and_after_and_where_model_and_report_are(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").touch()
    report = succeeded(
        f"pvc://local{tmp_path}/out",
        evalLoss=0.5,
        evalLossBefore=2.25,
        evalAccuracy=0.9,
        evalAccuracyBefore=0.5,
        steps=80,
    )
    text = end(tmp_path, report, 0, output={"uri": "./out"}, task="SequenceClassification")
    rows = [line.split() for line in text.splitlines()]
    assert ["eval", "loss", "2.25", "0.5"] in rows
    assert ["eval", "accuracy", "0.5", "0.9"] in rows
    assert ["steps", "80"] in rows
    assert f"model   {tmp_path}/out\n" in text
    assert f"report  {tmp_path}/out/report.html\n" in text
    assert f"AutoModelForSequenceClassification.from_pretrained loads the model from {tmp_path}/out." in text
    assert "pvc://" not in text


def test_a_model_in_a_bucket_is_named_by_its_uri(tmp_path):
    text = end(tmp_path, succeeded("s3://models/x"), 0, output={"uri": "s3://models/x", "save": "Adapter"})
    assert "report  s3://models/x/report.html" in text
    assert "the code that puts the adapter onto its base is in README.md of a copy of s3://models/x." in text


def test_after_ctrl_c_it_says_how_to_go_on(tmp_path):
    report = TerminationReport(
        outcome=Outcome.INTERRUPTED,
        reason=Reason.INTERRUPTED,
        checkpoint=CheckpointRef(step=7, uri="s3://checkpoints/x/7"),
    )
    text = end(tmp_path, report, ExitCode.INTERRUPTED)
    assert "step 7 is saved in s3://checkpoints/x/7" in text
    assert "\n  tunesmith run -f job.yaml\n" in text
    nothing = end(tmp_path, report.model_copy(update={"checkpoint": None}), ExitCode.INTERRUPTED)
    assert "nothing to save yet" in nothing
    assert "goes on from the last checkpoint" in end(tmp_path, None, KILLED)


def test_a_failure_names_its_reason_and_field_by_this_machines_paths(tmp_path):
    message = f"spec.dataset.train.uri: pvc://local{tmp_path}/t.jsonl line 3: not JSON"
    report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.DATASET_INVALID, message=message)
    text = end(tmp_path, report, ExitCode.INVALID_INPUT)
    assert f"error: DatasetInvalid: spec.dataset.train.uri: {tmp_path}/t.jsonl line 3: not JSON" in text


def test_memory_that_ran_out_comes_with_the_command_that_needs_less(tmp_path):
    facts = MemoryFacts(micro_batch_size=8, peak_bytes=1, limit_bytes=2)
    report = TerminationReport(outcome=Outcome.FAILED, reason=Reason.OUT_OF_MEMORY, message="too big", memory=facts)
    text = end(tmp_path, report, ExitCode.OUT_OF_MEMORY)
    assert "tunesmith run -f job.yaml --set spec.training.microBatchSize=4" in text


def test_a_trainer_that_left_no_word_is_told_by_its_signal(tmp_path):
    assert "the trainer ended without a word (killed by signal 9)" in end(tmp_path, None, -9)
