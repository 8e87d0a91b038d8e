"""The checkpoint law: manifest last, digests, the one before, retention; and that steps never wait for an upload."""

import threading
from collections import namedtuple

import pytest
import torch

from tunesmith_api.artifacts import CheckpointManifest, DataCursor
from tunesmith_api.keys import Reason
from tunesmith_store.errors import Retryable, UserError
from tunesmith_store.volumes import VolumeStore
from tunesmith_trainer.checkpoint import Checkpointer, RunState
from tunesmith_trainer.distributed.collectives import Group

URI = "pvc://claim/job/checkpoints"
CURSOR = DataCursor(epoch=0, step_in_epoch=1, examples_seen=8)
Usage = namedtuple("Usage", "total free")


class Trained:
    """A model and its optimizer after some steps."""

    def __init__(self, steps=0, optimizer=None):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=0.1))
        self.optimizer = make(self.model.parameters())
        self.state = RunState()
        for _ in range(steps):
            self.step()

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.arange(12.0).reshape(4, 3)).sub(1).pow(2).sum().backward()
        self.optimizer.step()
        self.state.step += 1
        self.state.history.append({"step": self.state.step, "loss": 1.0})

    def weights(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def save(self, checkpointer, **options):
        return checkpointer.save(self.model, self.optimizer, self.state, CURSOR, **options)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "volumes" / "claim").mkdir(parents=True)
    return VolumeStore(tmp_path / "volumes")


@pytest.fixture
def lines():
    return []


@pytest.fixture
def make(store, tmp_path, lines):
    def build(keep=3, digest="d", into=store, **options):
        return Checkpointer(
            store=into, uri=URI, folder=tmp_path / "scratch", group=Group(), run_digest=digest, keep_last=keep,
            describe={"max_steps": 9, "seed": 1, "attempt": 1}, log=lines.append, **options,
        )  # fmt: skip

    return build


def save(checkpointer, *steps, metrics=None):
    """Train to the last of the steps and save at each, waiting as a loop with long steps would."""
    trained = Trained()
    while trained.state.step < max(steps):
        trained.step()
        if trained.state.step in steps:
            assert trained.save(checkpointer, metric=(metrics or {}).get(trained.state.step))
            checkpointer.wait()
    return trained


def steps_in(store):
    return sorted({int(info.uri.split("step-")[1][:8]) for info in store.list(URI)})


def newest(checkpointer):
    other = Trained()
    state = checkpointer.restore(other.model, other.optimizer)
    return None if state is None else state.step


def test_nothing_is_replaced_in_a_folder_that_another_run_has_taken(make, store):
    save(make(), 1)
    there = store.list(URI)

    def held():
        raise UserError(Reason.FOLDER_IN_USE, "taken over")

    with pytest.raises(UserError, match="taken over"):
        save(make(held=held), 1)
    assert store.list(URI) == there


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_run_takes_the_very_same_next_step(make, kind):
    trained = Trained(3, OPTIMIZERS[kind])
    checkpointer = make()
    trained.save(checkpointer)
    assert checkpointer.wait().step == 3
    other = Trained(0, OPTIMIZERS[kind])
    assert make().restore(other.model, other.optimizer) == trained.state
    trained.step()
    other.step()
    assert same(trained.weights(), other.weights())


def test_an_8_bit_optimizer_takes_the_very_same_next_step(make):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def build(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 8))
        return model, bitsandbytes.optim.AdamW8bit(model.parameters(), lr=0.01)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.linspace(0, 1, 256).reshape(2, 128)).pow(2).sum().backward()
        optimizer.step()

    model, optimizer = build(0)
    step(model, optimizer)
    step(model, optimizer)
    assert any(
        value.dtype == torch.uint8 for value in optimizer.state[model[0].weight].values() if torch.is_tensor(value)
    )
    checkpointer = make()
    checkpointer.save(model, optimizer, RunState(step=2), CURSOR)
    checkpointer.wait()
    other, its_optimizer = build(1)
    make().restore(other, its_optimizer)
    assert its_optimizer.state[other[0].weight]["step"] == 2
    step(model, optimizer)
    step(other, its_optimizer)
    assert same(model.state_dict(), other.state_dict())


