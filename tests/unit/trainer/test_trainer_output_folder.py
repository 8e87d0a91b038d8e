"""What lies in the folder of the output is nobody's loss: foreign files are named, a second run is kept out."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.plans import dataset, training_plan
from tunesmith_api.artifacts import FileEntry, ModelManifest
from tunesmith_api.keys import ENV_VOLUMES, MODEL_MANIFEST, Reason
from tunesmith_api.reports import Outcome
from tunesmith_store.errors import UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.group import driver, preflight
from tunesmith_trainer.group.leases import LAST_RENEWALS, MISSED, FolderLease, held_leases, lease_of
from tunesmith_trainer.loop.export import finished_model, upload
from tunesmith_trainer.loop.output_folder import LEASE, check_lease, check_output, find_lease

BASE = "pvc://b"
OUTPUT = f"{BASE}/tuned"
PLAN = training_plan(BASE)
OURS, OTHER = "1" * 64, "2" * 64


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "b").mkdir(parents=True)
    return VolumeStore(tmp_path / "volumes")


def put(store, *names):
    for name in names:
        store.put_bytes(f"{OUTPUT}/{name}", name.encode())


def publish(store, digest, *names, form=""):
    put(store, *names)
    manifest = ModelManifest(
        digest="d", base_uri="s3://models/base", plan_digest=digest, created_time="2026-01-02T03:04:05+00:00",
        output_form=form, files=tuple(FileEntry(path=name, size=1, sha256="0") for name in names),
    )  # fmt: skip
    store.put_bytes(f"{OUTPUT}/{MODEL_MANIFEST}", manifest.to_json().encode())


def names(store):
    return sorted(info.uri.removeprefix(f"{OUTPUT}/") for info in store.list(OUTPUT))


# ---- what lies there already


def test_an_empty_folder_and_ones_own_model_are_fine(store):
    check_output(store, PLAN, OURS)
    publish(store, OURS, "model.safetensors")
    check_output(store, PLAN, OURS)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda store: publish(store, OTHER, "model.safetensors"), "finished model of another run .*2026-01-02.*s3://models/base"),
        (lambda store: put(store, "README.md"), "files that this run has not written: README.md"),
        (lambda store: put(store, *"edcba"), "not written: a, b, c and 2 more"),
        (lambda store: put(store, MODEL_MANIFEST), f"not written: {MODEL_MANIFEST}"),
    ],
)  # fmt: skip
def test_what_is_anothers_is_named_and_kept_unless_the_spec_gives_it_up(store, made, words):
    made(store)
    with pytest.raises(
        UserError, match=rf"spec\.output\.uri: {OUTPUT} .*{words}.*spec\.output\.overwrite: true"
    ) as found:
        check_output(store, PLAN, OURS)
    assert found.value.reason is Reason.OUTPUT_EXISTS
    check_output(store, PLAN.model_copy(update={"output_overwrite": True}), OURS)


@pytest.mark.parametrize(
    ("changes", "is_finished"), [({}, True), ({"save": "Adapter"}, False), ({"output_dtype": "FP32"}, False)]
)
def test_a_run_is_finished_when_its_model_is_there_in_the_form_that_is_asked_for(store, changes, is_finished):
    plan = training_plan(BASE, method="LoRA")
    publish(store, OURS, "model.safetensors", form=plan.output_form)
    asked = training_plan(BASE, method="LoRA", **changes)
    check_output(store, asked, OURS)
    assert (finished_model(store, asked, OURS) is not None) == is_finished


def test_quantized_models_of_servers_lie_in_a_subfolder_and_are_no_obstacle(store):
    put(store, "quantized/q8/model.gguf")
    check_output(store, PLAN, OURS)


def test_what_this_run_was_writing_when_it_was_stopped_is_its_own(store):
    lease = FolderLease(store, OUTPUT, "", lease_of(PLAN, OURS))
    lease.take()
    put(store, "model.safetensors")
    check_output(store, PLAN, OURS)
    check_output(store, PLAN, OTHER)  # of the same job
    with pytest.raises(UserError, match=r"files of an unfinished model of ml/job: model\.safetensors"):
        check_output(store, PLAN.model_copy(update={"uid": "u-2"}), OTHER)


def test_hidden_files_are_nobodys_model(store):
    put(store, preflight.PROBE)  # of a run that looks in the same moment whether it may write there
    check_output(store, PLAN, OURS)


def test_nothing_of_an_earlier_model_is_left_beside_the_new_one(store, tmp_path):
    publish(
        store,
        OTHER,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "extra.txt",
        "adapter/a.safetensors",
    )
    put(store, "model.safetensors.index.json", "added_tokens.json", "notes.txt", "quantized/q8/model.safetensors")
    new = tmp_path / "export"
    new.mkdir()
    for name in ("model.safetensors", "config.json"):
        (new / name).write_text(name)
    upload(store, new, OUTPUT)
    assert names(store) == ["config.json", "model.safetensors", "notes.txt", "quantized/q8/model.safetensors"]


# ---- who writes there


def lease(store, uid, sleep=None, said=None, **changes):
    """A run's lease of the output; without `sleep`, nobody may be waited for."""
    mine = lease_of(PLAN, OURS).model_copy(update={"uid": uid, "host": f"of {uid}", "name": uid, **changes})
    return FolderLease(
        store, OUTPUT, "spec.output.uri", mine, (said if said is not None else []).append, sleep or never
    )


