"""The checkpoint law: manifest last, digests, the one before, retention."""

import pytest
import torch

from tunesmith_api.artifacts import CheckpointManifest, DataCursor
from tunesmith_store.errors import Retryable
from tunesmith_store.store import LocalStore
from tunesmith_trainer.checkpoint import Checkpointer, RunState, load_snapshot, restore, take_snapshot

URI = "s3://bucket/job/checkpoints"
CURSOR = DataCursor(epoch=0, step_in_epoch=1, examples_seen=8)


class Trained:
    """A model and its optimizer after some steps."""

    def __init__(self, steps=0):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.state = RunState()
        for _ in range(steps):
            self.step()

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 3)).pow(2).sum().backward()
        self.optimizer.step()
        self.state.step += 1
        self.state.history.append({"step": self.state.step, "loss": 1.0})

    def snapshot(self):
        return take_snapshot(self.model, self.optimizer, self.state)


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def make(store, tmp_path):
    def build(keep=3, digest="d", into=store):
        return Checkpointer(
            store=into, uri=URI, folder=tmp_path / "private", run_digest=digest, keep_last=keep,
            describe={"max_steps": 9, "seed": 1, "world_size": 2, "attempt": 1}, log=lambda *lines: None,
        )  # fmt: skip

    return build


def save(checkpointer, *steps):
    trained = Trained()
    while trained.state.step < max(steps):
        trained.step()
        if trained.state.step in steps:
            checkpointer.save(trained.snapshot(), CURSOR)
    checkpointer.wait()
    return trained


def steps_in(store):
    return sorted({int(info.uri.split("step-")[1][:8]) for info in store.list(URI)})


def newest(checkpointer):
    found = checkpointer.fetch_newest()
    return None if found is None else found[0].step


def test_a_restored_run_takes_the_very_same_next_step(make):
    trained = save(make(), 3)
    manifest, folder = make().fetch_newest()
    other = Trained()
    snapshot = load_snapshot(folder)
    restore(snapshot, other.model, other.optimizer)
    assert snapshot.state == trained.state
    assert manifest.cursor == CURSOR
    trained.step()
    other.step()
    assert torch.equal(trained.model.weight, other.model.weight)


def test_a_snapshot_does_not_follow_training(make):
    trained = Trained(1)
    snapshot = trained.snapshot()
    before = snapshot.weights["weight"].clone()
    trained.step()
    assert torch.equal(snapshot.weights["weight"], before)
    assert snapshot.state.step == 1


def test_there_is_nothing_before_the_first(make):
    assert make().fetch_newest() is None


@pytest.mark.parametrize("stop_at", range(4))
def test_a_torn_upload_does_not_exist(make, store, stop_at):
    save(make(), 2)

    class Torn(LocalStore):
        written = 0

        def _count(self):
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
    with pytest.raises(Retryable):
        save(make(into=torn), 4)
    assert newest(make()) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make, store, damage):
    save(make(), 2, 4)
    path = store._path(f"{URI}/step-00000004/weights.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[-1] ^= 1
        path.write_bytes(data[:-4] if damage == "truncate" else data)
    assert newest(make()) == 2


def test_an_unreadable_manifest_is_passed_over(make, store):
    save(make(), 2, 4)
    store.put_bytes(f"{URI}/step-00000004/manifest.json", b"{")
    assert newest(make()) == 2


def test_another_runs_checkpoint_is_neither_used_nor_deleted(make, store):
    save(make(digest="other"), 6)
    assert newest(make()) is None
    save(make(keep=1), 2, 4)
    assert newest(make()) == 4
    assert steps_in(store) == [4, 6]


def test_overwriting_a_step_first_makes_the_old_one_vanish(make, store):
    save(make(digest="other"), 2)

    class Dies(LocalStore):
        def upload(self, path, uri):
            raise Retryable("killed at the first file")

    with pytest.raises(Retryable):
        save(make(into=Dies(store._root)), 2)
    assert make(digest="other").fetch_newest() is None


def test_the_newest_few_are_kept_and_torn_ones_removed(make, store):
    store.put_bytes(f"{URI}/step-00000001/weights.safetensors", b"torn")
    save(make(keep=2), 2, 4, 6, 8)
    assert steps_in(store) == [6, 8]


def test_retention_that_fails_does_not_fail_the_run(make, store):
    class Stubborn(LocalStore):
        def delete(self, uri):
            if "00000002" in uri and uri.endswith("safetensors"):
                raise PermissionError(uri)
            super().delete(uri)

    save(make(keep=1, into=Stubborn(store._root)), 2, 4)
    assert newest(make()) == 4


def test_a_failed_save_is_raised_at_the_next_look(make, store):
    class Full(LocalStore):
        def upload(self, path, uri):
            raise Retryable("no space")

    checkpointer = make(into=Full(store._root))
    checkpointer.save(Trained(1).snapshot(), CURSOR)
    with pytest.raises(Retryable, match="no space"):
        checkpointer.wait()


def test_the_manifest_says_all_that_resuming_needs(make, store):
    save(make(), 4)
    manifest = CheckpointManifest.from_json(store.get_bytes(f"{URI}/step-00000004/manifest.json"))
    assert (manifest.step, manifest.plan_digest, manifest.max_steps, manifest.world_size) == (4, "d", 9, 2)
    assert {entry.path for entry in manifest.files} == {"optimizer.safetensors", "state.json", "weights.safetensors"}


def test_weights_of_another_model_are_refused(make):
    save(make(), 1)
    _, folder = make().fetch_newest()
    other = torch.nn.Linear(3, 2, bias=False)
    with pytest.raises(Retryable, match="not this model's"):
        restore(load_snapshot(folder), other, torch.optim.AdamW(other.parameters()))
