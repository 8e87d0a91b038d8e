"""docs/operations.md names every metric and setting as it is."""

import re
from pathlib import Path

import yaml
from prometheus_client import Histogram

from tunesmith_operator.adapters.metrics import Metrics
from tunesmith_operator.adapters.progress import PollResult
from tunesmith_operator.engine.pacing import RequestPace

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/operations.md").read_text()


def rows(heading):
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_metric_has_its_row():
    found = {}
    for collector in set(Metrics().registry._collector_to_names):
        (family,) = collector.describe()
        suffix = "_total" if family.type == "counter" else ""
        found[family.name + suffix] = (tuple(collector._labelnames), isinstance(collector, Histogram))
    told = {}
    for name, labels, what in rows("Metrics"):
        told[name.strip("`")] = (tuple(re.findall(r"`(\w+)`", labels)), what.startswith("histogram"))
    assert told == found


def test_the_results_of_polls_are_told():
    (row,) = [what for name, _, what in rows("Metrics") if "progress_polls" in name]
    assert re.findall(r"`(\w+)`", row) == list(PollResult)


def test_settings_and_their_defaults_are_those_of_the_chart():
    values = yaml.safe_load((ROOT / "charts/tunesmith/values.yaml").read_text())
    for name, default, _ in rows("Settings"):
        found = values
        for part in name.strip("`").split("."):
            found = found[part]
        assert str(found) == default, name


def test_how_often_progress_is_written_is_told_as_it_is():
    for jobs, qps, told in rows("Requests"):
        number = int(jobs.removeprefix("up to ").replace(",", ""))
        assert f"{RequestPace(float(qps), 40).progress_seconds(number):g} s" == told
