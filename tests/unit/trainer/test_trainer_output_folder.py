"""What lies in the folder of the output is nobody's loss: foreign files are named, a second run is kept out."""

import pytest

from support.plans import training_plan
from tunesmith_api.artifacts import FileEntry, ModelManifest
from tunesmith_api.keys import MODEL_MANIFEST, Reason
from tunesmith_store.errors import UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.group.leases import MISSED, FolderLease, held_leases, lease_of
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
    with pytest.raises(UserError, match=r"files of ml/job, which did not end: model\.safetensors"):
        check_output(store, PLAN, OTHER)


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
    mine = lease_of(PLAN, OURS).model_copy(update={"uid": uid, "host": "elsewhere", "name": uid, **changes})
    return FolderLease(store, OUTPUT, "spec.output.uri", mine, (said if said is not None else []).append, sleep)


def never(seconds):
    raise AssertionError("nobody is waited for")


def test_a_second_run_is_refused_while_the_first_lives(store):
    first = lease(store, "first", never)
    first.take()
    said = []
    with pytest.raises(
        UserError, match=r"spec\.output\.uri: ml/first is running and writes into pvc://b/tuned"
    ) as found:
        lease(store, "second", lambda seconds: first.renew(), said).take()
    assert found.value.reason is Reason.FOLDER_IN_USE
    assert "looking if it still lives" in said[0]
    assert find_lease(store, OUTPUT).uid == "first"


def test_a_run_that_is_gone_is_followed_after_a_few_missed_renewals(store):
    lease(store, "first", never).take()
    slept = []
    lease(store, "second", slept.append).take()
    assert len(slept) == MISSED
    assert find_lease(store, OUTPUT).uid == "second"


def test_a_run_that_ends_meanwhile_is_followed_at_once(store):
    first = lease(store, "first", never)
    first.take()
    lease(store, "second", lambda seconds: first.release()).take()
    assert find_lease(store, OUTPUT).uid == "second"


def test_the_same_job_and_what_said_that_it_ended_are_not_waited_for(store):
    lease(store, "first", never).take()
    first = lease(store, "first", never)
    first.take()
    first.release(keep=True)
    lease(store, "second", never).take()


def test_a_process_that_is_gone_from_this_machine_is_not_waited_for(store):
    first = lease_of(PLAN, OURS)
    lease(store, "first", never, host=first.host, pid=2**22 + 1).take()
    lease(store, "second", never).take()


def test_a_run_that_was_taken_for_dead_neither_renews_nor_publishes(store):
    first = lease(store, PLAN.uid, never)
    first.take()
    check_lease(store, PLAN)
    lease(store, "second", lambda seconds: None).take()
    first.renew()
    first.release()
    assert find_lease(store, OUTPUT).uid == "second"
    with pytest.raises(UserError, match=r"taken over by ml/second .*nothing is published"):
        check_lease(store, PLAN)


def test_a_run_holds_both_folders_and_leaves_them_as_they_were(store):
    def holders():
        return [getattr(find_lease(store, uri), "uid", None) for uri in (PLAN.checkpoint_uri, PLAN.output_uri)]

    with held_leases(store, PLAN, OURS, print):
        assert holders() == [PLAN.uid, PLAN.uid]
        publish(store, OURS, "model.safetensors")
    assert holders() == [None, None]
    store.delete(f"{OUTPUT}/{MODEL_MANIFEST}")
    with pytest.raises(RuntimeError), held_leases(store, PLAN, OURS, print):
        raise RuntimeError
    assert names(store) == ["model.safetensors", LEASE], "half written: whose it is stays"
    assert find_lease(store, OUTPUT).released
    check_output(store, PLAN, OURS)