def test_going_back_takes_the_optimizer_back_too(make):
    checkpointer = make()
    trained = save(checkpointer, 2)
    trained.step()
    trained.step()
    checkpointer.restore(trained.model, trained.optimizer)
    trained.step()
    assert same(trained.weights(), Trained(3).weights())


def test_frozen_parameters_are_left_out(make, store):
    trained = Trained()
    trained.model[0].weight.requires_grad_(False)
    checkpointer = make()
    trained.save(checkpointer)
    checkpointer.wait()
    index = store.get_bytes(f"{URI}/step-00000000/part-00000.json")
    assert b'"0.bias"' in index
    assert b'"0.weight"' not in index


class Held(VolumeStore):
    """Uploads wait until they are let go."""

    def __init__(self, root):
        super().__init__(root)
        self.go = threading.Event()

    def upload(self, path, uri):
        assert self.go.wait(20)
        super().upload(path, uri)


def test_what_is_saved_does_not_follow_training(make, store):
    held = Held(store._root)
    checkpointer = make(into=held)
    trained = Trained(1)
    before = trained.weights()
    trained.save(checkpointer)
    trained.step()
    held.go.set()
    checkpointer.wait()
    other = Trained()
    assert make().restore(other.model, other.optimizer).step == 1
    assert same(other.weights(), before)


def test_a_save_that_falls_due_during_another_is_put_off_and_not_waited_for(make, store):
    held = Held(store._root)
    checkpointer = make(into=held)
    trained = Trained(1)
    assert trained.save(checkpointer)
    assert checkpointer.ready == 0.0
    checkpointer.note_ready(checkpointer.ready)
    trained.step()
    assert not trained.save(checkpointer)
    assert checkpointer.owed
    held.go.set()
    checkpointer.wait()
    assert trained.save(checkpointer)
    assert not checkpointer.owed
    checkpointer.wait()
    assert steps_in(store) == [1, 2]
    assert 0 < checkpointer.stall_seconds < 2


def test_there_is_no_manifest_before_all_ranks_have_said_that_they_are_ready(make, store):
    checkpointer = make()
    Trained(1).save(checkpointer)
    checkpointer._part.result(20)
    assert checkpointer.ready == 1.0
    assert f"{URI}/step-00000001/manifest.json" not in {info.uri for info in store.list(URI)}
    checkpointer.note_ready(1.0)
    assert checkpointer.wait().step == 1
    assert newest(make()) == 1


@pytest.mark.parametrize(("how", "counts"), [({"must": True}, False), ({"defer": False}, True)])
def test_a_save_that_must_not_be_put_off_waits_for_the_one_in_flight(make, store, how, counts):
    held = Held(store._root)
    checkpointer = make(into=held)
    trained = Trained(1)
    trained.save(checkpointer)
    trained.step()
    before = checkpointer.stall_seconds
    threading.Timer(0.4, held.go.set).start()
    assert trained.save(checkpointer, **how)
    assert (checkpointer.stall_seconds - before > 0.35) is counts, "the end of a run holds up no step"
    assert checkpointer.wait().step == 2
    assert steps_in(store) == [1, 2]


def test_there_is_nothing_before_the_first(make):
    trained = Trained()
    before = trained.weights()
    assert make().restore(trained.model, trained.optimizer) is None
    assert make().wait() is None
    assert same(trained.weights(), before)


WRITES = 5  # weights, optimizer, state, index, manifest


@pytest.mark.parametrize("stop_at", range(WRITES))
def test_a_torn_upload_does_not_exist(make, store, stop_at):
    save(make(), 2)

    class Torn(VolumeStore):
        written = 0
        lock = threading.Lock()

        def _count(self):
            with self.lock:
                if self.written == stop_at:
                    raise Retryable("the pod was killed here")
                self.written += 1

        def upload(self, path, uri):
            self._count()
            super().upload(path, uri)

        def put_bytes(self, uri, data):
            self._count()
            super().put_bytes(uri, data)

    torn = Torn(store._root)
    with pytest.raises(Retryable, match="killed here"):
        save(make(into=torn), 4)
    assert newest(make()) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize(
    "name", ["weights-00000-00000.safetensors", "optimizer-00000-00000.safetensors", "state.json", "part-00000.json"]
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make, store, damage, name, lines):
    save(make(), 2, 4)
    path = store._path(f"{URI}/step-00000004/{name}")
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data[:-4] if damage == "truncate" else data)
    assert newest(make()) == 2
    assert any("step-00000004" in line and name in line for line in lines)


