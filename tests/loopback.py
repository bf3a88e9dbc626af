"""A transport inside of one process: ranks without processes, for tests of algorithms and of the collectives.

It is a `Link` like any other, in one file: queues instead of connections. `Loopback.run` calls a function on every
rank. Ranks take turns, each until it waits for a message that has not been sent. So a test costs milliseconds, always
runs in the same order, and ranks that wait for each other are an error at once, not a time-out.

Each rank also has a process group, with which `flashcomm.all_reduce` takes its usual way from its arguments to the
algorithm: only the meeting of the ranks is made up.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("greenlet", reason="pip install greenlet")
import greenlet

from flashcomm import planner
from flashcomm.collectives import group as groups
from flashcomm.transports.backend import Backend
from flashcomm.transports.base import Messages, Ranks
from flashcomm.transports.buffers import Buffers
from flashcomm.transports.bulk import Bulk
from flashcomm.transports.connections import Connections
from flashcomm.transports.direct import Direct
from flashcomm.transports.lanes import Lane, Meeting
from flashcomm.transports.shared.memory import SharedMemory

_steps = 0
"""Messages that were put or taken, so that a round without any is known."""


class Deadlock(AssertionError):
    """Every rank waits for another."""


def _step():
    global _steps
    _steps += 1


def _wait_until(ready: Callable[[], bool]):
    while not ready():
        greenlet.getcurrent().parent.switch()
    _step()


class _Sent:
    """A message that has left: its bytes were copied."""

    length = 0

    def wait(self):
        """See `base.Transfer`."""


class _Received:
    """A message that is copied into its place when it is waited for, after earlier ones from the same rank."""

    def __init__(self, line: "deque[torch.Tensor]", part: torch.Tensor, earlier: "_Received | None", up_to: bool):
        self._line, self._part, self._earlier, self._up_to, self._done = line, part, earlier, up_to, False
        self.length = part.numel()

    def wait(self):
        """See `base.Transfer`."""
        if self._earlier:
            self._earlier.wait()
            self._earlier = None
        if not self._done:
            _wait_until(lambda: bool(self._line))
            message = self._line.popleft()
            if len(message) != self.length and not (self._up_to and len(message) < self.length):
                raise AssertionError(f"{len(message)} bytes where {self.length} were expected")
            self.length = len(message)
            self._part.view(-1)[: self.length].copy_(message)
            self._done = True


class Link:
    """See `base.Link`."""

    tells_lengths = True

    def __init__(self, lines: "dict[tuple[int, int], deque[torch.Tensor]]", rank: int):
        self._lines, self._rank = lines, rank
        self._latest: dict[int, _Received] = {}

    def send(self, part: torch.Tensor, peer: int) -> _Sent:
        """See `base.Link`."""
        assert part.is_contiguous()
        assert part.dtype == torch.uint8
        self._lines[self._rank, peer].append(part.reshape(-1).clone())
        _step()
        return _Sent()

    def receive(self, part: torch.Tensor, peer: int, *, up_to: bool = False) -> _Received:
        """See `base.Link`."""
        assert part.is_contiguous()
        self._latest[peer] = _Received(self._lines[peer, self._rank], part, self._latest.get(peer), up_to)
        return self._latest[peer]

    def close(self, why: str):
        """See `base.Link`."""


class Collectives(Backend):
    """Whole operations between ranks, as NCCL has them; each waits for all ranks."""

    def __init__(self, rank: int, calls: "list[list]"):
        self._rank, self._calls = rank, calls

    def meet(self, mine: Any) -> list:
        """Every rank's `mine`, in rank order."""
        calls, number = self._calls, len(self._calls[self._rank])
        calls[self._rank].append(mine)
        _step()
        _wait_until(lambda: all(len(theirs) > number for theirs in calls))
        return [theirs[number] for theirs in calls]

    def gather(self, received: torch.Tensor, sent: torch.Tensor) -> _Sent:
        """See `Backend`."""
        received.copy_(torch.stack(self.meet(sent.clone())).view(received.shape))
        return _Sent()

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> _Sent:
        """See `Backend`."""
        received.copy_(torch.stack([theirs[self._rank] for theirs in self.meet(sent.clone())]))
        return _Sent()

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, out_rows: Any, in_rows: Any):
        """See `Backend`."""
        everyone = self.meet(sent.clone().split(list(in_rows)))
        received.copy_(torch.cat([theirs[self._rank] for theirs in everyone]))

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor, *, async_op: bool = False) -> _Sent:
        """See `Backend`."""
        out.copy_(sum(self.meet(x.clone())))
        return _Sent()

    def all_gather(self, x: torch.Tensor, out: torch.Tensor):
        """See `Backend`."""
        out.copy_(torch.stack(self.meet(x.clone())).view(out.shape))

    def broadcast(self, x: torch.Tensor, root: int) -> _Sent:
        """See `Backend`."""
        x.copy_(self.meet(x.clone())[root])
        return _Sent()


class Group(groups.Group):
    """A group whose ranks have met already, in this process.

    Args:
        group: only a name: torch knows of no backend for it.
        backend: what `Backend` would be.
        messages: of this rank.
    """

    def __init__(self, group: dist.ProcessGroup, backend: Collectives, messages: Messages):
        super().__init__(group)
        self.backend, self.ranks = backend, messages.ranks
        bulk, lane, size = isinstance(messages, Bulk), Lane(messages), self.ranks.world_size
        why_not = {SharedMemory.name: "loopback"} | ({Connections.name: "loopback"} if bulk else {})
        meeting = Meeting(hosts=(0,) * size, labels=("here",) * size, lane=lane, carrier="loopback", why_not=why_not)
        self._meetings[torch.device("cpu")] = meeting
        self.facts = planner.Facts(ranks=size, connected=meeting.connected)


class Loopback:
    """The messages of `world_size` ranks, and their groups.

    Args:
        world_size: number of ranks.
        bulk: whole operations of a backend instead of messages between two ranks.
    """

    def __init__(self, world_size: int, *, bulk: bool = False):
        everyone = range(world_size)
        lines = {(a, b): deque() for a in everyone for b in everyone}
        calls: list[list] = [[] for _ in everyone]
        self.messages: list[Messages] = []
        self.groups: list[dist.ProcessGroup] = []
        for rank in everyone:
            backend = Collectives(rank, calls)
            ranks = Ranks(rank=rank, world_size=world_size, timeout_s=0.0, tell=backend.meet)
            if bulk:
                self.messages.append(Bulk(backend, ranks, Buffers()))
            else:
                self.messages.append(Direct(Link(lines, rank), ranks, Buffers()))
            self.groups.append(dist.ProcessGroup(rank, world_size))
            groups.register(self.groups[rank], Group(self.groups[rank], backend, self.messages[rank]))

    def run(self, function: Callable[[int, Messages], Any]) -> list:
        """Call ``function(rank, messages)`` on every rank, and return the results in rank order.

        Raises:
            Deadlock: every rank waits for another.
        """
        results: list[Any] = [None] * len(self.messages)

        def rank_of(rank: int):
            results[rank] = function(rank, self.messages[rank])

        turns = [greenlet.greenlet(partial(rank_of, rank)) for rank in range(len(self.messages))]
        waiting, before = list(range(len(turns))), -1
        while waiting:
            if _steps == before:
                raise Deadlock(f"ranks {waiting} wait for each other")
            before = _steps
            for rank in waiting:
                turns[rank].switch()
            left = [rank for rank in waiting if not turns[rank].dead]
            # A rank that has ended is progress, too.
            before = before if left == waiting else -1
            waiting = left
        return results
