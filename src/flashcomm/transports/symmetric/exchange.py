"""One-step and two-step all-reduce in one launch, over memory in which every rank can write.

A message is rows of one tile each. Program b of every rank handles rows b, b + B, b + 2B, ... of each stripe and talks
to the programs b of the other ranks alone, so no program waits for another of its own launch. Payloads are encoded
where they are cheap to write, in this rank's memory, and travel as words of 16 bytes.

    memory of a rank    flags [2, R, B] | half 0 | half 1
    half, one_step      payloads [R, T, P]
    half, two_step      stage [R, S, P] | received [R, S, P] | sums [R, S, P']

Calls count epochs, per program, in the device's memory: a graph that is replayed goes on counting. A call works in the
half of its epoch's parity. Who begins epoch e + 2 has seen in epoch e + 1 a flag of every other rank, and a rank sets
that flag in a launch that began when its launch of epoch e had ended. So nobody reads any more what is overwritten.

Shape legend: R ranks, B programs, T rows, S rows of a stripe, P payload bytes of a row, rounded up to 16.

Source: Flash Communication (arXiv 2412.04964), section 3.2; the epochs are those of `transports.shared.loops`.
"""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.blocks import largest_magnitude
from flashcomm.kernels.gpu.tiles.move import read, read_sum, write
from flashcomm.kernels.gpu.tiles.values import read_values, write_values
from flashcomm.transports.symmetric.flags import signal, wait


