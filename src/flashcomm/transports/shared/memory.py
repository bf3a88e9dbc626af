"""Memory that all ranks of a group on one host map: no sockets, no system calls but to wait.

The memory is an anonymous file (``memfd``) that the peers open through ``/proc``. It has no name, so nothing is left in
/dev/shm after a crash, and the size of /dev/shm, which containers keep small, does not matter.

A message goes through it in pieces that stay in the cache, by the rule of `loops`. The bits do not depend on the
pieces. Large messages are shared among the threads that torch may use, each with counters of its own.

Hazard: a rank that failed in the middle leaves the epochs of the others behind; after an error it tells them so, the
memory is not used again, and every later call raises.

Source: our own.
"""

import mmap
import os
import secrets
import select
import struct
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from flashcomm.errors import CollectiveError, PeerLost, TimedOut, Unavailable
from flashcomm.transports.base import Ranks, Step, Task
from flashcomm.transports.shared.sizes import HALF_BYTES

if TYPE_CHECKING:
    from flashcomm.transports.shared.prepare import Prepared

# Counters of neighbours are apart by two cache lines: CPUs fetch them in pairs.
_COUNTER_BYTES = 128
_NONCE_BYTES = 64
_PAGE = 4096
# Spins before the core is offered to others, where every rank can have one of its own; about 2 us.
_SPINS = 50


class SharedMemory:
    """A `base.Memory` on CPUs: a region for each rank, which grows with the longest row.

    Made by all ranks together: `open` says on all of them alike whether it worked.
    """

    name = "shared memory"

    def __init__(self, ranks: Ranks, region: "_Region"):
        self._ranks, self._region = ranks, region
        self._failure: tuple[type[CollectiveError], str] | None = None
        """Kind and text of the error that later calls raise; not the error, whose traceback holds its callers."""
        self._scratch = [np.empty(0, np.uint8)] * region.threads
        # Its own: in a common pool, rows that wait for a peer could hold up the rows which that peer waits for.
        self._pool = ThreadPoolExecutor(region.threads, thread_name_prefix="flashcomm-shared")

    @classmethod
    def open(cls, ranks: Ranks, threads: int = 1) -> "tuple[SharedMemory | None, str]":
        """Map memory: (memory, "") on every rank, or (None, why) on every rank if one could not.

        Args:
            ranks: of one host.
            threads: that share a large message.
        """
        region, why = _Region.open(ranks, HALF_BYTES, threads)
        return (cls(ranks, region), "") if region else (None, why)

    @property
    def threads(self) -> int:
        """Threads that share a large message."""
        return self._region.threads

    @property
    def half_bytes(self) -> int:
        """Bytes of half of each rank's region: the most that it publishes at once."""
        return self._region.half_bytes

    def load(self, task: Task):
        """See `base.Memory`."""
        from flashcomm.transports.shared.prepare import load

        load(task)

    def prepare(self, task: Task, finish: Callable[[], object]) -> "InMemory | None":
        """See `base.Memory`.

        Raises:
            Unavailable: the memory cannot grow to the longest row; raised on all ranks.
        """
        from flashcomm.transports.shared.prepare import prepare

        ready = prepare(task, self._ranks.rank, self._ranks.world_size)
        if ready is None:
            return None
        if ready.half_bytes > self.half_bytes:
            # What other ranks began in the memory that was, this rank must finish there too.
            finish()
            self._grow(ready.half_bytes)
        return InMemory(ready, self)

    def _grow(self, half_bytes: int):
        region, why = _Region.open(self._ranks, 1 << (half_bytes - 1).bit_length(), self.threads)
        if region is None:
            raise Unavailable(f"a row of {half_bytes} bytes needs more shared memory: {why}")
        self._region = region
        if self._failure:
            region.give_up()

    def reserve(self, scratch_bytes: int):
        """Have scratch memory of at least that size for each thread; `run` does not look."""
        if scratch_bytes > self._scratch[0].size:
            # A call that is under way holds what it was given.
            self._scratch = [np.empty(scratch_bytes, np.uint8) for _ in self._scratch]

    def run(self, ready: "Prepared", threads: int, x: int, x_stride: int, out: int):
        """Run on rows of x, `x_stride` bytes from each other, and contiguous rows of out: both are addresses.

        Raises:
            PeerLost: a rank has ended.
            TimedOut: a rank did not come in time.
            CollectiveError: an earlier call failed.
        """
        if self._failure:
            self._raise()
        region, scratch, function, call = self._region, self._scratch, ready.function, ready.call
        if threads == 1:
            missing = function(region.places[0], call, scratch[0], x, x_stride, out, 0, 1)
        else:

            def work(thread: int) -> int:
                return function(region.places[thread], call, scratch[thread], x, x_stride, out, thread, threads)

            missing = max(self._pool.map(work, range(threads)))
        if missing >= 0:
            self._failure = region.failure(missing)
            self._raise()

    def _raise(self) -> NoReturn:
        assert self._failure
        kind, text = self._failure
        raise kind(text)

    def abandon(self, why: str):
        """See `base.Memory`. Of several reasons, later calls give the first."""
        self._failure = self._failure or (CollectiveError, why)
        self._region.give_up()


