"""Messages by copy engines arrive whole in every order in which the queues of two ranks may run.

No GPU is needed: the queues here are lists of operations.
"""

import ctypes
import random
import threading

import pytest
import torch

from flashcomm.errors import PeerLost
from flashcomm.transports.base import Ranks
from flashcomm.transports.symmetric import copies
from flashcomm.transports.symmetric.copies import IN, OUT, Mailboxes


class World:
    """The memory of all ranks in one tensor, and the queues that work on it."""

    def __init__(self, ranks, size, mailboxes=Mailboxes, timeout_s=60.0, bytes_at_once=None):
        self.memory = torch.zeros(1 << 16, dtype=torch.uint8)
        self.taken = 0
        self.at_once = bytes_at_once
        self.queues: list[list[tuple]] = []
        places = [self.take(size) for _ in range(ranks)]
        self.ranks = []
        for rank in range(ranks):
            known = Ranks(rank=rank, world_size=ranks, timeout_s=timeout_s, tell=lambda fact: [fact])
            addresses = [place.data_ptr() for place in places]
            self.ranks.append(mailboxes(known, addresses, size, Listed(self)))

    def take(self, size):
        part = self.memory[self.taken : self.taken + size]
        self.taken += -(-size // 64) * 64
        return part

    def message(self, *numbers):
        part = self.take(len(numbers))
        part.copy_(torch.tensor(numbers, dtype=torch.uint8))
        return part

    def number(self, address):
        return ctypes.c_uint32.from_address(address).value

    def runnable(self):
        """Queues whose first operation need not wait."""
        return [n for n, queue in enumerate(self.queues) if queue and self._may(*queue[0])]

    def _may(self, kind, *operands):
        # By the difference, as the driver compares.
        return kind != "wait" or (self.number(operands[0]) - operands[1]) & 0xFFFFFFFF < 1 << 31

    def step(self, n):
        kind, *operands = self.queues[n].pop(0)
        if kind == "copy":
            ctypes.memmove(*operands)
        elif kind == "write":
            ctypes.c_uint32.from_address(operands[0]).value = operands[1]

    def run(self, order):
        """Run all queues to their ends, in an order that a random number generator draws."""
        while runnable := self.runnable():
            self.step(order.choice(runnable))
        assert not any(self.queues), "the queues wait for each other"


class Listed:
    """`Queues` of one rank that only note what they are given."""

    def __init__(self, world):
        self.world, self.first = world, len(world.queues)
        world.queues += [[], []]

    def begin(self):
        pass

    def end(self):
        return Ended(self.world, self.first)

    def copy(self, which, target, source, size):
        # What is copied piece by piece may be seen half.
        at_once = self.world.at_once or size
        for start in range(0, size, at_once):
            self.put(which, "copy", target + start, source + start, min(at_once, size - start))

    def write(self, which, address, value):
        self.put(which, "write", address, value & 0xFFFFFFFF)

    def wait_until(self, which, address, value):
        self.put(which, "wait", address, value & 0xFFFFFFFF)

    def free(self, address, value):
        ctypes.c_uint32.from_address(address).value = value & 0xFFFFFFFF

    def put(self, which, *operation):
        self.world.queues[self.first + which].append(operation)


class Ended:
    def __init__(self, world, first):
        self.world, self.first = world, first

    def wait(self):
        pass

    def done(self):
        return not (self.world.queues[self.first] or self.world.queues[self.first + 1])


def size_for(ranks, room):
    return 2 * ranks * copies._LINE + 2 * ranks * room


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_messages_of_any_lengths_arrive(ranks):
    """Several calls under way at a time; messages from none to several times as long as a place."""
    for seed in range(20):
        order = random.Random(seed)
        world = World(ranks, size_for(ranks, 256))
        assert world.ranks[0].room == 256
        expected = []
        for call in range(3):
            lengths = [[order.choice([0, 1, 255, 256, 257, 700]) for _ in range(ranks)] for _ in range(ranks)]
            going = [
                [world.message(*((call + 7 * a + 31 * b + i) % 251 for i in range(n))) for b, n in enumerate(row)]
                for a, row in enumerate(lengths)
            ]
            coming = [[world.take(lengths[a][b]) for a in range(ranks)] for b in range(ranks)]
            for mailbox, mine, theirs in zip(world.ranks, going, coming, strict=True):
                mailbox.swap(mine, theirs)
            expected += [(going[a][b], coming[b][a]) for a in range(ranks) for b in range(ranks)]
        world.run(order)
        assert all(torch.equal(sent, received) for sent, received in expected)


def outcomes(mailboxes, calls, senders, bytes_at_once=None):
    """The results of every execution of some calls of two ranks, in which `senders` send two bytes; and its states."""
    world = World(2, size_for(2, 256), mailboxes, bytes_at_once=bytes_at_once)
    results, nothing = [], world.take(0)
    for call in range(calls):
        for rank, mailbox in enumerate(world.ranks):
            sent = world.message(*2 * [10 * call + rank + 1]) if rank in senders else nothing
            received = world.take(2) if 1 - rank in senders else nothing
            mailbox.swap(*([part, nothing] if rank else [nothing, part] for part in (sent, received)))
            results.append(received)
    seen, found = set(), set()
    todo = [(tuple(map(tuple, world.queues)), bytes(world.memory[: world.taken].numpy()))]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        queues, _ = state
        runnable = _runnable(world, state)
        for n in runnable:
            _restore(world, *state)
            world.step(n)
            todo.append((tuple(map(tuple, world.queues)), bytes(world.memory[: world.taken].numpy())))
        if not runnable:
            found.add("stuck" if any(queues) else tuple(tuple(result.tolist()) for result in results))
    return found, len(seen)


def _runnable(world, state):
    _restore(world, *state)
    return world.runnable()


def _restore(world, queues, memory):
    world.queues[:] = [list(queue) for queue in queues]
    world.memory[: world.taken] = torch.frombuffer(bytearray(memory), dtype=torch.uint8)


def right(calls, senders):
    return tuple((10 * call + 2 - rank,) * 2 * (1 - rank in senders) for call in range(calls) for rank in (0, 1))


@pytest.mark.parametrize(("calls", "senders", "bytes_at_once"), [(5, [0], 1), (2, [0, 1], None)])
def test_every_execution_gives_the_same_bytes(calls, senders, bytes_at_once):
    """One way in single bytes, as a copy may be seen half; both ways, where queues might wait for each other."""
    found, states = outcomes(Mailboxes, calls, senders, bytes_at_once)
    assert found == {right(calls, senders)}
    assert states > 50


class NoRoom(Mailboxes):
    """Does not wait for room."""

    def _send(self, peer, source, size):
        queues, wait = self._queues, self._queues.wait_until
        queues.wait_until = lambda which, *rest: wait(which, *rest) if which == IN else None
        super()._send(peer, source, size)
        queues.wait_until = wait


def with_the_flag_first(call, queues, which, *arguments):
    """Put a message into a queue, and its last operation, the flag, in front of the copies."""
    kept = len(queues.world.queues[queues.first + which])
    call(*arguments)
    queue = queues.world.queues[queues.first + which]
    queue[kept + 1 :] = [queue[-1], *queue[kept + 1 : -1]]


class FlagFirst(Mailboxes):
    """Says that a message has come before it is there."""

    def _send(self, *arguments):
        with_the_flag_first(super()._send, self._queues, OUT, *arguments)


class TakenFirst(Mailboxes):
    """Gives a place free before the message has been copied out of it."""

    def _receive(self, *arguments):
        with_the_flag_first(super()._receive, self._queues, IN, *arguments)


class OnePlace(Mailboxes):
    """Uses one place of the two."""

    def _place(self, owner, sender, number):
        return super()._place(owner, sender, 0)


class WaitsForAll(Mailboxes):
    """Waits for room that only this message makes."""

    def _send(self, peer, source, size):
        self._queues.wait_until(OUT, self._taken(self.ranks.rank, peer), self._sent[peer] + 1)
        super()._send(peer, source, size)


@pytest.mark.parametrize("fault", [NoRoom, FlagFirst, TakenFirst, OnePlace, WaitsForAll])
def test_planted_faults_are_found(fault):
    found, _ = outcomes(fault, 4, [0], 1)
    assert found - {right(4, [0])}


def test_numbers_may_overflow():
    world = World(2, size_for(2, 256))
    for rank, mailbox in enumerate(world.ranks):
        mailbox._sent[1 - rank] = mailbox._received[1 - rank] = (1 << 32) - 2
        for address, _, _ in mailbox._own_flags:
            ctypes.c_uint32.from_address(address).value = (1 << 32) - 2
    order, expected = random.Random(0), []
    for call in range(5):
        for rank, mailbox in enumerate(world.ranks):
            sent, received, nothing = world.message(call, rank), world.take(2), world.take(0)
            mailbox.swap(*([part, nothing] if rank else [nothing, part] for part in (sent, received)))
            expected.append((received, [call, 1 - rank]))
        world.run(order)
    assert all(received.tolist() == right for received, right in expected)


def test_a_rank_that_does_not_come_is_an_error_of_the_next_call():
    """The queues of the rank that waits go on after the timeout."""
    world = World(2, size_for(2, 256), timeout_s=0.01)
    mailbox = world.ranks[0]
    sent, received, nothing = world.message(1, 2), world.take(2), world.take(0)
    mailbox.swap([nothing, sent], [nothing, received])
    freed = threading.Event()
    wrote, free = [], mailbox._queues.free

    def noted(address, value):
        free(address, value)
        wrote.append(address)
        if len(wrote) >= 2:
            freed.set()

    mailbox._queues.free = noted
    assert freed.wait(60)
    world.queues[2:] = [[], []]
    world.run(random.Random(0))
    with pytest.raises(PeerLost, match=r"a rank did not come within 0\.01 s in an earlier call over copy engines"):
        mailbox.swap([nothing, sent], [nothing, received])


def test_the_thread_ends_with_the_mailboxes():
    world = World(1, size_for(1, 256))
    mailbox = world.ranks.pop()
    part = world.message(1)
    mailbox.swap([part], [part])
    watch = mailbox._watch
    del mailbox
    watch.join(60)
    assert not watch.is_alive()


def collectives(world):
    return [copies.Copies(world, mailbox) for mailbox in world.ranks]


def test_collectives_of_a_backend():
    """As `Bulk` calls them; a broadcast and a gather where each rank's own part lies in its place already, too."""
    world = World(3, size_for(3, 256))
    backends, n = collectives(world), range(3)
    sent = [world.take(3 * 40).view(3, 40).random_(0, 250) for _ in n]
    exchanged, gathered = [[world.take(3 * 40).view(3, 40) for _ in n] for _ in range(2)]
    spread = [world.take(40).copy_(sent[rank][0]) for rank in n]
    in_rows = [[1, 0, 2], [0, 3, 1], [2, 2, 0]]
    rows = [world.take(4 * sum(counts)).view(-1, 4).random_(0, 250) for counts in in_rows]
    moved = [world.take(4 * sum(counts[rank] for counts in in_rows)).view(-1, 4) for rank in n]
    for rank, backend in enumerate(backends):
        backend.exchange(exchanged[rank], sent[rank])
        backend.gather(gathered[rank], sent[rank][1])
        backend.broadcast(spread[rank], 2)
        backend.all_to_all(moved[rank], rows[rank], [counts[rank] for counts in in_rows], in_rows[rank])
    world.run(random.Random(0))
    for rank in n:
        assert torch.equal(exchanged[rank], torch.stack([sent[other][rank] for other in n]))
        assert torch.equal(gathered[rank], torch.stack([sent[other][1] for other in n]))
        assert torch.equal(spread[rank], sent[2][0])
        parts = [rows[other].split(in_rows[other])[rank] for other in n]
        assert torch.equal(moved[rank], torch.cat(parts))


def test_a_graph_that_is_captured_has_the_backends_own(monkeypatch):
    called = []
    for name in ("gather", "exchange", "all_to_all", "broadcast"):
        monkeypatch.setattr(copies.Backend, name, lambda self, *_, name=name: called.append(name))
    monkeypatch.setattr(copies, "capturing", lambda device: True)
    world = World(2, size_for(2, 256))
    backend, x = collectives(world)[0], world.take(4)
    backend.gather(x.view(2, 2), x[:2])
    backend.exchange(x, x)
    backend.all_to_all(x, x, [2, 2], [2, 2])
    backend.broadcast(x, 0)
    assert called == ["gather", "exchange", "all_to_all", "broadcast"]
    assert not any(world.queues)
