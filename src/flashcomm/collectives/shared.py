"""The algorithms over memory that all ranks of a group map, on one host: no sockets, no system calls but to wait.

The memory is an anonymous file (``memfd``) that the peers open through ``/proc``: it has no name, so nothing is left in
/dev/shm whatever happens to the ranks, and the size of /dev/shm, which containers keep small, does not matter.

A message goes through it in pieces that stay in the cache, by the rule of `flashcomm.kernels.epochs`. The bits do not
depend on the pieces. Large messages are shared among the threads that torch may use, each with counters of its own.

Hazard: a rank that failed in the middle leaves the epochs of the others behind; after an error the memory is not used
again, and every later call raises.

Source: our own; the two steps are Flash Communication's (arXiv 2412.04964).
"""

import math
import mmap
import os
import secrets
import select
import struct
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from flashcomm.codecs import Codec

if TYPE_CHECKING:
    from flashcomm.collectives.state import GroupState

# Counters of neighbours are apart by two cache lines: CPUs fetch them in pairs.
_COUNTER_BYTES = 128
_NONCE_BYTES = 64
_PAGE = 4096
# Bytes of payload that a rank publishes at once, and of values that it decodes then: measured 2026-11-21, 2 cores.
HALF_BYTES = 1 << 20
PIECE_BYTES = 1 << 20
_MOST_THREADS = 16
_BYTES_PER_THREAD = 1 << 20
# Spins before the core is offered to others, where every rank can have one of its own; about 2 us.
_SPINS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A collective on rows of one length and type, ready to run: called like the functions of `steps`."""

    function: Callable[..., int]
    programs: Sequence[np.ndarray]
    """What it does to a row, as `kernels.cpu` writes it."""
    times: int = 0
    """For how many ranks the second of them runs, where the third sees the rest."""
    scratch_bytes: int
    width: int
    """Bytes of a row's payload, and `sum_width` of a sum's."""
    sum_width: int = 0
    stripes: int = 1
    mine: int = 0
    """Of the stripes, the one that this rank adds."""
    piece: int
    """Rows that are published at once."""
    rows: int
    cols: int
    x_rows: int
    out_rows: int
    x_stride: int
    """Bytes of a row of x, and `out_stride` of one of out."""
    out_stride: int
    most_threads: int
    """How many are worth their while."""
    half_bytes: int
    """What the memory must have room for; see `SharedMemory.half_bytes`."""
    sent: int
    """Bytes that this rank gives to others, as if it sent them one by one."""
    call: np.ndarray = field(init=False)
    """All that `function` needs to know, by the fields of `kernels.epochs`."""

    def __post_init__(self):
        from flashcomm.kernels import epochs

        fields = np.zeros(epochs.STEPS, np.int64)
        fields[epochs.ROWS], fields[epochs.PIECE], fields[epochs.OUT_STRIDE] = self.rows, self.piece, self.out_stride
        fields[epochs.WIDTH], fields[epochs.SUM_WIDTH], fields[epochs.TIMES] = self.width, self.sum_width, self.times
        fields[epochs.STRIPES], fields[epochs.MINE] = self.stripes, self.mine
        ends = epochs.STEPS + np.cumsum([0, *(program.size for program in self.programs)])
        fields[epochs.PROGRAMS :][: len(ends)] = ends
        object.__setattr__(self, "call", np.concatenate([fields, *(program.ravel() for program in self.programs)]))

    def __call__(self, x: torch.Tensor, codec: Codec, state: "GroupState", out: torch.Tensor) -> int:
        """Run on all of x and out, of any shape and strides that hold so many values; returns the bytes sent."""
        assert state.shared is not None
        x_stride = self.x_stride
        if not x.is_contiguous():
            x = x.reshape(self.x_rows, self.cols)
            x = x if x.stride(1) == 1 else x.contiguous()
            x_stride = x.stride(0) * x.element_size()
        target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
        # Of contiguous tensors only the addresses matter, whatever their shapes.
        state.shared.run(self, x.data_ptr(), x_stride, target.data_ptr())
        if target is not out:
            out.copy_(target)
        return self.sent


class SharedMemory:
    """Regions of memory, one for each rank of a group on one host, and who is who.

    Made by all ranks together: `open` says on all of them alike whether it worked.
    """

    def __init__(self, state: "GroupState", half_bytes: int, threads: int):
        self.rank, self.ranks, self.threads = state.rank, state.ranks, threads
        self.half_bytes = half_bytes
        self.broken: str | None = None
        self._scratch = [np.empty(0, np.uint8)] * threads
        # Its own: in a common pool, rows that wait for a peer could hold up the rows which that peer waits for.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="flashcomm-shared")
        self._region_bytes = threads * 2 * half_bytes
        self._header_bytes = -(-(_NONCE_BYTES + self.ranks * threads * _COUNTER_BYTES) // _PAGE) * _PAGE
        self.size = self._header_bytes + self.ranks * self._region_bytes

    @classmethod
    def open(
        cls, state: "GroupState", half_bytes: int = HALF_BYTES, threads: int = 1
    ) -> "tuple[SharedMemory | None, str]":
        """(memory, "") if every rank could map it; (None, why) on all ranks if one could not."""
        memory = cls(state, half_bytes, threads)
        mine, nonce, refusal = -1, secrets.token_bytes(_NONCE_BYTES), ""
        try:
            try:
                mine = os.memfd_create("flashcomm", os.MFD_CLOEXEC)
                os.ftruncate(mine, memory.size)
                os.pwrite(mine, nonce, 0)
            except (OSError, AttributeError) as error:
                refusal = str(error)
            offers = state.tell((os.getpid(), mine, nonce, refusal))
            for rank, offer in enumerate(offers):
                if offer[3]:
                    return None, f"rank {rank} cannot create memory: {offer[3]}"
            pid, theirs, nonce, _ = offers[0]
            refusals = state.tell(memory._map(pid, theirs, nonce, [offer[0] for offer in offers], state.timeout_s))
        finally:
            if mine >= 0:
                os.close(mine)
        for rank, refusal in enumerate(refusals):
            if refusal:
                return None, f"rank {rank} cannot share memory with rank 0: {refusal}"
        return memory, ""

    def _map(self, pid: int, descriptor: int, nonce: bytes, pids: list[int], timeout_s: float) -> str:
        """Map the file of rank 0; "" or why that is impossible."""
        watched = []
        try:
            file = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.pread(file, _NONCE_BYTES, 0) != nonce:
                    return f"process {pid} has another file there: the ranks see different processes"
                self._memory = mmap.mmap(file, self.size)
            finally:
                os.close(file)
            for rank, peer in enumerate(pids):
                watched.append(-1 if rank == self.rank else os.pidfd_open(peer))
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
        self._places = [self._place(start, thread, timeout_s) for thread in range(self.threads)]
        return ""

    def _place(self, start: int, thread: int, timeout_s: float) -> np.ndarray:
        from flashcomm.kernels import epochs

        place = np.zeros(epochs.FIELDS, np.int64)
        place[epochs.RANK], place[epochs.RANKS] = self.rank, self.ranks
        place[epochs.BASE] = start + self._header_bytes + thread * 2 * self.half_bytes
        place[epochs.STRIDE], place[epochs.HALF] = self._region_bytes, self.half_bytes
        place[epochs.COUNTERS] = start + _NONCE_BYTES + thread * _COUNTER_BYTES
        place[epochs.COUNTER_STRIDE] = self.threads * _COUNTER_BYTES
        place[epochs.SPINS] = _SPINS if len(os.sched_getaffinity(0)) >= self.ranks else 0
        place[epochs.POLLS] = self._polls.ctypes.data
        place[epochs.TIMEOUT_NS] = int(timeout_s * 1e9)
        return place

    def run(self, ready: Prepared, x: int, x_stride: int, out: int):
        """Run on the rows of x, so many bytes from each other, and of out, which is contiguous: both are addresses.

        Raises:
            RuntimeError: a rank has ended, or did not come in time.
        """
        if self.broken:
            raise RuntimeError(self.broken)
        threads = min(self.threads, ready.most_threads)
        if threads == 1:
            missing = self._work(ready, x, x_stride, out, 0, 1)
        else:
            work = partial(self._work, ready, x, x_stride, out)
            missing = max(self._pool.map(work, range(threads), [threads] * threads))
        if missing >= 0:
            self.broken = self._describe(missing)
            raise RuntimeError(self.broken)

    def _work(self, ready: Prepared, x: int, x_stride: int, out: int, thread: int, threads: int) -> int:
        scratch = self._scratch[thread]
        if scratch.size < ready.scratch_bytes:
            scratch = self._scratch[thread] = np.empty(ready.scratch_bytes, np.uint8)
        return ready.function(self._places[thread], ready.call, scratch, x, x_stride, out, thread, threads)

    def _describe(self, missing: int) -> str:
        events = int(self._polls.view(np.int16)[missing * 4 + 3])
        what = "has ended" if events else "did not come within the group's timeout"
        return f"rank {missing} {what} while rank {self.rank} waited for it in shared memory"


def _close(descriptors: list[int]):
    for descriptor in descriptors:
        os.close(descriptor)


@lru_cache(maxsize=4096)
def shorten(rows: int, cols: int, codec: Codec, least: int, most_bytes: int) -> tuple[int, int]:
    """[rows, cols] as more and shorter rows: at least so many, of at most so many bytes of fp32 each, if groups allow.

    >>> from flashcomm.codecs import parse
    >>> shorten(1, 1 << 20, parse("int8g128"), least=4, most_bytes=1 << 20)
    (4, 262144)
    """
    unit = math.lcm(*(step.segment(cols) for step in codec.steps))
    pieces = max(-(-least // rows), -(-4 * cols // most_bytes))
    if pieces == 1 or cols % unit:
        return rows, cols
    units = cols // unit
    # The next divisor; where there is none nearby, the rows stay longer than asked for.
    pieces = next(
        (p for p in range(pieces, min(units, 4 * pieces) + 1) if units % p == 0), units if units <= pieces else 1
    )
    return rows * pieces, cols // pieces


def one_step(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, state: "GroupState"
) -> Prepared:
    """As `steps.one_step`, for x[rows, cols]."""
    return _sum(codec, rows, cols, dtype, out_dtype, state, stripes=1)


def reduce_scatter(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, state: "GroupState"
) -> Prepared:
    """As `steps.reduce_scatter`, for x[rows, cols]."""
    return _sum(codec, rows, cols, dtype, out_dtype, state, stripes=state.ranks)


def _sum(
    codec: Codec,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    state: "GroupState",
    stripes: int,
) -> Prepared:
    from flashcomm.kernels import cpu, epochs

    rows, cols = shorten(rows // stripes, cols, codec, 1, PIECE_BYTES // stripes)
    width = codec.payload_bytes(cols, dtype)
    encode = cpu.encoder(codec, cols, cpu.KINDS[dtype])
    decode = cpu.decoder(codec, cols, cpu.KINDS[out_dtype], state.ranks)
    return Prepared(
        function=epochs.sum_stripes,
        programs=(encode.each, decode.each, decode.after),
        times=decode.times,
        scratch_bytes=max(encode.scratch_bytes, decode.scratch_bytes),
        width=width,
        stripes=stripes,
        mine=state.rank % stripes,
        piece=_piece(stripes * cols * dtype.itemsize, stripes * width),
        rows=rows,
        cols=cols,
        x_rows=stripes * rows,
        out_rows=rows,
        x_stride=cols * dtype.itemsize,
        out_stride=cols * out_dtype.itemsize,
        most_threads=_threads(rows, cols, dtype),
        half_bytes=stripes * width,
        sent=(state.ranks - 1) * rows * width,
    )


def two_step(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, state: "GroupState"
) -> Prepared:
    """As `steps.two_step`, for x[rows, cols]."""
    from flashcomm.kernels import cpu, epochs

    first, second = codec.steps
    rows, cols = shorten(rows, cols, codec, state.ranks, PIECE_BYTES // state.ranks)
    width, sum_width = first.payload_bytes(cols, dtype), second.payload_bytes(cols, dtype)
    encode, add = cpu.encoder(first, cols, cpu.KINDS[dtype]), cpu.reducer(first, second, cols, state.ranks)
    decode = cpu.decoder(second, cols, cpu.KINDS[out_dtype], 1)
    return Prepared(
        function=epochs.two_step,
        programs=(encode.each, add.each, add.after, decode.each),
        scratch_bytes=max(encode.scratch_bytes, add.scratch_bytes, decode.scratch_bytes),
        width=width,
        sum_width=sum_width,
        piece=_piece(cols * dtype.itemsize, max(width, sum_width), state.ranks),
        rows=rows,
        cols=cols,
        x_rows=rows,
        out_rows=rows,
        x_stride=cols * dtype.itemsize,
        out_stride=cols * out_dtype.itemsize,
        most_threads=_threads(rows, cols, dtype),
        half_bytes=max(width, sum_width),
        sent=(state.ranks - 1) * -(-rows // state.ranks) * (width + sum_width),
    )


def all_gather(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, state: "GroupState"
) -> Prepared:
    """As `steps.all_gather`, for x[rows, cols]."""
    from flashcomm.kernels import cpu, epochs

    rows, cols = shorten(rows, cols, codec, 1, PIECE_BYTES)
    width = codec.payload_bytes(cols, dtype)
    encode, decode = cpu.encoder(codec, cols, cpu.KINDS[dtype]), cpu.decoder(codec, cols, cpu.KINDS[out_dtype], 1)
    return Prepared(
        function=epochs.gather,
        programs=(encode.each, decode.each),
        scratch_bytes=max(encode.scratch_bytes, decode.scratch_bytes),
        width=width,
        piece=_piece(cols * dtype.itemsize, width),
        rows=rows,
        cols=cols,
        x_rows=rows,
        out_rows=state.ranks * rows,
        x_stride=cols * dtype.itemsize,
        out_stride=cols * out_dtype.itemsize,
        most_threads=_threads(rows, cols, dtype),
        half_bytes=width,
        sent=(state.ranks - 1) * rows * width,
    )


def _piece(row_bytes: int, payload_bytes: int, multiple: int = 1) -> int:
    """Rows to a piece: by the bytes of values in it, and so that their payload fits into half a region."""
    n = min(PIECE_BYTES // max(1, row_bytes), HALF_BYTES // max(1, payload_bytes))
    return n // multiple * multiple or max(1, n)


def _threads(rows: int, cols: int, dtype: torch.dtype) -> int:
    return min(rows, 1 + rows * cols * dtype.itemsize // _BYTES_PER_THREAD)
