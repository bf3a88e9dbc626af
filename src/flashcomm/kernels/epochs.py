"""Collectives over memory that the ranks of a host share: each a compiled loop of encode, meet, decode.

Every rank owns a region that all map, of two halves, and a counter of the epochs that it has published. One rule, for
every algorithm and every piece of a message:

    epoch e:  write your half e % 2 | publish: counter = e + 1 | wait until every counter > e | read all halves e % 2

Why nobody overwrites what is still read: who writes for epoch e + 2 has seen every counter above e + 1, and a rank
publishes e + 2 only after it has read what epoch e gave. Why a reader sees what was written: counters are stored with
release and loaded with acquire order, so whatever a rank did before it published happened before whatever others do
once they have seen that. No step needs a store to be seen before a later load of its own, which is the one reordering
that x86 makes and that release and acquire do not forbid; so the same rule is sound on x86, where both are plain
moves, and on ARM, where LLVM emits ``stlr`` and ``ldar``. `tests/collectives/test_epochs.py` checks the rule against
every interleaving of a small world.

Waiting spins for some microseconds, then yields the core, and after two milliseconds sleeps in ``poll`` on the process
descriptors of its peers, which end when a peer does: a dead rank is noticed within a millisecond or so.

Hazard: addresses are integers and nothing checks them; only `flashcomm.collectives.shared` may call this.

Shape legend: R ranks, T rows, P payload bytes of a row. `place` and `call` are arrays of the fields below: numba spends
30 ns or so on each argument, which matters where a sum takes a microsecond.

Source: our own.
"""

import platform

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from flashcomm.kernels.cpu import STEP_FIELDS, run_rows
from flashcomm.kernels.steps import compiled

# Where a thread of a rank works: fields of an int64 array.
RANK, RANKS, BASE, STRIDE, HALF, COUNTERS, COUNTER_STRIDE, SPINS, POLLS, TIMEOUT_NS, FIELDS = range(11)
"""This rank; ranks; address of rank 0's region; bytes from one region to the next; bytes of a half; address of rank 0's
counter; bytes from one counter to the next; spins before yielding; address of R ``struct pollfd``, this rank's own
ignored; nanoseconds before giving up."""

# What is done there: fields of another, behind which the programs lie one after the other.
(
    ROWS, PIECE, WIDTH, SUM_WIDTH, OUT_STRIDE, TIMES, STRIPES, MINE, PROGRAMS,
) = range(9)  # fmt: skip
"""Rows of the result, or of each part of it; rows that are published at once; bytes of a row's payload; of a sum's;
from one row of the result to the next; ranks for which the second program runs, where the third sees the rest; stripes
of x, of which this rank adds one, and which; where the first program begins, where the next one does, and so on."""
MOST_PROGRAMS = 4
STEPS = PROGRAMS + MOST_PROGRAMS + 1

ALL_MET = -1