def test_where_the_only_checkpoint_is_damaged_nothing_is_changed(make, store):
    save(make(), 2)
    path = store._path(f"{URI}/step-00000002/optimizer-00000-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    other = Trained()
    before = other.weights()
    assert make().restore(other.model, other.optimizer) is None
    assert same(other.weights(), before)
    assert not other.optimizer.state


def test_an_unreadable_manifest_is_passed_over(make, store):
    save(make(), 2, 4)
    store.put_bytes(f"{URI}/step-00000004/manifest.json", b"{")
    assert newest(make()) == 2


def test_another_runs_checkpoint_is_neither_used_nor_deleted(make, store, lines):
    save(make(digest="other"), 6)
    assert newest(make()) is None
    assert any("another plan" in line for line in lines)
    save(make(keep=1), 2, 4)
    assert newest(make()) == 4
    assert steps_in(store) == [4, 6]


def test_overwriting_a_step_first_makes_the_old_one_vanish(make, store):
    save(make(digest="other"), 2)

    class Dies(VolumeStore):
        def upload(self, path, uri):
            raise Retryable("killed at the first file")

    with pytest.raises(Retryable):
        save(make(into=Dies(store._root)), 2)
    assert newest(make(digest="other")) is None


def test_the_newest_few_are_kept_and_torn_ones_removed(make, store):
    store.put_bytes(f"{URI}/step-00000001/weights-00001-00000.safetensors", b"torn")
    save(make(keep=2), 2, 4, 6, 8)
    assert steps_in(store) == [6, 8]


@pytest.mark.parametrize(("higher", "best"), [(True, 4), (False, 2)])
def test_the_best_is_kept_besides_the_newest(make, store, higher, best):
    metrics = {2: 0.1, 4: 0.9, 6: 0.5, 8: float("nan")}
    save(make(keep=1, keep_best=True, higher_is_better=higher), 2, 4, 6, 8, 9, metrics=metrics)
    assert steps_in(store) == [best, 9]
    other = Trained(5)
    optimizer = other.optimizer.state_dict()
    assert make(higher_is_better=higher).restore_best(other.model).step == best
    assert same(other.weights(), Trained(best).weights())
    assert other.optimizer.state_dict()["state"][0]["step"] == optimizer["state"][0]["step"] == 5


def test_without_an_evaluation_there_is_no_best(make):
    save(make(keep_best=True), 2)
    assert make().restore_best(Trained().model) is None


def test_retention_that_fails_does_not_fail_the_run(make, store, lines):
    class Stubborn(VolumeStore):
        def delete(self, uri):
            if "00000002" in uri and uri.endswith("safetensors"):
                raise PermissionError(uri)
            super().delete(uri)

    save(make(keep=1, into=Stubborn(store._root)), 2, 4)
    assert newest(make()) == 4
    assert any("old checkpoints were not deleted" in line for line in lines)


def test_a_failed_save_is_raised_with_the_next_settling_and_only_once(make, store):
    class Full(VolumeStore):
        def upload(self, path, uri):
            raise UserError(Reason.STORAGE_UNWRITABLE, "refused")

    checkpointer = make(into=Full(store._root))
    trained = Trained(1)
    trained.save(checkpointer)
    checkpointer._part.exception(20)
    assert checkpointer.ready < 0
    with pytest.raises(UserError, match="refused"):
        checkpointer.note_ready(checkpointer.ready)
    assert checkpointer.wait() is None


def test_the_manifest_says_all_that_resuming_needs(make, store):
    save(make(), 4, metrics={4: 0.25})
    manifest = CheckpointManifest.from_json(store.get_bytes(f"{URI}/step-00000004/manifest.json"))
    assert (manifest.step, manifest.plan_digest, manifest.max_steps, manifest.world_size) == (4, "d", 9, 1)
    assert (manifest.cursor, manifest.metric) == (CURSOR, 0.25)
    written = {info.uri.rsplit("/", 1)[1]: info.size for info in store.list(f"{URI}/step-00000004")}
    assert {entry.path: entry.size for entry in manifest.files} | {"manifest.json": written["manifest.json"]} == written
    assert {name.rpartition(".")[2] for name in written} == {"json", "safetensors"}, "nothing is pickled"


def test_going_back_before_a_step_makes_what_came_after_vanish(make):
    trained = save(make(), 2, 4, 6)
    state = make().restore(trained.model, trained.optimizer, before=6)
    assert state.step == 4
    assert same(trained.weights(), Trained(4).weights())
    assert newest(make()) == 4


def test_weights_of_another_model_are_refused(make):
    save(make(), 1)
    other = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(Retryable, match="not this model's"):
        make().restore(other, torch.optim.AdamW(other.parameters()))


def test_compiled_and_plain_models_read_each_others_checkpoints(make):
    trained = Trained(2)
    checkpointer = make()
    compiled = torch.compile(trained.model)
    checkpointer.save(compiled, trained.optimizer, trained.state, CURSOR)
    checkpointer.wait()
    other = Trained()
    assert make().restore(other.model, other.optimizer).step == 2
    assert same(other.weights(), trained.weights())


# ---- disk


def test_a_disk_without_room_leaves_a_save_out_with_one_warning(make, store, lines):
    free = [100_000_000]
    checkpointer = make(disk_usage=lambda folder: Usage(1_000_000_000, free[0]))
    save(checkpointer, 1)
    free[0] = 49_999_999
    save(checkpointer, 2, 3)
    assert newest(make()) == 1
    warnings = [line for line in lines if "no room" in line]
    assert len(warnings) == 1
    assert "50 MB must stay free" in warnings[0]
    free[0] = 100_000_000
    save(checkpointer, 4)
    assert newest(make()) == 4
    assert steps_in(store) == [1, 4], "what the left-out ones began is gone"


def test_a_last_save_without_room_says_what_is_missing(make):
    checkpointer = make(disk_usage=lambda folder: Usage(1_000_000_000, 3_000_000))
    trained = Trained(1)
    trained.save(checkpointer, must=True)
    with pytest.raises(UserError, match="only 3 of 1,000 MB are free") as caught:
        checkpointer.wait()
    assert caught.value.reason is Reason.DISK_FULL


def test_a_disk_that_fills_up_while_writing_counts_as_full(make, lines, monkeypatch):
    import errno

    from tunesmith_trainer.checkpoint import snapshot

    def full(pieces, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpointer = make()
    monkeypatch.setattr(snapshot, "write_file", full)
    save(checkpointer, 1)
    assert checkpointer.newest is None
    assert any("No space left" in line for line in lines)


def test_a_restore_without_room_says_what_is_missing(make):
    save(make(), 1)
    trained = Trained()
    with pytest.raises(UserError, match="fetch the checkpoint of step 1") as caught:
        make(disk_usage=lambda folder: Usage(1_000_000_000, 3_000_000)).restore(trained.model, trained.optimizer)
    assert caught.value.reason is Reason.DISK_FULL


def test_nothing_stays_on_the_disk(make, tmp_path):
    checkpointer = make()
    trained = save(checkpointer, 1, 2)
    checkpointer.restore(trained.model, trained.optimizer)
    checkpointer.wait()
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []


# ---- the run's state


def test_a_state_of_an_older_version_gets_defaults_and_of_a_newer_one_is_read_too():
    state = RunState.from_json(b'{"step": 4, "restarts": 1, "from_the_future": 2}')
    assert state == RunState(step=4, restarts=1, began_unix=state.began_unix)
    assert state.skipped_steps == []


def test_a_state_survives_its_json():
    state = RunState(step=3, best_metric=0.5, best_step=2, skipped_steps=[7], scaler={"scale": 65536.0}, rollbacks=1)
    assert RunState.from_json(state.to_json()) == state
