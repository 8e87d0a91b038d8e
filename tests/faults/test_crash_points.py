"""The operator dies after each write of a whole lifecycle in turn, once it took effect and before it heard the answer."""

import pytest

from support.simulation.lifecycle import live, roll_out

SLICES = 4


@pytest.fixture(scope="module")
def undisturbed():
    life = live()
    assert life.faults == []
    assert life.simulation.boots == 1
    return life


def test_an_undisturbed_life_writes_nothing_without_need(undisturbed):
    writes = undisturbed.simulation.journal.writes
    end = undisturbed.simulation.journal.deleted_at.values()
    assert [write for write in writes if write.at > min(end)] == [], "what is deleted is let go"
    assert undisturbed.simulation.journal.refused_by_uid == 0
    assert [write.verb for write in writes].count("create") == 14


@pytest.mark.parametrize("part", range(SLICES))
def test_a_crash_after_any_write_changes_nothing_in_the_end(undisturbed, part, record_property):
    count = len(undisturbed.simulation.journal.writes)
    points = range(1 + part, count + 1, SLICES)
    broken = []
    for point in points:
        life = live(lambda it, at=point: it.crash_at.add(at))
        if life.faults or life.final != undisturbed.final:
            broken.append((point, undisturbed.simulation.journal.writes[point - 1], life.faults))
    record_property("crash_points", f"{len(points) - len(broken)}/{len(points)}")
    assert broken == []


@pytest.fixture(scope="module")
def canaries():
    life = roll_out()
    assert life.faults == []
    return life


@pytest.mark.parametrize("part", range(SLICES))
def test_a_crash_after_any_write_of_a_rollout_ends_in_the_right_revision(canaries, part, record_property):
    writes = canaries.simulation.journal.writes
    # how a first revision begins is part of the whole life above
    begin = next(number for number, write in enumerate(writes, 1) if write.name.startswith("chat-r2"))
    points = range(begin + part, len(writes) + 1, SLICES)
    broken = []
    for point in points:
        life = roll_out(lambda it, at=point: it.crash_at.add(at))
        if life.faults or life.final != canaries.final:
            broken.append((point, writes[point - 1], life.faults, life.final))
    record_property("crash_points", f"{len(points) - len(broken)}/{len(points)}")
    assert broken == []
