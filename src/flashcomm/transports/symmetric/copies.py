"""Messages between GPUs of a host by their copy engines: no multiprocessor sends or waits, and no host does.

Each rank has a mailbox that its peers map, with two places for each sender, which take turns. Message n of a pair goes
through place n % 2:

    sender, queue OUT                                receiver, queue IN
    wait until `taken` of this receiver >= n - 2
    copy the message to its place there
    write `come` of this sender there = n            wait until `come` of this sender >= n
                                                     copy the message out
                                                     write `taken` of this receiver there = n

`come` and `taken` lie in the memory of the one who waits for them. Only IN waits for messages and only OUT waits for
room, so no queue waits for one that waits for it. What is longer than a place goes as several messages.

Opt-in (``FLASHCOMM_COPIES=1``), because no GPU has run it. A CUDA graph would repeat the numbers of its capture, so
calls of a graph use the backend.

Hazard: if a rank does not come within the group's timeout, the others stop waiting, what they received is not valid,
and their next call raises.

Source: our own; stream memory operations as flags as in torch's asynchronous tensor parallelism.
"""

import ctypes
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from flashcomm.errors import PeerLost
from flashcomm.transports.backend import Backend
from flashcomm.transports.base import Ranks
from flashcomm.transports.buffers import capturing
from flashcomm.transports.symmetric.memory import mapped

NAME = "copy engines"
SIZE_BYTES = 64 << 20
"""Bytes of each rank's mailbox."""
OUT, IN = 0, 1
"""The queue that sends, and the one that receives."""
_LINE = 64
"""Bytes of a flag, so that no two share a line."""
_AHEAD = 1 << 30
"""Added to a flag that nobody will write any more; flags compare by their difference, as they may overflow."""
_LOOK_S = 0.05


class Work(Protocol):
    """A call on its way."""

    def wait(self) -> Any:
        """Let the caller's stream wait for it."""

    def done(self) -> bool:
        """Whether it has ended, without waiting."""
        ...


class Queues(Protocol):
    """Two queues of operations on addresses; each runs its own in order, beside the other."""

    def begin(self):
        """Let both queues wait for what the caller's stream was given before."""

    def copy(self, which: int, target: int, source: int, size: int):
        """Copy `size` bytes."""

    def write(self, which: int, address: int, value: int):
        """Write a number of 32 bits, after all that the queue has copied."""

    def wait_until(self, which: int, address: int, value: int):
        """Wait until the number of 32 bits at `address` has reached `value`."""

    def end(self) -> Work:
        """A handle of all that was put into the queues."""
        ...

    def free(self, address: int, value: int):
        """Write a number from the host's side, while the queues wait."""


class Mailboxes:
    """The mailboxes of all ranks, as one rank uses them.

    Args:
        ranks: of the group.
        addresses: where each rank's mailbox begins in this rank's address space; flags are 0 when the ranks meet.
        size_bytes: of each.
        queues: of this rank.
    """

    def __init__(self, ranks: Ranks, addresses: Sequence[int], size_bytes: int, queues: Queues):
        count = ranks.world_size
        self.ranks, self._addresses, self._queues = ranks, addresses, queues
        self.room = (size_bytes - 2 * count * _LINE) // (2 * count) // 256 * 256
        """Bytes of a place."""
        self._sent, self._received = [0] * count, [0] * count
        self._lost: list[str] = []
        # A thread that held this object would keep it, and its memory, for ever.
        self._under_way: queue.SimpleQueue = queue.SimpleQueue()
        arguments = self._under_way, queues, self._own_flags, self._lost, ranks.timeout_s
        self._watch = threading.Thread(target=_watch, args=arguments, name="flashcomm-copies", daemon=True)
        weakref.finalize(self, self._under_way.put, None)

    def swap(self, going: Sequence[torch.Tensor], coming: Sequence[torch.Tensor]) -> Work:
        """Start sending ``going[r]`` to rank r and receiving ``coming[r]`` from it, contiguous bytes of agreed lengths.

        Raises:
            PeerLost: a rank did not come in an earlier call.
        """
        if self._lost:
            raise PeerLost(self._lost[0])
        me, peers, queues = self.ranks.rank, self.ranks.peers, self._queues
        queues.begin()
        if going[me].data_ptr() != coming[me].data_ptr():
            queues.copy(IN, coming[me].data_ptr(), going[me].data_ptr(), going[me].numel())
        longest = max((part.numel() for part in (*going, *coming)), default=0)
        for start in range(0, longest, self.room):
            for peer in peers:
                if size := _size(going[peer], start, self.room):
                    self._send(peer, going[peer].data_ptr() + start, size)
            # The next rank sends to this one last.
            for peer in reversed(peers):
                if size := _size(coming[peer], start, self.room):
                    self._receive(peer, coming[peer].data_ptr() + start, size)
        work = queues.end()
        if self._watch.ident is None:
            self._watch.start()
        self._under_way.put((work, time.monotonic() + self.ranks.timeout_s))
        return work

    def _send(self, peer: int, source: int, size: int):
        self._sent[peer] += 1
        number, me = self._sent[peer], self.ranks.rank
        self._queues.wait_until(OUT, self._taken(me, peer), number - 2)
        self._queues.copy(OUT, self._place(peer, me, number), source, size)
        self._queues.write(OUT, self._come(peer, me), number)

    def _receive(self, peer: int, target: int, size: int):
        self._received[peer] += 1
        number, me = self._received[peer], self.ranks.rank
        self._queues.wait_until(IN, self._come(me, peer), number)
        self._queues.copy(IN, target, self._place(me, peer, number), size)
        self._queues.write(IN, self._taken(peer, me), number)

    def _come(self, owner: int, sender: int) -> int:
        return self._addresses[owner] + _LINE * sender

    def _taken(self, owner: int, receiver: int) -> int:
        return self._addresses[owner] + _LINE * (self.ranks.world_size + receiver)

    def _place(self, owner: int, sender: int, number: int) -> int:
        flags = 2 * self.ranks.world_size * _LINE
        return self._addresses[owner] + flags + (2 * sender + number % 2) * self.room

    @property
    def _own_flags(self) -> list[tuple[int, list[int], int]]:
        """Address, and the count that it follows, of every flag that this rank waits for."""
        me = self.ranks.rank
        return [(self._come(me, peer), self._received, peer) for peer in self.ranks.peers] + [
            (self._taken(me, peer), self._sent, peer) for peer in self.ranks.peers
        ]


