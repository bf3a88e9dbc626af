"""Connections between real ranks: when they are used, what they refuse, how they end, and that nothing is left."""

import contextlib
import gc
import os
import signal
import socket
import threading

import pytest
import torch
import torch.distributed as dist

import flashcomm
import promises
import ranks
from calls import all_reduce_of_ones, check, failure, hear, meeting, new_group, tell
from events import asleep, wait_for
from flashcomm.collectives import algorithms
from flashcomm.errors import PeerLost
from flashcomm.transports import addresses, connections
from flashcomm.transports.base import Ranks


def connected(group) -> tuple[Ranks, connections.Connections]:
    """The ranks, and the connections of synchronous calls."""
    met = meeting(group)
    assert met.connected, met.why_not
    messages = met.lane.messages
    return messages.ranks, messages.link


def messages_of_all_sizes():
    """All ranks send to all at once, more than the kernel keeps, and nobody receives before all has been sent."""
    us, lines = connected(new_group())
    sizes = [1, 7, 100_000, 30_000_000, 64, 3]
    for way in ("receive first", "send first"):
        gone, come = [], []

        def send(gone=gone):
            for number, size in enumerate(sizes):
                for peer in us.peers:
                    value = 16 * us.rank + number
                    gone.append(lines.send(torch.full((size,), value, dtype=torch.uint8), peer))

        def receive(come=come):
            for number, size in enumerate(sizes):
                for peer in us.peers:
                    part = torch.empty(size, dtype=torch.uint8)
                    come.append((lines.receive(part, peer), part, 16 * peer + number))

        for step in (receive, send) if way == "receive first" else (send, receive):
            step()
        # In another order than they come.
        for transfer, part, value in reversed(come):
            transfer.wait()
            assert (part == value).all()
        for transfer in gone:
            transfer.wait()
            transfer.wait()


@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_of_all_sizes_arrive_in_order(world_size):
    ranks.shared(world_size, by="connections").run(messages_of_all_sizes)


def two_lengths():
    us, lines = connected(new_group())
    sent, expected = (10, 20) if us.rank == 0 else (30, 40)

    def exchange():
        transfer = lines.receive(torch.empty(expected, dtype=torch.uint8), 1 - us.rank)
        lines.send(torch.zeros(sent, dtype=torch.uint8), 1 - us.rank)
        transfer.wait()

    return failure(exchange)[0], failure(exchange)[0]


def test_ranks_that_differ_about_a_length_find_out():
    for rank, (first, again) in enumerate(ranks.shared(2, by="connections").run(two_lengths)):
        # Who comes second may only see that the first has given up.
        sends, expects = ((30, 20), (10, 40))[rank]
        assert (
            first == f"rank {1 - rank} sends {sends} bytes where {expects} were expected, as rank {rank} sees it"
            or f"rank {1 - rank} has closed its connection" in first
        )
        assert again == first


def splits_that_do_not_fit(splits):
    x, own = torch.zeros(4, 8), splits[dist.get_rank()]
    return failure(lambda: flashcomm.all_to_all(x, "fp32", new_group(), input_split_sizes=own, output_split_sizes=own))[
        0
    ]


@pytest.mark.parametrize("splits", [[[2, 2], [3, 1]], [[2, 2], [0, 4]]], ids=["other lengths", "nothing"])
def test_all_to_all_with_splits_that_do_not_fit_is_an_error_and_no_crash(splits):
    for message in ranks.shared(2, by="connections").run(splits_that_do_not_fit, splits):
        assert "bytes where" in message or "has closed its connection" in message


def one_rank_fails_under_way():
    """A codec that fails on one rank: the others must not wait for it until the timeout."""
    group = new_group()
    check(all_reduce_of_ones(group))
    if dist.get_rank() == 0:
        decode, algorithms.kernels.decode = algorithms.kernels.decode, None
        try:
            with pytest.raises(TypeError):
                all_reduce_of_ones(group)
        finally:
            algorithms.kernels.decode = decode
    else:
        check(all_reduce_of_ones(group))
    return failure(lambda: all_reduce_of_ones(group))


def test_a_rank_that_fails_in_the_middle_lets_the_others_know():
    (own, _), *others = ranks.shared(3, by="connections").run(one_rank_fails_under_way)
    assert "rank 0 failed in the middle of an earlier call" in own
    for message, seconds in others:
        assert "has closed its connection" in message
        assert seconds < 2


def call_until_a_rank_dies(victim):
    for _ in range(3):
        check(all_reduce_of_ones(None))
        check(all_reduce_of_ones(None, async_op=True).wait())
    connected(None)
    processes = dict(enumerate(promises.everyone(os.getpid())))
    if dist.get_rank() == victim:
        hear("calls")
        del processes[victim]
        wait_for(lambda: all(map(asleep, processes.values())))
        os.kill(os.getpid(), signal.SIGKILL)
    tell("calls")
    calls = [lambda: all_reduce_of_ones(None), lambda: all_reduce_of_ones(None, async_op=True).wait()]
    return [failure(call, PeerLost) for call in calls * 2]


def test_a_killed_rank_is_an_error_within_moments(fresh_ranks):
    group = fresh_ranks(3, timeout_s=60, env=ranks.WAYS["connections"])
    group.start(call_until_a_rank_dies, 1)
    outcomes = [group.outcome(rank) for rank in range(3)]
    assert outcomes[1] is None
    for survivor in (0, 2):
        ok, failures = outcomes[survivor]
        assert ok, failures
        for message, seconds in failures:
            assert f"all_reduce over 3 ranks failed on rank {survivor}" in message
            assert "has closed its connection" in message
            assert seconds < 2