@triton.jit
def _place(buffers_ptr, rank, offset):
    """The address `offset` bytes into the memory of a rank."""
    base = tl.load(buffers_ptr + rank) + offset
    return tl.multiple_of(base.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def _long(n):
    """Widen to int64, also where Triton has made a constant of a number."""
    return tl.full([], 0, tl.int64) + n


@triton.jit
def _half(epoch, half_bytes, R: tl.constexpr):
    """Offset in bytes of the half that a call works in: behind the flags, a multiple of 16."""
    return tl.cdiv(8 * R * tl.num_programs(0), 16) * 16 + (epoch & 1).to(tl.int64) * half_bytes


@triton.jit
def _flag(buffers_ptr, rank, step, source, R: tl.constexpr):
    """The flag of a rank that `source` sets to this program of it, when its part of a step has arrived."""
    offset = 4 * ((step * R + source) * tl.num_programs(0) + tl.program_id(0))
    return (tl.load(buffers_ptr + rank) + offset).to(tl.pointer_type(tl.int32))


@triton.jit
def _await(buffers_ptr, rank, step, peer, epoch, patience, lost_ptr, R: tl.constexpr, PTX: tl.constexpr):
    """Wait until a rank has signalled; return the patience left for others, which is none once one rank was lost."""
    come = wait(_flag(buffers_ptr, rank, step, peer, R), epoch, patience, PTX)
    # Once a rank was lost, others are not waited for, and may be late only.
    if not come and tl.load(lost_ptr) == 0:
        tl.store(lost_ptr, peer + 1)
    return tl.where(come, patience, 0)


@triton.jit
def _begin(epochs_ptr, lost_ptr, patience):
    """Begin this program of a launch: its epoch, and the patience for flags, which is none once a rank was lost."""
    running = epochs_ptr + tl.num_programs(0) + tl.program_id(0)
    # A replay on another stream than the last eager call's is seen by no host.
    if tl.atomic_xchg(running, 1) != 0:
        tl.store(lost_ptr, -1)
    # A graph that is replayed asks nobody whether a rank was lost, so its launches find out by themselves.
    patience = tl.where(tl.load(lost_ptr) == 0, patience, 0)
    return tl.load(epochs_ptr + tl.program_id(0)) + 1, patience


@triton.jit
def _end(epochs_ptr, epoch):
    tl.debug_barrier()
    tl.store(epochs_ptr + tl.program_id(0), epoch)
    tl.atomic_xchg(epochs_ptr + tl.num_programs(0) + tl.program_id(0), 0)


@triton.jit
def _copy(target_ptr, source_ptr, width, WORDS: tl.constexpr):
    """Copy `width` bytes from address to address, all multiples of 16."""
    word = tl.arange(0, WORDS)
    # By way of integers, as Triton's interpreter refuses to make one pointer of another.
    source = tl.multiple_of(source_ptr.to(tl.int64).to(tl.pointer_type(tl.int32)), 16) + word
    target = tl.multiple_of(target_ptr.to(tl.int64).to(tl.pointer_type(tl.int32)), 16) + word
    # Compared in words, so that Triton sees that the mask is the same for four of them, which travel at once.
    inside = word < width // 4
    tl.store(target, tl.load(source, mask=inside), mask=inside)


@triton.jit
def _encode(ptr, x, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    largest = 0
    if F.scale == "e4m3" or F.scale == "e5m0":
        largest = largest_magnitude(x, 0, cols, F, V, EDGE)
    write(ptr, x, 0, cols, largest, F, V, EDGE)


@triton.jit(do_not_specialize=["patience", "rank", "rows"])
def one_step(
    x_ptr,
    out_ptr,
    buffers_ptr,
    epochs_ptr,
    lost_ptr,
    patience,
    rank,
    rows,
    cols,
    half_bytes,
    width,
    R: tl.constexpr,
    VALUES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V: tl.constexpr,
    EDGE: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Sum every rank's x[T, H] into out[T, H]; each rank sends all of its payload to every other."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    epoch, patience = _begin(epochs_ptr, lost_ptr, patience)
    start = _half(epoch, half_bytes, R)
    line, width = _long(cols), _long(width)
    of_rank = rows * width
    mine = _place(buffers_ptr, rank, start + rank * of_rank)
    for row in range(block, rows, blocks):
        x = read_values(x_ptr + row * line, 0, cols, VALUES, V, EDGE)
        _encode(mine + row * width, x, cols, FIRST, V, EDGE)
    tl.debug_barrier()
    for i in range(1, R):
        peer = (rank + i) % R
        theirs = _place(buffers_ptr, peer, start + rank * of_rank)
        for row in range(block, rows, blocks):
            at = row * width
            _copy(theirs + at, mine + at, width, WORDS)
        signal(_flag(buffers_ptr, peer, 0, rank, R), epoch, PTX)
    for i in range(1, R):
        peer = (rank + i) % R
        patience = _await(buffers_ptr, rank, 0, peer, epoch, patience, lost_ptr, R, PTX)
    all_ranks = _place(buffers_ptr, rank, start)
    for row in range(block, rows, blocks):
        x = read_sum(all_ranks + row * width, of_rank, R, 0, cols, FIRST, V, EDGE)
        write_values(out_ptr + row * line, x, 0, cols, VALUES, V, EDGE)
    _end(epochs_ptr, epoch)


@triton.jit(do_not_specialize=["patience", "rank", "rows"])
def two_step(
    x_ptr,
    out_ptr,
    buffers_ptr,
    epochs_ptr,
    lost_ptr,
    patience,
    rank,
    rows,
    cols,
    half_bytes,
    width,
    sum_width,
    R: tl.constexpr,
    VALUES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    V: tl.constexpr,
    EDGE: tl.constexpr,
    WORDS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Sum every rank's x[T, H] into out[T, H]; each rank adds up its stripe and sends the sums to every other."""
    block, blocks = tl.program_id(0), tl.num_programs(0)
    epoch, patience = _begin(epochs_ptr, lost_ptr, patience)
    stripe = (rows + R - 1) // R
    line, width, sum_width = _long(cols), _long(width), _long(sum_width)
    of_rank, sums_of_rank = stripe * width, stripe * sum_width
    stage = _half(epoch, half_bytes, R)
    received, sums = stage + R * of_rank, stage + 2 * R * of_rank
    for i in range(1, R + 1):
        # Our own stripe last: the others are on their way meanwhile.
        peer = (rank + i) % R
        first = peer * stripe
        staged = _place(buffers_ptr, rank, tl.where(peer == rank, received, stage) + peer * of_rank)
        for row in range(block, tl.minimum(stripe, rows - first), blocks):
            x = read_values(x_ptr + (first + row) * line, 0, cols, VALUES, V, EDGE)
            _encode(staged + row * width, x, cols, FIRST, V, EDGE)
        tl.debug_barrier()
        if peer != rank:
            theirs = _place(buffers_ptr, peer, received + rank * of_rank)
            for row in range(block, tl.minimum(stripe, rows - first), blocks):
                at = row * width
                _copy(theirs + at, staged + at, width, WORDS)
            signal(_flag(buffers_ptr, peer, 0, rank, R), epoch, PTX)
    for i in range(1, R):
        peer = (rank + i) % R
        patience = _await(buffers_ptr, rank, 0, peer, epoch, patience, lost_ptr, R, PTX)
    parts, mine = _place(buffers_ptr, rank, received), _place(buffers_ptr, rank, sums + rank * sums_of_rank)
    for row in range(block, tl.minimum(stripe, rows - rank * stripe), blocks):
        x = read_sum(parts + row * width, of_rank, R, 0, cols, FIRST, V, EDGE)
        _encode(mine + row * sum_width, x, cols, SECOND, V, EDGE)
    tl.debug_barrier()
    for i in range(1, R):
        peer = (rank + i) % R
        theirs = _place(buffers_ptr, peer, sums + rank * sums_of_rank)
        for row in range(block, tl.minimum(stripe, rows - rank * stripe), blocks):
            at = row * sum_width
            _copy(theirs + at, mine + at, sum_width, WORDS)
        signal(_flag(buffers_ptr, peer, 1, rank, R), epoch, PTX)
    for i in range(R):
        peer = (rank + i) % R
        if peer != rank:
            patience = _await(buffers_ptr, rank, 1, peer, epoch, patience, lost_ptr, R, PTX)
        first = peer * stripe
        theirs = _place(buffers_ptr, rank, sums + peer * sums_of_rank)
        for row in range(block, tl.minimum(stripe, rows - first), blocks):
            x = read(theirs + row * sum_width, 0, cols, SECOND, V, EDGE)
            write_values(out_ptr + (first + row) * line, x, 0, cols, VALUES, V, EDGE)
    _end(epochs_ptr, epoch)
