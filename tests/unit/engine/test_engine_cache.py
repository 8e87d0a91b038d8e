"""The cache of one kind: of one object, the newest version stays, and what is gone never comes back."""

from hypothesis import given
from hypothesis import strategies as st

from tunesmith_operator.engine.cache import GONE_REMEMBERED, Cache, Entry, Name

A, B = Name("ml", "a"), Name("dev", "b")


def entry(version, uid="u1", group="owner"):
    return Entry(uid, version, group, f"{uid}@{version}")


def test_an_older_version_never_replaces_a_newer_one():
    cache = Cache()
    assert cache.put(A, entry(5)) == (True, None)
    assert cache.put(A, entry(4)) == (False, entry(5))
    assert cache.put(A, entry(5)) == (False, entry(5)), "one's own write comes back by the watch"
    assert cache.put(A, entry(6)) == (True, entry(5))
    assert cache.of("owner") == ("u1@6",)


def test_what_is_gone_does_not_come_back_by_a_late_event():
    cache = Cache()
    cache.put(A, entry(5))
    assert cache.drop(A, "u1", 7) == entry(5)
    assert cache.put(A, entry(6)) == (False, None)
    assert cache.of("owner") == ()
    assert cache.put(A, entry(8))[0], "a selector that matches again brings an object back"


def test_a_successor_takes_the_name_and_the_predecessors_end_leaves_it():
    cache = Cache()
    cache.put(A, entry(5))
    cache.put(A, entry(9, uid="u2"))
    assert cache.drop(A, "u1", 8) is None
    assert cache.of("owner") == ("u2@9",)


def test_a_change_of_owner_moves_an_object():
    cache = Cache()
    cache.put(A, entry(5))
    cache.put(A, entry(6, group="other"))
    assert (cache.of("owner"), cache.of("other")) == ((), ("u1@6",))


def test_a_list_prunes_what_it_lacks_but_not_what_is_newer_than_it():
    cache = Cache()
    cache.put(A, entry(5))
    cache.put(B, entry(12, uid="u2"))
    assert cache.prune({A, B}, 10) == [entry(5)]
    assert cache.names(None) == {B}
    assert (cache.names("ml"), cache.names("dev")) == (set(), {B})


def test_only_so_many_ends_are_remembered():
    cache = Cache()
    for number in range(GONE_REMEMBERED + 10):
        cache.drop(A, f"u{number}", 5)
    assert cache.put(A, entry(4, uid="u0"))[0]
    assert not cache.put(B, entry(4, uid=f"u{GONE_REMEMBERED}"))[0]


EVENTS = [("put", 1), ("put", 2), ("put", 3), ("drop", 4)]


@given(st.permutations(EVENTS), st.lists(st.sampled_from(EVENTS)))
def test_in_whatever_order_and_however_often_events_come_the_end_is_the_same(order, again):
    cache = Cache()
    for verb, version in [*order, *again]:
        if verb == "put":
            cache.put(A, entry(version))
        else:
            cache.drop(A, "u1", version)
    assert cache.get(A) is None
    assert cache.of("owner") == ()