def began(*arguments, **changes):
    """The lease of a run that has begun to write."""
    taken = lease(*arguments, **changes)
    taken.wait()
    taken.take()
    return taken


def never(seconds):
    raise AssertionError("nobody is waited for")


def test_a_second_run_is_refused_while_the_first_lives(store):
    first, said = began(store, "first"), []
    words = (
        r"spec\.output\.uri: ml/first is running and writes into pvc://b/tuned.* a folder of its own.*60 seconds after"
    )
    with pytest.raises(UserError, match=words) as found:
        lease(store, "second", lambda seconds: first.renew(), said).wait()
    assert found.value.reason is Reason.FOLDER_IN_USE
    assert "looking for a minute if it still lives" in said[0]
    assert find_lease(store, OUTPUT).uid == "first"


def test_a_run_that_is_gone_is_followed_after_a_few_missed_renewals(store):
    began(store, "first")
    slept = []
    began(store, "second", slept.append)
    assert len(slept) == MISSED
    assert find_lease(store, OUTPUT).uid == "second"


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_ends_meanwhile_is_followed_at_once(store, keep):
    first, slept = began(store, "first"), []
    began(store, "second", lambda seconds: (slept.append(seconds), first.release(keep)))
    assert len(slept) == 1
    assert find_lease(store, OUTPUT).uid == "second"


def test_a_job_that_is_created_again_waits_until_the_pods_of_the_last_have_ended(store):
    last, slept = began(store, "u-1", name="job"), []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) <= LAST_RENEWALS:  # its pods save a checkpoint, and are killed
            last.renew()

    began(store, "u-2", sleep, name="job")
    assert len(slept) == LAST_RENEWALS + MISSED
    with pytest.raises(UserError, match="another ml/job is running"):  # of another cluster
        lease(store, "u-3", lambda seconds: renewed(store), name="job").wait()


def renewed(store):
    found = find_lease(store, OUTPUT)
    store.put_bytes(f"{OUTPUT}/{LEASE}", found.model_copy(update={"renewals": found.renewals + 1}).to_json().encode())


def test_the_next_attempt_of_a_job_that_was_killed_goes_on_at_once_and_the_last_one_leaves_it_alone(store):
    killed = began(store, "first", host="a node that is out of reach")
    again = began(store, "first", host="another node")
    again.renew()
    mine = find_lease(store, OUTPUT)
    killed.renew()
    killed.release()
    killed.release(keep=True)
    assert find_lease(store, OUTPUT) == mine == again.mine
    again.release()
    assert find_lease(store, OUTPUT) is None


def test_what_said_that_it_ended_is_not_waited_for(store):
    began(store, "first").release(keep=True)
    began(store, "second")


def test_a_process_that_is_gone_from_this_machine_is_not_waited_for(store):
    began(store, "first", host=lease_of(PLAN, OURS).host, pid=2**22 + 1)
    began(store, "second")


