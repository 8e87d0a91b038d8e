"""Time goes on steadily, whatever is done to the clock on the wall."""

from tunesmith_operator.engine.clock import BELIEVED_SECONDS, SteadyClock

HOUR = 3600.0


class Clocks:
    def __init__(self):
        self.wall, self.steady = 1_000_000.0, 50.0
        self.clock = SteadyClock(lambda: self.wall, lambda: self.steady)

    def after(self, seconds, jump=0.0):
        """What the clock says, as seconds beside the wall clock that nobody has touched."""
        self.steady += seconds
        self.wall += seconds + jump
        return self.clock.now().timestamp() - (1_000_000.0 + self.steady - 50.0)


def test_a_clock_that_runs_on_is_followed_and_so_is_its_drift():
    clocks = Clocks()
    assert clocks.after(10) == 0
    assert sum(clocks.after(60, jump=1.0) for _ in range(10)) == sum(range(1, 11))


def test_a_jump_is_not_believed_at_once_and_is_forgotten_when_it_is_taken_back():
    clocks = Clocks()
    assert clocks.after(10, jump=3 * HOUR) == 0
    assert clocks.after(BELIEVED_SECONDS / 2) == 0
    assert clocks.after(10, jump=-3 * HOUR) == 0
    assert clocks.after(BELIEVED_SECONDS) == 0


def test_a_jump_that_stays_is_believed():
    clocks = Clocks()
    assert clocks.after(10, jump=-HOUR) == 0
    assert clocks.after(BELIEVED_SECONDS + 1) == -HOUR


def test_a_clock_that_is_set_again_and_again_is_not_believed():
    clocks = Clocks()
    jumps = (HOUR, -HOUR, 2 * HOUR, -3 * HOUR) * 10
    assert {clocks.after(BELIEVED_SECONDS / 3, jump=jump) for jump in jumps} <= {0.0, HOUR * 0}
