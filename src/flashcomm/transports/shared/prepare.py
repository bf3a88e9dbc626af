"""A collective over memory that all ranks of a host map, prepared once for rows of one length and type.

Source: our own; the two steps are Flash Communication's (arXiv 2412.04964).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from flashcomm import kernels
from flashcomm.codecs import Codec
from flashcomm.kernels import cpu
from flashcomm.transports.base import Task
from flashcomm.transports.shared import loops
from flashcomm.transports.shared.sizes import HALF_BYTES, PIECE_BYTES

_BYTES_PER_THREAD = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A collective on rows of one length and type, ready to run in any memory."""

    function: Callable[..., int]
    programs: Sequence[np.ndarray]
    """Steps for each row, as `kernels.cpu` writes them."""
    times: int = 0
    """Number of ranks that ``programs[1]`` decodes; ``programs[2]`` decodes the remaining ones."""
    scratch_bytes: int
    width: int
    """Bytes of a row's payload."""
    sum_width: int = 0
    """Bytes of a row of sums, encoded again."""
    stripes: int = 1
    mine: int = 0
    """The stripe that this rank adds."""
    piece: int
    """Rows that a rank publishes at once."""
    rows: int
    cols: int
    x_rows: int
    out_rows: int
    x_stride: int
    """Bytes from one row of x to the next."""
    out_stride: int
    """Bytes from one row of out to the next."""
    most_threads: int
    """Threads that speed this call up."""
    half_bytes: int
    """Bytes that a half of each rank's region must have."""
    sent: int
    """Bytes that other ranks read from this one, as if it sent them one by one."""
    call: np.ndarray = field(init=False)
    """Arguments of `function`, by the fields of `loops`."""

    def __post_init__(self):
        fields = np.zeros(loops.STEPS, np.int64)
        fields[loops.ROWS], fields[loops.PIECE], fields[loops.OUT_STRIDE] = self.rows, self.piece, self.out_stride
        fields[loops.WIDTH], fields[loops.SUM_WIDTH], fields[loops.TIMES] = self.width, self.sum_width, self.times
        fields[loops.STRIPES], fields[loops.MINE] = self.stripes, self.mine
        ends = loops.STEPS + np.cumsum([0, *(program.size for program in self.programs)])
        fields[loops.PROGRAMS :][: len(ends)] = ends
        object.__setattr__(self, "call", np.concatenate([fields, *(program.ravel() for program in self.programs)]))


@lru_cache(maxsize=4096)
def shorten(rows: int, cols: int, codec: Codec, least: int, most_bytes: int) -> tuple[int, int]:
    """[rows, cols] as at least `least` rows of at most `most_bytes` bytes of fp32 each, where the codec's groups allow.

    >>> from flashcomm.codecs import parse
    >>> shorten(1, 1 << 20, parse("int8g128"), least=4, most_bytes=1 << 20)
    (4, 262144)
    """
    unit = codec.unit(cols)
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
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, rank: int, ranks: int
) -> Prepared:
    """Prepare ``algorithms.one_step`` for x[rows, cols]."""
    return _sum(codec, rows, cols, dtype, out_dtype, rank, ranks, stripes=1)


def reduce_scatter(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, rank: int, ranks: int
) -> Prepared:
    """Prepare ``algorithms.reduce_scatter`` for x[rows, cols]."""
    return _sum(codec, rows, cols, dtype, out_dtype, rank, ranks, stripes=ranks)


