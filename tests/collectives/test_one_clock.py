"""No wait outlasts the timeout of its group, behind other calls neither, whoever waits and in whatever order."""

import contextlib
import gc
import os
import signal
import time
import weakref

import pytest
import torch
import torch.distributed as dist

import faults
import flashcomm
import ranks
from calls import all_reduce_of_ones, check, failure, meeting, new_group
from events import dawdle
from flashcomm.errors import PeerLost, TimedOut
from flashcomm.transports.shared.memory import InMemory
from thorough import thorough

TIMEOUT_S = 2.0
SLACK_S = 1.5
"""Two timeouts one after the other take longer, on a busy machine too."""
NAMES = ("all_to_all", "two_step", "hierarchical", "plain", "all_gather", "all_to_all", "one_step")
"""Calls over each transport of a group and over both levels, in an order that crosses them."""


def start_all(async_op: bool = False) -> list:
    return [faults.call(name, dist.group.WORLD, async_op) for name in NAMES]


def wait_behind_a_rank_that_is_stopped(last: str, backwards: bool) -> float:
    """Seconds until all calls have ended that were under way when a rank stopped."""
    start_all()
    for work in start_all(async_op=True):
        work.wait()
    dist.barrier()
    faults.shorten(TIMEOUT_S)
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    start = time.monotonic()
    works = start_all(async_op=True)
    # A synchronous call waits in the lane for those before it.
    calls = [lambda: faults.call(last, dist.group.WORLD), *(work.wait for work in works)]
    for call in reversed(calls) if backwards else calls:
        failure(call, (PeerLost, TimedOut))
    return time.monotonic() - start


@pytest.mark.parametrize("by", ranks.WAYS)
@pytest.mark.parametrize(("last", "backwards"), [thorough("plain", False), ("hierarchical", True)])
def test_calls_behind_one_that_times_out_end_with_it(last, backwards, by, fresh_ranks):
    world = fresh_ranks(4, env=ranks.WAYS[by])
    try:
        world.start(wait_behind_a_rank_that_is_stopped, last, backwards)
        outcomes = [world.outcome(rank) for rank in (1, 2, 3)]
    finally:
        world.processes[0].kill()
    for good, seconds in outcomes:
        assert good, seconds
        assert seconds < TIMEOUT_S + SLACK_S, outcomes


@contextlib.contextmanager
def calls_in_shared_memory_fail():
    # A Run is of a class with slots: replace what it calls.
    run, InMemory.__call__ = InMemory.__call__, None
    try:
        yield
    finally:
        InMemory.__call__ = run


def one_rank_fails_in_the_middle():
    """A call in shared memory that fails on one rank: the others must not wait for it until the timeout."""
    group = new_group()
    check(all_reduce_of_ones(group))
    if dist.get_rank() == 0:
        with calls_in_shared_memory_fail(), pytest.raises(TypeError):
            all_reduce_of_ones(group)
    return failure(lambda: all_reduce_of_ones(group))


def test_a_rank_that_fails_in_the_middle_of_shared_memory_lets_the_others_know():
    (own, _), *others = ranks.shared(3).run(one_rank_fails_in_the_middle)
    assert "rank 0 failed in the middle of an earlier call" in own
    for message, seconds in others:
        # Or what another of them, which heard it first, has passed on.
        assert "has given up after an error while rank" in message
        assert seconds < 10


def an_asynchronous_call_fails() -> bool:
    """Whether the group still holds the values of a call that failed."""
    group = new_group()
    check(all_reduce_of_ones(group))
    x = torch.ones(64, 256)
    values = weakref.ref(x)
    with calls_in_shared_memory_fail():
        work = flashcomm.all_reduce(x, "fp32", group, algorithm="two_step", async_op=True)
        with contextlib.suppress(TypeError):
            work.wait()
            raise AssertionError("the call did not fail")
    del x, work
    gc.collect()
    return values() is not None


def test_a_group_does_not_hold_the_values_of_a_call_that_failed():
    assert ranks.shared(2).run(an_asynchronous_call_fails) == [False, False]


class NeverInVain:
    """A poll that finds something whenever it looks: as if the peer were always faster."""

    def __init__(self, poll):
        self.poll, self.register, self.unregister = (lambda _: poll.poll()), poll.register, poll.unregister


def one_rank_trickles():
    """(Message, seconds) of a call whose peer sends its bytes one by one, without an end; None on that peer."""
    group, shape = new_group(), (4096, 1024)
    check(all_reduce_of_ones(group, shape))
    faults.shorten(TIMEOUT_S)
    link = meeting(group).lane.messages.link
    if dist.get_rank() == 0:
        link._poll = NeverInVain(link._poll)
        return failure(lambda: all_reduce_of_ones(group, shape), TimedOut)
    connection = link._sockets[0]
    # The message's length, half of the values in fp32, and its bytes until the other side gives up.
    rest = iter((4096 // 2 * 1024 * 4).to_bytes(8, "big"))
    with contextlib.suppress(ConnectionError):
        while True:
            with contextlib.suppress(BlockingIOError):
                connection.send(bytes([next(rest, 0)]))
            with contextlib.suppress(BlockingIOError):
                if not connection.recv(1 << 20):
                    return None
            dawdle(1)


def test_a_peer_that_trickles_does_not_stretch_a_call(fresh_ranks):
    (message, seconds), _ = fresh_ranks(2, env=ranks.WAYS["connections"]).run(one_rank_trickles)
    assert "rank 1 did not come within the group's timeout" in message
    assert seconds < TIMEOUT_S + SLACK_S