def test_where_no_process_can_be_looked_for_every_run_is_waited_for(store, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: Path("/nowhere").read_bytes())
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
    local = PLAN.model_copy(update={"uid": ""})
    first, second = (FolderLease(store, OUTPUT, "", lease_of(local, OURS), print, never) for _ in "ab")
    assert first.mine.uid != second.mine.uid
    first.take()
    with pytest.raises(AssertionError, match="nobody is waited for"):
        second.wait()


def test_a_run_that_was_taken_for_dead_neither_renews_nor_writes(store):
    said = []
    first = began(store, PLAN.uid, said=said)
    check_lease(store, PLAN, OUTPUT, "spec.output.uri")
    began(store, "second", lambda seconds: None)
    for _ in range(2):
        first.renew()
    first.release()
    assert find_lease(store, OUTPUT).uid == "second"
    assert said == [f"warning: {OUTPUT} was taken over by ml/second"]
    with pytest.raises(UserError, match=r"spec\.output\.uri: .*taken over by ml/second.*nothing more is written"):
        check_lease(store, PLAN, OUTPUT, "spec.output.uri")


def test_of_two_that_begin_in_the_same_moment_one_writes(store):
    first, second = lease(store, "u-1"), lease(store, "u-2")
    first.wait()
    second.wait()
    first.take()
    second.take()
    check_lease(store, PLAN.model_copy(update={"uid": "u-2"}), OUTPUT, "spec.output.uri")
    with pytest.raises(UserError, match="began in the same moment"):
        check_lease(store, PLAN, OUTPUT, "spec.output.uri")


def test_what_another_run_published_while_it_was_waited_for_is_kept(store, monkeypatch):
    other = began(store, "other")
    monkeypatch.setattr(FolderLease, "wait", lambda lease: publish(store, OTHER, "model.safetensors"))
    with (
        pytest.raises(UserError, match="holds the finished model of another run"),
        held_leases(store, PLAN, OURS, print),
    ):
        pass
    assert find_lease(store, OUTPUT) == other.mine
    assert find_lease(store, PLAN.checkpoint_uri) is None


def test_a_run_that_waited_for_its_like_has_its_model(store, tmp_path, monkeypatch):
    monkeypatch.setenv(ENV_VOLUMES, str(tmp_path / "volumes"))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name, content in {
        "model/config.json": {"model_type": "llama"}, "model/model.safetensors": {}, "model/tokenizer.json": {}, "train.jsonl": row,
    }.items():  # fmt: skip
        store.put_bytes(f"{BASE}/{name}", json.dumps(content).encode())
    plan = training_plan(BASE, dataset=dataset(f"{BASE}/train.jsonl"))
    digest = preflight.check(plan, store, tmp_path, print)
    said = []
    pusher = SimpleNamespace(log=said.append, update=lambda **changes: None, phase=said.append)
    monkeypatch.setattr(
        FolderLease, "wait", lambda lease: publish(store, digest, "model.safetensors", form=plan.output_form)
    )
    report = driver._run(plan, SimpleNamespace(scratch=tmp_path), pusher, 0)
    assert (report.outcome, report.model.uri) == (Outcome.SUCCEEDED, OUTPUT)
    assert "nothing to do" in said[-1]
    assert find_lease(store, OUTPUT) is None


def test_a_run_holds_both_folders_and_leaves_them_as_they_were(store):
    def holders():
        return [getattr(find_lease(store, uri), "uid", None) for uri in (PLAN.checkpoint_uri, PLAN.output_uri)]

    with held_leases(store, PLAN, OURS, print):
        assert holders() == [PLAN.uid, PLAN.uid]
        publish(store, OURS, "model.safetensors")
    assert holders() == [None, None]

    def fails_while_it_publishes_again():
        store.delete(f"{OUTPUT}/{MODEL_MANIFEST}")
        raise RuntimeError

    with pytest.raises(RuntimeError), held_leases(store, PLAN, OURS, print):
        fails_while_it_publishes_again()
    assert names(store) == ["model.safetensors", LEASE], "half written: whose it is stays"
    assert find_lease(store, OUTPUT).released
    check_output(store, PLAN, OURS)