class InMemory:
    """A collective bound to the memory that it runs in; a `base.Run`."""

    __slots__ = ("_memory", "_ready", "_threads")

    def __init__(self, ready: "Prepared", memory: SharedMemory):
        self._ready, self._memory = ready, memory
        self._threads = min(memory.threads, ready.most_threads)
        memory.reserve(ready.scratch_bytes)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> int:
        """Run on x and out, of any shapes and strides that hold the task's number of values."""
        ready = self._ready
        x_stride = ready.x_stride
        if not x.is_contiguous():
            x = x.reshape(ready.x_rows, ready.cols)
            x = x if x.stride(1) == 1 else x.contiguous()
            x_stride = x.stride(0) * x.element_size()
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
        # Of contiguous tensors only the addresses matter, whatever their shapes.
        self._memory.run(ready, self._threads, x.data_ptr(), x_stride, target.data_ptr())
        if target is not out:
            out.copy_(target)
        return ready.sent

    def abandon(self, why: str):
        """See `base.Run`."""
        self._memory.abandon(why)


class _Region:
    """One mapping: counters, then two halves for each thread of each rank."""

    def __init__(self, ranks: Ranks, half_bytes: int, threads: int):
        self._ranks, self.half_bytes, self.threads = ranks, half_bytes, threads
        self._stride = threads * 2 * half_bytes
        self._header_bytes = -(-(_NONCE_BYTES + ranks.world_size * threads * _COUNTER_BYTES) // _PAGE) * _PAGE
        self._size = self._header_bytes + ranks.world_size * self._stride
        self.places: list[np.ndarray] = []
        """Addresses and sizes for each thread, by the fields of `loops`."""

    @classmethod
    def open(cls, ranks: Ranks, half_bytes: int, threads: int) -> "tuple[_Region | None, str]":
        region = cls(ranks, half_bytes, threads)
        nonce, mine = secrets.token_bytes(_NONCE_BYTES), []
        try:
            offers = ranks.each(Step.CREATE, lambda: region._create(nonce, mine))
            for rank, (_, descriptor, _, refusal) in enumerate(offers):
                if descriptor < 0:
                    return None, f"{ranks.name(rank)} cannot create memory: {refusal}"
            pid, descriptor, theirs, _ = offers[0]
            pids = [offer[0] for offer in offers]
            refusals = ranks.each(Step.MAP, lambda: region._map(pid, descriptor, theirs, pids))
        finally:
            for file in mine:
                os.close(file)
        for rank, refusal in enumerate(refusals):
            if refusal:
                return None, f"{ranks.name(rank)} cannot share memory with {ranks.name(0)}: {refusal}"
        return region, ""

    def _create(self, nonce: bytes, opened: list[int]) -> tuple[int, int, bytes, str]:
        """Create a file that peers may open: (process, descriptor or -1, nonce, the reason if there is none)."""
        try:
            opened.append(os.memfd_create("flashcomm", os.MFD_CLOEXEC))
            os.ftruncate(opened[0], self._size)
            os.pwrite(opened[0], nonce, 0)
        except (OSError, AttributeError) as error:
            return os.getpid(), -1, nonce, str(error)
        return os.getpid(), opened[0], nonce, ""

    def _map(self, pid: int, descriptor: int, nonce: bytes, pids: list[int]) -> str:
        """Map the file of rank 0; return "" or the reason why that is impossible."""
        watched = []
        try:
            file = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.pread(file, _NONCE_BYTES, 0) != nonce:
                    return f"process {pid} has another file there: the ranks see different processes"
                self._memory = mmap.mmap(file, self._size)
            finally:
                os.close(file)
            for rank, peer in enumerate(pids):
                watched.append(-1 if rank == self._ranks.rank else os.pidfd_open(peer))
        except (OSError, AttributeError) as error:
            for fd in watched:
                if fd >= 0:
                    os.close(fd)
            return str(error)
        self._finalizer = weakref.finalize(self, _close, [fd for fd in watched if fd >= 0])
        self._polls = np.frombuffer(
            bytearray(b"".join(struct.pack("ihh", fd, select.POLLIN, 0) for fd in watched)), np.uint8
        )
        start = np.frombuffer(self._memory, np.uint8).ctypes.data
        self.places = [self._place(start, thread) for thread in range(self.threads)]
        return ""

    def _place(self, start: int, thread: int) -> np.ndarray:
        from flashcomm.transports.shared import loops

        place, ranks = np.zeros(loops.FIELDS, np.int64), self._ranks
        place[loops.RANK], place[loops.RANKS] = ranks.rank, ranks.world_size
        place[loops.BASE] = start + self._header_bytes + thread * 2 * self.half_bytes
        place[loops.STRIDE], place[loops.HALF] = self._stride, self.half_bytes
        place[loops.COUNTERS] = start + _NONCE_BYTES + thread * _COUNTER_BYTES
        place[loops.COUNTER_STRIDE] = self.threads * _COUNTER_BYTES
        place[loops.SPINS] = _SPINS if len(os.sched_getaffinity(0)) >= ranks.world_size else 0
        place[loops.POLLS] = self._polls.ctypes.data
        place[loops.TIMEOUT_NS] = int(ranks.timeout_s * 1e9)
        return place

    def failure(self, missing: int) -> tuple[type[CollectiveError], str]:
        """Kind and text of the error of a call for which rank `missing` did not come."""
        kind, what = PeerLost, "has ended"
        if not self._polls.view(np.int16)[missing * 4 + 3]:
            given_up = self._given_up(missing).any()
            kind = PeerLost if given_up else TimedOut
            what = "has given up after an error" if given_up else "did not come within the group's timeout"
        name = self._ranks.name
        return kind, f"{name(missing)} {what} while {name(self._ranks.rank)} waited for it in shared memory"

    def give_up(self):
        """Let the others know that this rank does not go on."""
        self._given_up(self._ranks.rank)[:] = 1

    def _given_up(self, rank: int) -> np.ndarray:
        """The words beside a rank's counters, one for each thread, that say whether it has given up."""
        from flashcomm.transports.shared import loops

        start, stop = (_NONCE_BYTES + r * self.threads * _COUNTER_BYTES for r in (rank, rank + 1))
        return np.frombuffer(self._memory, np.int64)[
            (start + loops.GIVEN_UP_BYTES) // 8 : stop // 8 : _COUNTER_BYTES // 8
        ]


def _close(descriptors: list[int]):
    for descriptor in descriptors:
        os.close(descriptor)
