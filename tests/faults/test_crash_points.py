"""The operator dies after each write of a whole lifecycle in turn, once it took effect and before it heard the answer."""

import pytest

from support.simulation.lifecycle import live

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
    assert [write.verb for write in writes].count("create") == 13


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