def _size(part: torch.Tensor, start: int, room: int) -> int:
    return max(0, min(part.numel() - start, room))


def _watch(
    under_way: queue.SimpleQueue,
    queues: Queues,
    flags: list[tuple[int, list[int], int]],
    lost: list[str],
    timeout_s: float,
):
    """Let the queues go on where a call has not ended in time: a device would wait for ever."""
    while (item := under_way.get()) is not None:
        work, end = item
        while not work.done():
            if time.monotonic() >= end and not lost:
                lost.append(f"a rank did not come within {timeout_s:g} s in an earlier call over {NAME}")
            if lost:
                for address, counts, peer in flags:
                    queues.free(address, counts[peer] + _AHEAD)
            time.sleep(_LOOK_S)


class Copies(Backend):
    """A group's backend whose gathers, exchanges and broadcasts go by copy engines, but in a CUDA graph."""

    def __init__(self, group: dist.ProcessGroup, mailboxes: Mailboxes, keep: object = None):
        super().__init__(group)
        self._mailboxes, self._keep = mailboxes, keep

    @classmethod
    def open(cls, ranks: Ranks, group: dist.ProcessGroup, device: torch.device) -> "tuple[Copies | None, str]":
        """Map the mailboxes: (backend, "") on every rank, or (None, why) on every rank if one could not."""
        made, why = mapped(ranks, device, SIZE_BYTES, lambda memory: _mailboxes(memory, ranks, group, device))
        return (cls(group, *made), "") if made else (None, why)

    def gather(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """See `Backend`."""
        if capturing(sent.device):
            return super().gather(received, sent)
        return self._mailboxes.swap([sent.view(-1)] * len(received), list(received))

    def exchange(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """See `Backend`."""
        if capturing(sent.device):
            return super().exchange(received, sent)
        return self._mailboxes.swap(list(sent), list(received))

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, out_rows: Sequence[int], in_rows: Sequence[int]):
        """See `Backend`."""
        if capturing(sent.device):
            super().all_to_all(received, sent, out_rows, in_rows)
            return
        self._mailboxes.swap(sent.split(list(in_rows)), received.split(list(out_rows))).wait()

    def broadcast(self, x: torch.Tensor, root: int) -> Any:
        """See `Backend`; of bytes."""
        if capturing(x.device) or x.dtype != torch.uint8:
            return super().broadcast(x, root)
        ranks, nothing = self._mailboxes.ranks, x.view(-1)[:0]
        going = [x if ranks.rank == root else nothing] * ranks.world_size
        return self._mailboxes.swap(going, [x if rank == root else nothing for rank in range(ranks.world_size)])


def _mailboxes(
    memory: torch.Tensor, ranks: Ranks, group: dist.ProcessGroup, device: torch.device
) -> tuple[Mailboxes, Any]:
    import torch.distributed._symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(memory, group=group)
    return Mailboxes(ranks, handle.buffer_ptrs, SIZE_BYTES, StreamQueues(device)), (memory, handle)


class StreamQueues:
    """`Queues` on two CUDA streams of high priority, by the driver's operations on addresses. No GPU has run it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._streams = [torch.cuda.Stream(device, priority=-1) for _ in (OUT, IN)]
        self._freeing = torch.cuda.Stream(device)

    def begin(self):
        """See `Queues`."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, which: int, target: int, source: int, size: int):
        """See `Queues`."""
        _call("cuMemcpyAsync", ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(size), self._on(which))

    def write(self, which: int, address: int, value: int):
        """See `Queues`. The driver puts a barrier before the write."""
        _call("cuStreamWriteValue32_v2", self._on(which), ctypes.c_uint64(address), _u32(value), ctypes.c_uint(0))

    def wait_until(self, which: int, address: int, value: int):
        """See `Queues`. The driver compares by the difference."""
        _call("cuStreamWaitValue32_v2", self._on(which), ctypes.c_uint64(address), _u32(value), ctypes.c_uint(0))

    def end(self) -> Work:
        """See `Queues`."""
        return _Events(self._device, [stream.record_event() for stream in self._streams])

    def free(self, address: int, value: int):
        """See `Queues`."""
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(self._freeing.cuda_stream)
            _call("cuStreamWriteValue32_v2", stream, ctypes.c_uint64(address), _u32(value), ctypes.c_uint(0))

    def _on(self, which: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._streams[which].cuda_stream)


class _Events:
    def __init__(self, device: torch.device, events: list[Any]):
        self._device, self._events = device, events

    def wait(self):
        for event in self._events:
            torch.cuda.current_stream(self._device).wait_event(event)

    def done(self) -> bool:
        return all(event.query() for event in self._events)


def _u32(value: int) -> ctypes.c_uint:
    return ctypes.c_uint(value & 0xFFFFFFFF)


def _call(name: str, *arguments: Any):
    from flashcomm.kernels.gpu.cuda import driver

    driver.call(name, *arguments)
