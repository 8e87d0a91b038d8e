"""How many server pods there are to be, by what was heard of their requests: the arithmetic of autoscaling."""

from datetime import timedelta

import pytest

from support import make
from tunesmith_api.v1alpha1.autoscaling import Autoscaling
from tunesmith_operator.core.modeldeployment.autoscaling import Scale, Scaler
from tunesmith_operator.core.pods.figures import Figures, read_figures
from tunesmith_operator.core.pods.load import GAP, PARTS, Load, heard

WINDOW = timedelta(seconds=60)
ASKED_AGAIN = {"scale_down_delay_seconds": 60, "idle_seconds": 120}


def load(*rounds, step=3.0, pods=1):
    """What is heard every `step` seconds: requests in flight, or (in flight, served, answering pods)."""
    found = None
    for number, it in enumerate(rounds):
        in_flight, served, answering = it if isinstance(it, tuple) else (it, 0, pods)
        said = {str(pod): Figures(in_flight=in_flight / pods, served=served) for pod in range(answering)}
        found = heard(found, said, pods, pods, WINDOW, make.at(number * step))
    return found


def scaled(load, desired=1, since=None, taking_over=False, may_sleep=True, now=None, **spec):
    settings = Autoscaling(**{"min_replicas": 0, "max_replicas": 8, **ASKED_AGAIN, **spec})
    scaler = Scaler(spec=settings, target=4, load=load, taking_over=taking_over, may_sleep=may_sleep)
    moment = now or (load.heard_at if load is not None else make.at())
    return scaler.next(Scale(desired, desired, "before", since), moment)


@pytest.mark.parametrize(
    ("why", "rounds", "wanted"),
    [
        ("what is meant for them", (4, 4), 1),
        ("a little more", (4.3, 4.3), 1),
        ("twice as much", (8, 9), 2),
        ("a burst that the next hearing doesn't find", (2, 30), 1),
        ("more than there may be pods for", (500, 500), 8),
    ],
)
def test_pods_are_added_where_more_is_in_flight_than_they_are_meant_for(why, rounds, wanted):
    assert scaled(load(*rounds)).desired == wanted, why


def test_the_status_says_why():
    assert scaled(load(9, 9)) == Scale(3, 1, "9 requests were in flight, 4 for each replica.", make.at(3))


def test_pods_are_taken_away_when_fewer_were_enough_for_the_whole_window():
    busy = [20] + [6] * 19
    assert scaled(load(*busy), desired=5).desired == 5, "57 seconds are known"
    assert scaled(load(*busy, 6, 6, 6), desired=5).desired == 5, "20 were in flight within the window"
    quiet = load(*busy, *[6] * 8)
    assert scaled(quiet, desired=5) == Scale(2, 5, "6 requests at most were in flight for 1m.", quiet.heard_at)
    assert scaled(quiet, desired=5, since=quiet.heard_at - timedelta(seconds=59)).desired == 5, "changed just now"
    assert scaled(quiet, desired=5, taking_over=True).desired == 5, "never while a revision takes over"
    assert scaled(quiet, desired=5, min_replicas=4).desired == 4
    soon = scaled(load(*busy), desired=5).next_look
    assert soon is not None
    assert soon <= load(*busy).heard_at + timedelta(seconds=5), "time alone may take some away"


def test_a_pod_that_is_not_heard_may_be_busy():
    rounds = [(0, 0, 2)] * 10 + [(0, 0, 1)] + [(0, 0, 2)] * 14
    assert scaled(load(*rounds, pods=2), desired=2).desired == 2
    assert scaled(load(*rounds, *[(0, 0, 2)] * 16, pods=2), desired=2, min_replicas=1).desired == 1


def test_what_is_due_before_pods_have_said_so_is_looked_at_again():
    idle = load(*[0] * 40)
    assert idle.heard_at == make.at(117)
    late = scaled(idle, now=make.at(121))
    assert (late.desired, late.next_look) == (1, make.at(122)), "nobody else would: the next hearing is no news"
    stale = scaled(idle, now=make.at(300))
    assert stale.next_look is not None
    assert stale.next_look > make.at(300)


def test_idle_pods_go_but_for_those_that_were_asked_meanwhile():
    idle = [0] * 41
    assert scaled(load(*idle[:-1])).desired == 1
    gone = scaled(load(*idle))
    assert (gone.desired, gone.message) == (0, "Nothing was asked for 2m.")
    assert scaled(load(*idle[:-1])).next_look == make.at(120)
    assert scaled(load(*[(0, number // 20, 1) for number in range(41)])).desired == 1, "answered between two hearings"
    for keeps in ({"taking_over": True}, {"may_sleep": False}, {"min_replicas": 1}, {"since": make.at(1)}):
        assert scaled(load(*idle), **keeps).desired == 1, keeps
    assert scaled(load(*idle), desired=3).desired == 0


@pytest.mark.parametrize(("rounds", "wanted"), [((0, 0), 0), ((0, 1), 1), ((0, 11), 3), ((0, (0, 1, 1)), 1)])
def test_the_first_request_wakes_it(rounds, wanted):
    assert scaled(load(*rounds), desired=0, since=make.at(1)).desired == wanted


def test_a_request_before_it_went_to_sleep_wakes_nobody():
    assert scaled(load(0, (0, 1, 1), (0, 1, 1)), desired=0, since=make.at(5)).desired == 0


def test_a_new_revision_wakes_it_to_prove_itself():
    assert scaled(load(0), desired=0, taking_over=True).desired == 1


@pytest.mark.parametrize("stale", [None, load(400, 400)])
def test_what_is_not_known_changes_nothing_but_bounds_hold(stale):
    later = make.at(3600)
    assert scaled(stale, desired=3, now=later).desired == 3
    assert scaled(stale, desired=9, now=later).message == "autoscaling.maxReplicas is 8."
    assert scaled(stale, desired=9, now=later).desired == 8
    assert scaled(stale, desired=1, min_replicas=2, now=later).desired == 2


def test_a_gap_in_what_was_heard_begins_anew():
    before = load(*[0] * 41)
    after = heard(before, {"0": Figures()}, 1, 1, WINDOW, before.heard_at + GAP + timedelta(seconds=1))
    assert after.since == after.active_at == after.heard_at
    assert len(load(*range(1000)).peaks) <= PARTS + 2


def test_of_many_pods_some_stand_for_all():
    found = heard(None, {"a": Figures(in_flight=3), "b": Figures(in_flight=1)}, 2, 10, WINDOW, make.at())
    assert found.in_flight == 20


def test_what_is_refused_for_want_of_a_key_keeps_nobody_awake():
    text = 'http_requests_total{path="other",code="401"} 70\nhttp_requests_total{path="/v1/x",code="200"} 3\n'
    found = read_figures(f"{text}http_requests_in_flight 2.0\ntunesmith_activator_requests_held 5.0\n")
    assert (found.served, found.in_flight) == (3, 7)
    assert isinstance(heard(None, {"a": found}, 1, 1, WINDOW, make.at()), Load)
