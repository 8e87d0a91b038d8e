"""Ranks that hang are named, ranks that are gone are told from them, and long work of rank 0 is no hang."""

import os
import signal
import socket
import time

import pytest

TIMEOUT = 4.0


def name_of(rank):
    return f"rank {rank} (worker {rank // 2})"


def as_rank(rank, world_size, address, what, answers):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from tunesmith_trainer.distributed.collectives import join_group

    torch.set_num_threads(1)
    group = join_group(rank, world_size, address, torch.device("cpu"), TIMEOUT, name=name_of(rank))
    try:
        with group.explained():
            group.barrier()
            answers.put((rank, what(group, rank)))
    except Exception as error:
        answers.put((rank, error))
    answers.close()
    answers.join_thread()
    os._exit(0)  # a group of which one hangs can't be taken down in order


def hang_if(culprit):
    def what(group, rank):
        if rank == culprit:
            os.kill(os.getpid(), signal.SIGSTOP)
        return group.sum([1.0])

    return what


class Hang:
    def __init__(self, culprit):
        self.culprit = culprit

    def __call__(self, group, rank):
        return hang_if(self.culprit)(group, rank)


class HangAmongNeighbours:
    def __call__(self, group, rank):
        import torch

        mesh = group.mesh({"copies": 2, "shares": 2})
        for name in ("shares", "copies"):  # a warm-up: gloo connects lazily
            torch.distributed.all_reduce(torch.ones(1), group=mesh.get_group(name))
        if rank == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        for name in ("shares", "copies"):
            torch.distributed.all_reduce(torch.ones(1), group=mesh.get_group(name))
        return


class HangOneAndComeLate:
    def __call__(self, group, rank):
        if rank == 0:
            time.sleep(1.5 * TIMEOUT)
        return hang_if(2)(group, rank)


class Vanish:
    def __call__(self, group, rank):
        if rank == 1:
            os._exit(1)
        return group.sum([1.0])


class WorkLong:
    def __call__(self, group, rank):
        def work():
            time.sleep(TIMEOUT + 2)
            return {"made by": rank}

        return group.on_first(work)


class MeetLate:
    def __call__(self, group, rank):
        time.sleep(rank * (TIMEOUT + 1))
        met = group.exchange(rank * 10)
        group.on_first(lambda: None)  # rank 0 serves the store: it must not be gone first
        return met


class Agree:
    def __call__(self, group, rank):
        return group.sum([rank, 1.0]), group.max([rank]), group.all_gather(f"r{rank}"), group.broadcast(rank + 7)


@pytest.fixture
def run(forks):
    processes = []

    def start(what, world_size, expected):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        answers = forks.Queue()
        for rank in range(world_size):
            processes.append(forks.Process(target=as_rank, args=(rank, world_size, address, what, answers)))
            processes[-1].start()
        return dict(answers.get(timeout=280) for _ in range(expected))

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("culprit", [1, 2])
def test_who_hangs_is_named_by_those_that_wait(run, culprit):
    from tunesmith_api.keys import ExitCode, Reason
    from tunesmith_trainer.distributed.collectives import HungCollective

    answers = run(Hang(culprit), 3, expected=2)
    assert culprit not in answers
    for error in answers.values():
        assert isinstance(error, HungCollective), error
        assert error.ranks == [culprit]
        assert (error.reason, error.exit_code) == (Reason.COLLECTIVE_TIMEOUT, ExitCode.COLLECTIVE_TIMEOUT)
        assert error.message.startswith(f"{name_of(culprit)} didn't take part")
        assert "collectiveTimeoutSeconds" in error.message


def test_who_hangs_is_named_where_ranks_meet_in_parts_of_the_group(run):
    from tunesmith_trainer.distributed.collectives import HungCollective

    for error in run(HangAmongNeighbours(), 4, expected=3).values():
        assert isinstance(error, HungCollective), error
        assert error.ranks == [3]


def test_who_comes_when_the_others_have_given_up_names_who_hangs(run):
    from tunesmith_trainer.distributed.collectives import HungCollective

    for error in run(HangOneAndComeLate(), 3, expected=2).values():
        assert isinstance(error, HungCollective), error
        assert error.ranks == [2]


def test_rank_0_is_named_when_its_store_is_silent(run):
    from tunesmith_trainer.distributed.collectives import HungCollective

    answers = run(Hang(0), 2, expected=1)
    assert isinstance(answers[1], HungCollective), answers[1]
    assert answers[1].ranks == [0]
    assert answers[1].message.startswith(f"{name_of(0)} didn't take part")


def test_a_rank_that_is_gone_is_lost_not_hung(run):
    from tunesmith_store.errors import Retryable
    from tunesmith_trainer.distributed.collectives import HungCollective

    answers = run(Vanish(), 2, expected=1)
    assert isinstance(answers[0], Retryable), answers[0]
    assert not isinstance(answers[0], HungCollective)
    assert "lost contact" in answers[0].message


def test_work_of_rank_0_may_take_longer_than_a_collective(run):
    assert run(WorkLong(), 2, expected=2) == {0: {"made by": 0}, 1: {"made by": 0}}


def test_ranks_may_meet_late(run):
    assert run(MeetLate(), 2, expected=2) == {0: [0, 10], 1: [0, 10]}


def test_ranks_agree(run):
    answer = ([3.0, 3.0], [2.0], ["r0", "r1", "r2"], 7)
    assert run(Agree(), 3, expected=3) == dict.fromkeys(range(3), answer)
