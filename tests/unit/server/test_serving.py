"""How one engine takes another's place: in which order, with how much memory, and what remains where that fails."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith_api.keys import Reason
from tunesmith_api.plan import ServingPlan
from tunesmith_server.engines.base import LocalAdapter
from tunesmith_server.serving import MARGIN, Serving
from tunesmith_store.errors import Retryable, UserError

PLAN = ServingPlan(
    name="smol", namespace="n", uid="u", revision="smol-r1", model_uri="s3://models/m", quantization="Q8_0", engine="LlamaCpp",
    context_length=64, parallel_requests=1, artifact_uri="s3://models/a",
)  # fmt: skip
A, B, BAD, MUTE = (LocalAdapter(name, Path(name), name * 4) for name in ("a", "b", "bad", "mute"))


class Rig:
    """A launcher and a front that write down what is asked of them."""

    needs = 100

    def __init__(self) -> None:
        self.done: list[str] = []
        self.full = False

    def start(self, adapters=()):
        names = "+".join(it.name for it in adapters) or "none"
        if BAD in adapters or self.full:
            raise UserError(Reason.SERVER_FAILED, "it can't be loaded")
        self.done.append(f"start {names}")
        return SimpleNamespace(
            url=names, models={"smol": {}, **{it.name: {} for it in adapters}}, answers=lambda: MUTE not in adapters,
            close=lambda: self.done.append(f"close {names}"), is_alive=lambda: True,
            vocabulary=0, tools=True, failure=None, loads_adapters=False,
        )  # fmt: skip

    def hold(self) -> None:
        self.done.append("hold")

    def serve(self, url, limits, digests) -> None:
        self.done.append(f"serve {url}: {','.join(limits.models)}")


@pytest.fixture
def rig(monkeypatch):
    monkeypatch.setattr("tunesmith_server.serving.spare_memory", lambda: 1 << 40)
    return Rig()


@pytest.fixture
def serving(rig):
    found = Serving(PLAN, rig)
    found.start(())
    rig.done.clear()
    return found


def test_where_there_is_room_the_new_one_answers_before_the_old_one_goes(serving, rig):
    serving.change([A, B], rig)
    assert rig.done == ["start a+b", "serve a+b: smol,a,b", "close none"]
    assert serving.digests == {"a": "aaaa", "b": "bbbb"}
    rig.done.clear()
    serving.change([A, B], rig)
    assert rig.done == []


def test_where_there_is_none_requests_wait(serving, rig, monkeypatch):
    monkeypatch.setattr("tunesmith_server.serving.spare_memory", lambda: MARGIN + rig.needs - 1)
    serving.change([A], rig)
    assert rig.done == ["hold", "close none", "start a", "serve a: smol,a"]


@pytest.mark.parametrize(("adapters", "failure"), [([BAD], UserError), ([A, MUTE], Retryable)])
def test_what_cannot_be_loaded_changes_nothing_and_is_tried_once(adapters, failure, serving, rig):
    with pytest.raises(failure):
        serving.change(adapters, rig)
    serving.change(adapters, rig)
    assert [it for it in rig.done if it.startswith(("serve", "close none"))] == []
    assert (serving.digests, serving.is_alive()) == ({}, True)
    assert rig.done.count("start a+mute") == rig.done.count("close a+mute")


def test_without_room_what_was_served_is_loaded_again(serving, rig, monkeypatch):
    monkeypatch.setattr("tunesmith_server.serving.spare_memory", lambda: 0)
    serving.change([A], rig)
    rig.done.clear()
    with pytest.raises(UserError):
        serving.change([A, BAD], rig)
    assert rig.done == ["hold", "close a", "start a", "serve a: smol,a"]
    assert (serving.digests, serving.is_alive()) == ({"a": "aaaa"}, True)


def test_a_pod_that_cannot_load_even_that_again_has_to_start_anew(serving, rig, monkeypatch):
    monkeypatch.setattr("tunesmith_server.serving.spare_memory", lambda: 0)
    rig.full = True
    with pytest.raises(UserError):
        serving.change([A], rig)
    assert not serving.is_alive()


def test_a_pod_whose_adapters_cannot_be_loaded_serves_the_model(rig):
    serving = Serving(PLAN, rig)
    serving.start([A, BAD])
    assert (rig.done, serving.digests) == (["start none"], {})
    serving.change([A, BAD], rig)
    assert rig.done == ["start none"]