def _sum(
    codec: Codec,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    rank: int,
    ranks: int,
    stripes: int,
) -> Prepared:
    rows, cols = shorten(rows // stripes, cols, codec, 1, PIECE_BYTES // stripes)
    width = codec.payload_bytes(cols, dtype)
    encode = cpu.encoder(codec, cols, cpu.KINDS[dtype])
    decode = cpu.decoder(codec, cols, cpu.KINDS[out_dtype], ranks)
    return Prepared(
        function=loops.sum_stripes,
        programs=(encode.each, decode.each, decode.after),
        times=decode.times,
        scratch_bytes=max(encode.scratch_bytes, decode.scratch_bytes),
        width=width,
        stripes=stripes,
        mine=rank % stripes,
        piece=_piece(stripes * cols * dtype.itemsize, stripes * width),
        rows=rows,
        cols=cols,
        x_rows=stripes * rows,
        out_rows=rows,
        x_stride=cols * dtype.itemsize,
        out_stride=cols * out_dtype.itemsize,
        most_threads=_threads(rows, cols, dtype),
        half_bytes=stripes * width,
        sent=(ranks - 1) * rows * width,
    )


def two_step(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, rank: int, ranks: int
) -> Prepared:
    """Prepare ``algorithms.two_step`` for x[rows, cols]."""
    first, second = codec.formats
    rows, cols = shorten(rows, cols, codec, ranks, PIECE_BYTES // ranks)
    width, sum_width = first.payload_bytes(cols, dtype), second.payload_bytes(cols, dtype)
    encode, add = cpu.encoder(first, cols, cpu.KINDS[dtype]), cpu.reducer(first, second, cols, ranks)
    decode = cpu.decoder(second, cols, cpu.KINDS[out_dtype], 1)
    return Prepared(
        function=loops.two_step,
        programs=(encode.each, add.each, add.after, decode.each),
        scratch_bytes=max(encode.scratch_bytes, add.scratch_bytes, decode.scratch_bytes),
        width=width,
        sum_width=sum_width,
        piece=_piece(cols * dtype.itemsize, max(width, sum_width), ranks),
        rows=rows,
        cols=cols,
        x_rows=rows,
        out_rows=rows,
        x_stride=cols * dtype.itemsize,
        out_stride=cols * out_dtype.itemsize,
        most_threads=_threads(rows, cols, dtype),
        half_bytes=max(width, sum_width),
        sent=(ranks - 1) * -(-rows // ranks) * (width + sum_width),
    )


def all_gather(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, rank: int, ranks: int
) -> Prepared:
    """Prepare ``algorithms.all_gather`` for x[rows, cols]."""
    return _copies(codec, rows, cols, dtype, out_dtype, function=loops.gather, senders=ranks, copies=ranks - 1)


def broadcast(
    codec: Codec, rows: int, cols: int, dtype: torch.dtype, out_dtype: torch.dtype, rank: int, ranks: int, root: int
) -> Prepared:
    """Prepare ``algorithms.broadcast`` for x[rows, cols] of rank `root`."""
    copies = ranks - 1 if rank == root else 0
    return _copies(codec, rows, cols, dtype, out_dtype, function=loops.broadcast, senders=1, copies=copies, mine=root)


def _copies(
    codec: Codec,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    function: Callable[..., int],
    senders: int,
    copies: int,
    mine: int = 0,
) -> Prepared:
    """Prepare rows that are encoded once and decoded as they are, `copies` times by other ranks."""
    rows, cols = shorten(rows, cols, codec, 1, PIECE_BYTES)
    width = codec.payload_bytes(cols, dtype)
    encode, decode = cpu.encoder(codec, cols, cpu.KINDS[dtype]), cpu.decoder(codec, cols, cpu.KINDS[out_dtype], 1)
    return Prepared(
        function=function,
        programs=(encode.each, decode.each),
        scratch_bytes=max(encode.scratch_bytes, decode.scratch_bytes),
        width=width,
        mine=mine,
        piece=_piece(cols * dtype.itemsize, width),
        rows=rows,
        cols=cols,
        x_rows=rows,
        out_rows=senders * rows,
        x_stride=cols * dtype.itemsize,
        out_stride=cols * out_dtype.itemsize,
        most_threads=_threads(rows, cols, dtype),
        half_bytes=width,
        sent=copies * rows * width,
    )


def _piece(row_bytes: int, payload_bytes: int, multiple: int = 1) -> int:
    """Rows of a piece, limited by the bytes of their values and by the half of a region that holds their payloads."""
    n = min(PIECE_BYTES // max(1, row_bytes), HALF_BYTES // max(1, payload_bytes))
    return n // multiple * multiple or max(1, n)


def _threads(rows: int, cols: int, dtype: torch.dtype) -> int:
    return min(rows, 1 + rows * cols * dtype.itemsize // _BYTES_PER_THREAD)


_COLLECTIVES: dict[str, Callable[..., Prepared]] = {
    "one_step": one_step,
    "two_step": two_step,
    "reduce_scatter": reduce_scatter,
    "all_gather": all_gather,
    "broadcast": broadcast,
}
_LOOPS = {
    "one_step": loops.sum_stripes,
    "two_step": loops.two_step,
    "reduce_scatter": loops.sum_stripes,
    "all_gather": loops.gather,
    "broadcast": loops.broadcast,
}


def _serves(task: Task) -> bool:
    # Uneven parts first: some rank may have no rows, and all must find the same.
    if task.sizes or task.name not in _COLLECTIVES or not (task.rows and task.cols):
        return False
    return not kernels.any_missing(task.codec, "cpu")


def load(task: Task):
    """Compile the loop of a task, or load it from disk."""
    if _serves(task):
        _LOOPS[task.name].compile(loops.SIGNATURE)


def prepare(task: Task, rank: int, ranks: int) -> Prepared | None:
    """Prepare a task; None where shared memory does not serve it."""
    if not _serves(task):
        return None
    whose = {"root": task.root} if task.name == "broadcast" else {}
    function = _COLLECTIVES[task.name]
    return function(task.codec, task.rows, task.cols, task.dtype, task.out_dtype, rank, ranks, **whose)
