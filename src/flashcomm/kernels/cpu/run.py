"""The verbs on the CPU: whole programs per codec, the compiled loop that runs them, and its threads.

Hazard: nothing here checks its arguments; `flashcomm.kernels.verbs` does.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from numba import njit

from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import Codec
from flashcomm.codecs.cast import Cast
from flashcomm.codecs.lossless import Lossless
from flashcomm.kernels.cpu import ops, simd
from flashcomm.kernels.cpu.formats import append_decode, append_encode
from flashcomm.kernels.cpu.ops import BF16, FP32
from flashcomm.kernels.cpu.program import (
    ADD,
    IN,
    KINDS,
    NEXT,
    NEXT_IN,
    NUMBER,
    OUT,
    SCRATCH,
    SOURCE,
    SUMS,
    TARGET,
    Program,
    Row,
)

# Below this many values a second thread costs more than it saves (measured 2026-11-20, 2 cores: 20 us to hand over).
_VALUES_PER_THREAD = 1 << 16

# Flat tensors may have any length, so programs are not kept for ever.
_remembered = lru_cache(maxsize=4096)


@dataclass(frozen=True, slots=True)
class Run:
    """A program for the payload of each rank and one for after the last rank, ready to run on rows.

    Args:
        each: table of the program that sees one rank's row after the other.
        after: table of the program that runs then; it sees the row of rank `times`, if there is one.
        scratch_bytes: scratch memory that both need.
        constants: arrays that the steps read, kept alive here.
        times: number of ranks that `each` runs for.
    """

    each: np.ndarray
    after: np.ndarray
    scratch_bytes: int
    constants: list[np.ndarray]
    times: int = 1


def _ready(each: Program, after: Program | None = None, times: int = 1) -> Run:
    after = after or Program(each.cols)
    scratch_bytes = max(each.scratch_bytes, after.scratch_bytes)
    return Run(each.table(), after.table(), scratch_bytes, each.constants + after.constants, times)


@_remembered
def encoder(codec: Codec, cols: int, kind: int) -> Run:
    """Encode a row."""
    p = Program(cols)
    append_encode(codec, p, Row(IN, kind, False), OUT)
    return _ready(p)


@_remembered
def decoder(codec: Codec, cols: int, kind: int, ranks: int) -> Run:
    """Decode a row of one rank, or of several and add them in rank order."""
    each, after, out = Program(cols), Program(cols), Row(OUT, kind, False)
    if ranks == 1:
        append_decode(codec, each, IN, out)
        return _ready(each)
    if ranks == 2 and isinstance(codec, Cast) and KINDS[codec.wire] == kind and cols % 32 == 0:
        # Two payloads that are the values themselves need no sums in between.
        after.add(ops.add_two, IN, NEXT_IN, kind, cols, OUT)
        return _ready(each, after, times=0)
    append_decode(codec, each, IN, Row(SUMS, FP32, True))
    if (
        kind == BF16
        and cols % 32 == 0
        and (
            codec in (Cast(torch.bfloat16), Lossless(torch.bfloat16))
            or (isinstance(codec, Affine) and not min(codec.group, cols) % 32)
        )
    ):
        # The last rank's values need not go into the sums to come out again.
        append_decode(codec, after, IN, Row(OUT, kind, False, SUMS))
        return _ready(each, after, times=ranks - 1)
    after.add(ops.narrow, SUMS, cols, OUT, kind, 1)
    return _ready(each, after, times=ranks)


@_remembered
def reducer(codec: Codec, out_codec: Codec, cols: int, ranks: int) -> Run:
    """Decode a row of each rank, add them in rank order, encode the sum."""
    sums, each, after = Row(SUMS, FP32, True), Program(cols), Program(cols)
    append_decode(codec, each, IN, sums)
    append_encode(out_codec, after, sums, OUT)
    return _ready(each, after, times=ranks)


def _rows(each, ranks, rank_stride, source, source_stride, after, target, target_stride, scratch, first, last):
    operands = simd.stack()  # pyright: ignore[reportCallIssue]
    registers = operands + 8 * simd.MAX_OPERANDS
    simd.store_long(registers + 8 * NUMBER, 0)
    simd.store_long(registers + 8 * SCRATCH, scratch.ctypes.data)
    # Once for all rows: a thread that flushes subnormal numbers must give the bits of those that do not.
    before = simd.keep_subnormals()  # pyright: ignore[reportCallIssue]
    for r in range(first, last):
        simd.store_long(registers + 8 * TARGET, target + r * target_stride)
        for rank in range(ranks + 1):
            table = each if rank < ranks else after
            at = source + rank * rank_stride + r * source_stride
            simd.store_long(registers + 8 * SOURCE, at)
            simd.store_long(registers + 8 * NEXT, at + rank_stride)
            simd.store_long(registers + 8 * ADD, simd.field(registers, SCRATCH) if rank > 0 else 0)
            for s in range(table.shape[0]):
                count = table[s, 1]
                for i in range(count):
                    operand = simd.field(registers, table[s, 2 + i]) + table[s, 2 + simd.MAX_OPERANDS + i]
                    simd.store_long(operands + 8 * i, operand)
                simd.call(table[s, 0], operands, count)
    simd.restore_control(before)  # pyright: ignore[reportCallIssue]


run_rows = ops.compiled(lambda on_disk: njit(nogil=True, error_model="numpy", cache=on_disk)(_rows))
"""Run the programs on rows `first` to `last`: `each` for every rank, then `after`. `scratch` is a uint8 array."""


@cache
def pool(threads):
    """The threads that share the rows of a large message."""
    return ThreadPoolExecutor(threads, thread_name_prefix="flashcomm-cpu")


def _over_rows(run: Run, ranks, rank_stride, source: torch.Tensor, target: torch.Tensor, cols: int):
    """Run over all rows of `target`, on as many threads as torch is set to use."""
    rows = target.shape[0]
    from_stride, to_stride = (t.stride(-2) * t.element_size() for t in (source, target))
    fixed = (run.each, run.times, rank_stride, source.data_ptr(), from_stride, run.after, target.data_ptr(), to_stride)
    threads = max(1, min(torch.get_num_threads(), rows, rows * cols * ranks // _VALUES_PER_THREAD))
    if threads == 1:
        run_rows(*fixed, np.empty(run.scratch_bytes, np.uint8), 0, rows)
        return
    over = lambda first, last: run_rows(*fixed, np.empty(run.scratch_bytes, np.uint8), first, last)  # noqa: E731
    edges = [rows * t // threads for t in range(threads + 1)]
    list(pool(threads).map(over, edges[:-1], edges[1:]))


def encode(x, codec, out):
    """[rows, cols] bf16, fp16 or fp32 with unit stride in a row -> out[rows, payload_bytes(cols)] uint8."""
    cols = x.shape[1]
    _over_rows(encoder(codec, cols, KINDS[x.dtype]), 1, 0, x, out, cols)


def decode_sum(payloads, codec, out):
    """payloads[ranks, rows, payload_bytes(cols)] -> out[rows, cols], summed in fp32 in rank order."""
    ranks, cols = payloads.shape[0], out.shape[1]
    run = decoder(codec, cols, KINDS[out.dtype], ranks)
    _over_rows(run, ranks, payloads.stride(0), payloads, out, cols)


def decode_sum_encode(payloads, codec, out_codec, cols, out):
    """payloads[ranks, rows, bytes] in `codec` -> out[rows, bytes] in `out_codec`; the sum itself stays in fp32."""
    ranks = payloads.shape[0]
    _over_rows(reducer(codec, out_codec, cols, ranks), ranks, payloads.stride(0), payloads, out, cols)