def stall(timeout_s):
    """The last rank joins when the others have given up."""
    group = new_group(timeout_s)
    for _ in range(3):
        check(all_reduce_of_ones(group))
    if dist.get_rank() == dist.get_world_size() - 1:
        hear("gave up", group)
        return failure(lambda: all_reduce_of_ones(group))
    failed = failure(lambda: all_reduce_of_ones(group))
    tell("gave up", group)
    return failed


def test_a_stalled_rank_is_an_error_at_the_timeout_of_the_group():
    outcomes = ranks.shared(3, by="connections").run(stall, 1.0)
    # One of the ranks that wait gives up, which the others notice.
    assert any("rank 2 did not come within the group's timeout of 1 s" in message for message, _ in outcomes[:2])
    assert all(0.9 < seconds < 10 for _, seconds in outcomes[:2])
    assert "has closed its connection" in outcomes[2][0]
    ranks.shared(3, by="connections").run(messages_of_all_sizes)


def whether_connected():
    group = new_group()
    check(all_reduce_of_ones(group))
    check(all_reduce_of_ones(group, async_op=True).wait())
    return meeting(group).connected, meeting(group).why_not.get("connections", "")


def one_rank_refuses():
    if dist.get_rank() == 1:
        os.environ["FLASHCOMM_CONNECTIONS"] = "0"
    try:
        return whether_connected()
    finally:
        os.environ.pop("FLASHCOMM_CONNECTIONS", None)


def one_rank_says_a_wrong_address():
    """An address that leads nowhere; 192.0.2.0/24 is reserved for documentation (RFC 5737)."""
    found, patience = addresses.own, connections._CONNECT_S
    connections._CONNECT_S = 0.5
    if dist.get_rank() == 0:
        addresses.own = lambda patience_s: ["192.0.2.1"]
    try:
        return whether_connected()
    finally:
        addresses.own, connections._CONNECT_S = found, patience


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (one_rank_refuses, "rank 1: FLASHCOMM_CONNECTIONS=0"),
        (one_rank_says_a_wrong_address, "cannot reach rank 0 at 192.0.2.1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_if_one_rank_cannot_connect_none_does_and_all_know_why(function, reason):
    outcomes = ranks.shared(3, by="connections").run(function)
    assert len(set(outcomes)) == 1
    has, why = outcomes[0]
    assert not has
    assert reason in why


def some_addresses_are_wrong():
    """Nobody has the name of the first; at the second somebody listens who is not the rank."""
    found = addresses.own
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=_answer_wrongly, args=(other,), daemon=True).start()
        greet = connections._greet

        def misled(address, port, *rest):
            return greet(address, other.getsockname()[1] if address == "127.0.0.1" else port, *rest)

        addresses.own = lambda patience_s: ["no-such-host.invalid", "127.0.0.1", "127.0.0.2"]
        connections._greet = misled
        try:
            return whether_connected()
        finally:
            addresses.own, connections._greet = found, greet


def _answer_wrongly(listener):
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].sendall(bytes(connections._HELLO.size))


def test_the_first_address_that_leads_to_a_rank_is_taken():
    assert ranks.shared(2, by="connections").run(some_addresses_are_wrong) == [(True, "")] * 2


def strangers_come_first():
    """Others connect to the port before the ranks do: one that is silent and goes, one that says something else."""
    listen, strangers = connections._listen, []

    def watched(count):
        listener = listen(count)
        for words in (b"", b"x" * connections._HELLO.size):
            stranger = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
            stranger.sendall(words)
            if not words:
                stranger.close()
            strangers.append(stranger)
        return listener

    connections._listen = watched
    try:
        return whether_connected()
    finally:
        connections._listen = listen
        for stranger in strangers:
            stranger.close()


def test_who_does_not_know_the_secret_is_no_rank():
    assert ranks.shared(3, by="connections").run(strangers_come_first) == [(True, "")] * 3


def make_and_destroy(times):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(times):
        group = new_group()
        check(all_reduce_of_ones(group))
        check(all_reduce_of_ones(group, async_op=True).wait())
        dist.destroy_process_group(group)
        del group
        gc.collect()
    return before, len(os.listdir("/proc/self/fd"))


def test_destroyed_groups_leave_no_descriptor():
    ranks.shared(2, by="connections").run(make_and_destroy, 1)
    for before, after in ranks.shared(2, by="connections").run(make_and_destroy, 10):
        assert after == before


def both_at_once(times):
    """Calls that run behind others, which have connections of their own."""
    group = new_group()
    for i in range(times):
        behind = all_reduce_of_ones(group, (300 + i, 256), async_op=True)
        check(all_reduce_of_ones(group, (64, 256)))
        check(behind.wait())
    return threading.active_count()


def test_synchronous_and_asynchronous_calls_mix():
    ranks.shared(3, by="connections").run(both_at_once, 20)


def leave_at_once():
    """The result of the last call must reach who is slower, though nobody waits for that."""
    group = new_group()
    result = all_reduce_of_ones(group, (4096, 1024))
    if dist.get_rank() == 0:
        connected(group)[1].close()
    check(result)


def test_who_is_done_may_leave():
    ranks.shared(3, by="connections").run(leave_at_once)