_I64 = ir.IntType(64)
_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_poll = types.ExternalFunction("poll", types.int32(types.int64, types.uint64, types.int32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_MONOTONIC = 1
_PATIENCE_NS = 2_000_000


@intrinsic
def publish(typingctx, address, value):
    """Store an int64 for others to see, with all that was done before."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.PointerType(_I64))
        builder.store_atomic(args[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def observe(typingctx, address):
    """Load an int64 that another rank publishes; what comes after in the program happens after."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], ir.PointerType(_I64))
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _relax(typingctx):
    """Tell the core that this is a spin loop, where it knows such an instruction."""

    def codegen(context, builder, sig, args):
        if platform.machine() in ("x86_64", "AMD64"):
            name, operands = "llvm.x86.sse2.pause", []
        elif platform.machine() in ("aarch64", "arm64"):
            name, operands = "llvm.aarch64.hint", [ir.Constant(ir.IntType(32), 1)]
        else:
            return context.get_dummy_value()
        kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)
        return context.get_dummy_value()

    return types.void(), codegen


@njit(error_model="numpy")
def _now_ns(clock):
    _clock_gettime(_MONOTONIC, clock.ctypes.data)
    return clock[0] * 1_000_000_000 + clock[1]


@intrinsic
def _events(typingctx, address):
    """What poll found about a process: the last two bytes of a ``struct pollfd``."""

    def codegen(context, builder, sig, args):
        i16 = ir.IntType(16)
        found = builder.load(builder.inttoptr(builder.add(args[0], ir.Constant(_I64, 6)), ir.PointerType(i16)))
        return builder.zext(found, _I64)

    return types.int64(types.int64), codegen


@njit(error_model="numpy")
def _gone(place, epoch):
    """A rank whose process has ended before it published `epoch`, or ALL_MET."""
    for peer in range(place[RANKS]):
        # In this order: who has ended will not publish any more.
        if _events(place[POLLS] + peer * 8) != 0 and observe(place[COUNTERS] + peer * place[COUNTER_STRIDE]) < epoch:
            return peer
    return ALL_MET


@njit(error_model="numpy")
def _epoch(place):
    return observe(place[COUNTERS] + place[RANK] * place[COUNTER_STRIDE])


@njit(error_model="numpy")
def _meet(place, epoch):
    """Publish `epoch` and wait until all have: ALL_MET, or the rank that did not come."""
    publish(place[COUNTERS] + place[RANK] * place[COUNTER_STRIDE], epoch)
    clock = np.empty(2, np.int64)
    tries, since, now = 0, 0, 0
    for peer in range(place[RANKS]):
        counter = place[COUNTERS] + peer * place[COUNTER_STRIDE]
        while observe(counter) < epoch:
            tries += 1
            if tries < place[SPINS]:
                _relax()
                continue
            if now - since > _PATIENCE_NS:
                if _poll(place[POLLS], place[RANKS], 1) > 0:
                    gone = _gone(place, epoch)
                    if gone != ALL_MET:
                        return gone
                if now - since > place[TIMEOUT_NS]:
                    return peer
            else:
                _sched_yield()
            if tries % 16 == 0 or now - since > _PATIENCE_NS:
                now = _now_ns(clock)
                if since == 0:
                    since = now
    return ALL_MET


@njit(error_model="numpy")
def _program(call, number):
    return call[call[PROGRAMS + number] : call[PROGRAMS + number + 1]].reshape(-1, STEP_FIELDS)


def _sum(place, call, scratch, x, x_stride, out, thread, threads):
    """out[T] = the sum over ranks of one stripe of their x[stripes * T], in fp32."""
    encode, each, after = _program(call, 0), _program(call, 1), _program(call, 2)
    length, piece, width, stripes, mine = call[ROWS], call[PIECE], call[WIDTH], call[STRIPES], call[MINE]
    nothing, out_stride, last = encode[:0], call[OUT_STRIDE], length * (thread + 1) // threads
    for r in range(length * thread // threads, last, piece):
        n, epoch = min(piece, last - r), _epoch(place)
        half = place[BASE] + (epoch & 1) * place[HALF]
        own = half + place[RANK] * place[STRIDE]
        for stripe in range(stripes):
            source = x + (stripe * length + r) * x_stride
            run_rows(encode, 1, 0, source, x_stride, nothing, own + stripe * n * width, width, scratch, 0, n)
        missing = _meet(place, epoch + 1)
        if missing != ALL_MET:
            return missing
        theirs = half + mine * n * width
        target = out + r * out_stride
        run_rows(each, call[TIMES], place[STRIDE], theirs, width, after, target, out_stride, scratch, 0, n)
    return ALL_MET


def _two_step(place, call, scratch, x, x_stride, out, thread, threads):
    """out[T] = the sum over ranks of x[T], encoded again by the rank that adds it."""
    encode, each, after, decode = _program(call, 0), _program(call, 1), _program(call, 2), _program(call, 3)
    rows, piece, width, sum_width = call[ROWS], call[PIECE], call[WIDTH], call[SUM_WIDTH]
    nothing, ranks, out_stride, last = encode[:0], place[RANKS], call[OUT_STRIDE], rows * (thread + 1) // threads
    for r in range(rows * thread // threads, last, piece):
        n, epoch = min(piece, last - r), _epoch(place)
        half = place[BASE] + (epoch & 1) * place[HALF]
        own = half + place[RANK] * place[STRIDE]
        run_rows(encode, 1, 0, x + r * x_stride, x_stride, nothing, own, width, scratch, 0, n)
        missing = _meet(place, epoch + 1)
        if missing != ALL_MET:
            return missing
        # The piece's rows, dealt out to the ranks that add them.
        length = (n + ranks - 1) // ranks
        start = min(place[RANK] * length, n)
        stop = min(start + length, n)
        sums = place[BASE] + ((epoch + 1) & 1) * place[HALF]
        target = sums + place[RANK] * place[STRIDE] - start * sum_width
        run_rows(each, ranks, place[STRIDE], half, width, after, target, sum_width, scratch, start, stop)
        missing = _meet(place, epoch + 2)
        if missing != ALL_MET:
            return missing
        for peer in range(ranks):
            start = min(peer * length, n)
            stop = min(start + length, n)
            source = sums + peer * place[STRIDE] - start * sum_width
            run_rows(decode, 1, 0, source, sum_width, nothing, out + r * out_stride, out_stride, scratch, start, stop)
    return ALL_MET


def _gather(place, call, scratch, x, x_stride, out, thread, threads):
    """out[R * T] = every rank's x[T], as its payload decodes."""
    encode, decode = _program(call, 0), _program(call, 1)
    length, piece, width = call[ROWS], call[PIECE], call[WIDTH]
    nothing, out_stride, last = encode[:0], call[OUT_STRIDE], length * (thread + 1) // threads
    for r in range(length * thread // threads, last, piece):
        n, epoch = min(piece, last - r), _epoch(place)
        half = place[BASE] + (epoch & 1) * place[HALF]
        own = half + place[RANK] * place[STRIDE]
        run_rows(encode, 1, 0, x + r * x_stride, x_stride, nothing, own, width, scratch, 0, n)
        missing = _meet(place, epoch + 1)
        if missing != ALL_MET:
            return missing
        for peer in range(place[RANKS]):
            target = out + (peer * length + r) * out_stride
            source = half + peer * place[STRIDE]
            run_rows(decode, 1, 0, source, width, nothing, target, out_stride, scratch, 0, n)
    return ALL_MET


def _exchange(function):
    return compiled(lambda on_disk: njit(nogil=True, error_model="numpy", cache=on_disk)(function))


sum_stripes, two_step, gather = _exchange(_sum), _exchange(_two_step), _exchange(_gather)
