"""A pod whose engine is a process of its own ends when that one does: it is never Running and dead."""

from types import SimpleNamespace

from tunesmith_api import keys
from tunesmith_api.keys import ExitCode, Reason
from tunesmith_api.reports import Outcome, TerminationReport
from tunesmith_server import __main__
from tunesmith_store.errors import Retryable


def test_a_pod_ends_with_its_engine_and_reports_why(monkeypatch, tmp_path):
    report = tmp_path / "report.json"
    looks = iter((None, None, Retryable("vLLM's server has ended (signal SIGSEGV)", Reason.SERVER_FAILED)))

    class Engine:
        failure = property(lambda self: next(looks))

    monkeypatch.setenv(keys.ENV_TERMINATION_LOG, str(report))
    for name, stub in (
        ("HealthServer", lambda: None),
        ("read_plan", lambda _: None),
        ("_start", lambda *_: (Engine(), None)),
        ("signal", SimpleNamespace(signal=lambda *_: None, SIGTERM=15, SIGINT=2)),
        ("LOOK_SECONDS", 0.001),
    ):
        monkeypatch.setattr(__main__, name, stub)
    monkeypatch.setattr(__main__.logging, "basicConfig", lambda **_: None)
    assert __main__.main() == ExitCode.CRASHED
    found = TerminationReport.from_json(report.read_text())
    assert (found.outcome, found.reason) == (Outcome.FAILED, Reason.SERVER_FAILED)
    assert "SIGSEGV" in found.message
