"""The parts of the local cluster's driver that need no cluster."""

import datetime
import json
import os
import subprocess

import pytest

from devcluster import ClusterSpec, UnsupportedMachine, audit, binaries, images, machine, paths, progress, state
from devcluster.processes import ProcessId, boot_id


@pytest.mark.parametrize("name", ["", "Upper", "-lead", "trail-", "a" * 33, "dot.ted", "../up"])
def test_a_name_that_cannot_name_folders_and_cgroups_is_refused(name):
    with pytest.raises(ValueError, match="lower-case"):
        ClusterSpec(name=name)


def test_node_counts_are_bounded():
    with pytest.raises(ValueError, match="nodes=10"):
        ClusterSpec(nodes=10)


def test_gang_scheduling_serves_its_api_group_only_where_the_gate_is_on():
    assert ClusterSpec().runtime_config == "scheduling.k8s.io/v1beta1=true"
    assert ClusterSpec(feature_gates={}).runtime_config == ""
    assert ClusterSpec(feature_gates={"B": False, "A": True}).feature_gates_flag == ["--feature-gates=A=true,B=false"]


def test_without_root_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UnsupportedMachine, match=r"needs root.*sudo"):
        machine.ensure(0, progress.silent)


def test_elsewhere_than_on_linux_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UnsupportedMachine, match="needs Linux: this is darwin"):
        machine.ensure(0, progress.silent)


def test_missing_programs_are_named_by_their_package(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.missing_packages(0) == ["iproute2", "util-linux"]
    assert "runc" in machine.missing_packages(1)


def test_a_cache_that_a_node_would_cover_is_refused(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("TUNESMITH_CACHE", "/var/lib/ci/cache")
    with pytest.raises(UnsupportedMachine, match="TUNESMITH_CACHE"):
        machine.ensure(1, progress.silent)


def test_the_key_of_the_programs_follows_sources_and_go(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("go.mod", "go.sum", "main.go", "sub/other.go"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(paths, "SOURCE", tmp_path)
    first = binaries.key("1.26.6")
    assert first == binaries.key("1.26.6")
    assert first != binaries.key("1.26.8")
    (tmp_path / "sub/other.go").write_text("changed")
    assert first != binaries.key("1.26.6")


@pytest.mark.parametrize(("said", "version"), [("go1.26.8", (1, 26, 8)), ("go1.26", (1, 26, 0)), ("devel", None)])
def test_go_versions_are_read(said, version, tmp_path):
    program = tmp_path / "go"
    program.write_text(f"#!/bin/sh\necho {said}\n")
    program.chmod(0o755)
    assert binaries.go_version(str(program)) == version


def test_a_written_image_is_identified_by_its_content(tmp_path):
    first, second = tmp_path / "1.tar", tmp_path / "2.tar"
    images.write(first, "localhost/a:1", {"/x": b"1"}, ["/x"])
    images.write(second, "localhost/a:1", {"/x": b"2"}, ["/x"])
    assert images.identify(first).names == ("localhost/a:1",)
    assert images.identify(first).config != images.identify(second).config
    images.write(second, "localhost/a:1", {"/x": b"1"}, ["/x"])
    assert first.read_bytes() == second.read_bytes()


def test_a_line_of_the_audit_log_that_is_still_being_written_is_left_for_later(tmp_path):
    def event(hour):
        return {"requestReceivedTimestamp": f"2026-01-01T{hour:02}:00:00.000000Z", "hour": hour}

    log = tmp_path / "audit.log"
    log.write_text(json.dumps(event(1)) + "\n" + json.dumps(event(3)) + "\n" + json.dumps(event(4))[:20])
    assert [entry["hour"] for entry in audit.events(log, None)] == [1, 3]
    noon = datetime.datetime(2026, 1, 1, 2, tzinfo=datetime.UTC)
    assert [entry["hour"] for entry in audit.events(log, noon)] == [3]
    assert list(audit.events(tmp_path / "none", None)) == []


def test_a_process_is_known_by_its_start_and_a_zombie_is_dead():
    child = subprocess.Popen(["sleep", "60"])
    process = ProcessId.of(child.pid)
    assert process.alive
    assert not ProcessId(child.pid, process.started + 1).alive
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.alive
    child.wait()


def test_state_survives_writing_and_reading_and_a_dead_owner_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    made = state.create("c-1", ClusterSpec(name="c", nodes=1))
    made.nodes = [state.NodeState(1, "slot", init=ProcessId(1, 2))]
    made.write()
    assert state.read(made.folder) == made
    assert made.running
    made.owner = ProcessId(made.owner.pid, made.owner.started + 1)
    assert not made.running
    made.owner, made.boot = ProcessId.of(os.getpid()), boot_id() + "x"
    assert not made.running
    (made.folder / state.FILE).write_text('{"half":')
    assert state.read(made.folder) is None
