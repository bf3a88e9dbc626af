"""The algorithms, on rows: they move payloads and never look inside.

    one_step   encode | all-gather | decode and sum                      one rounding, (R - 1) payloads sent
    two_step   encode | all-to-all | decode, sum, encode | all-gather | decode
                                                                         two roundings, 2 (R - 1) / R payloads sent

A two-step all-reduce is a reduce-scatter followed by an all-gather. The owner of a stripe decodes it from the payload
that it sent, like every other rank, so all ranks end with the same bits.

A message travels in `pieces`: while one piece is on its way the next is encoded, and those that have arrived are added
up and decoded, so that the link never idles. The bits do not depend on the pieces, nor on the transport.

Shape legend: R ranks, T rows, H columns, S rows of one rank's stripe, P payload bytes of a row.

Source: Flash Communication (arXiv 2412.04964), Algorithm 1; one_step: arXiv 2411.09510.
"""

import itertools
from collections.abc import Callable, Sequence

import torch

from flashcomm import kernels
from flashcomm.codecs import Codec
from flashcomm.transports.base import Gather, Messages, Scatter, cut_into

# A stripe is whole rows; where that leaves some ranks idle, rows are cut at group borders until at least this share of
# the rows of the longest stripe is real on average.
_BALANCE = 0.9


def one_step(x: torch.Tensor, out: torch.Tensor, codec: Codec, messages: Messages, pieces: int = 1) -> int:
    """Sum every rank's x[T, H] into out[T, H]; return the bytes that this rank sent."""
    rows, cols = cut(x.shape[0], x.shape[1], codec, pieces, x.device.type)
    x, into = x.reshape(rows, cols), out.view(rows, cols)
    width = codec.payload_bytes(cols, x.dtype)
    gather = messages.gather([rows] * messages.ranks.world_size, width, pieces, x.device, codec.varies)
    for piece in gather.pieces:
        kernels.encode(x[piece], codec, out=gather.place(piece))
        gather.send(piece)
    for piece in gather.pieces:
        kernels.decode_sum(gather.wait(piece), codec, cols=cols, dtype=out.dtype, out=into[piece])
    return gather.finish()


def two_step(x: torch.Tensor, out: torch.Tensor, codec: Codec, messages: Messages, pieces: int = 1) -> int:
    """Sum every rank's x[T, H] into out[T, H]; return the bytes that this rank sent."""
    first, second = codec.formats
    rows, cols = cut(x.shape[0], x.shape[1], codec, messages.ranks.world_size * pieces, x.device.type)
    x, into = x.reshape(rows, cols), out.view(rows, cols)
    stripes = _deal(rows, messages, pieces)
    # A message may have to wait until its receiver is ready, so be ready for all before anything is encoded.
    width, sum_width = first.payload_bytes(cols, x.dtype), second.payload_bytes(cols, x.dtype)
    scatter = messages.scatter(stripes.sizes, width, pieces, x.device, first.varies)
    gather = messages.gather(stripes.sizes, sum_width, pieces, x.device, second.varies)
    _scatter_rows(x, stripes, scatter, first, messages)
    for piece in gather.pieces:
        kernels.decode_sum_encode(scatter.wait(piece), first, second, cols=cols, out=gather.place(piece))
        gather.send(piece)
    _decode_all(gather, stripes, second, into)
    return scatter.finish() + gather.finish()


def reduce_scatter(
    x: torch.Tensor,
    out: torch.Tensor,
    codec: Codec,
    messages: Messages,
    pieces: int = 1,
    sizes: Sequence[int] | None = None,
) -> int:
    """Sum every rank's x[T, H] rows of this rank's stripe into out[S, H]; return the bytes sent.

    Stripes are equal, or ``sizes[r]`` rows for rank r.
    """
    cols, stripes = x.shape[1], _deal(x.shape[0], messages, pieces, fixed=True, sizes=sizes)
    scatter = messages.scatter(stripes.sizes, codec.payload_bytes(cols, x.dtype), pieces, x.device, codec.varies)
    _scatter_rows(x, stripes, scatter, codec, messages)
    for piece in scatter.pieces:
        kernels.decode_sum(scatter.wait(piece), codec, cols=cols, dtype=out.dtype, out=out[piece])
    return scatter.finish()


def all_gather(
    x: torch.Tensor,
    out: torch.Tensor,
    codec: Codec,
    messages: Messages,
    pieces: int = 1,
    sizes: Sequence[int] | None = None,
) -> int:
    """Write every rank's x[S, H], this one's too, to out[T, H] as its payload decodes; return the bytes sent.

    S is the same on all ranks, or ``sizes[r]`` on rank r.
    """
    rows, cols = x.shape
    total = sum(sizes) if sizes else messages.ranks.world_size * rows
    stripes = _deal(total, messages, pieces, fixed=True, sizes=sizes)
    width = codec.payload_bytes(cols, x.dtype)
    gather = messages.gather(stripes.sizes, width, pieces, x.device, codec.varies)
    for piece in gather.pieces:
        kernels.encode(x[piece], codec, out=gather.place(piece))
        gather.send(piece)
    _decode_all(gather, stripes, codec, out)
    return gather.finish()


def all_to_all(
    x: torch.Tensor,
    out: torch.Tensor,
    codec: Codec,
    messages: Messages,
    in_rows: Sequence[int],
    out_rows: Sequence[int],
) -> int:
    """Send in_rows[r] rows of x[T, H] to rank r, and receive out_rows[r] from it into out; return the bytes sent."""
    cols = x.shape[1]
    width = codec.payload_bytes(cols, x.dtype)
    exchange = messages.exchange(width, list(in_rows), list(out_rows), x.device, codec.varies)
    kernels.encode(x, codec, out=exchange.sent)
    kernels.decode(exchange.run(), codec, cols=cols, dtype=out.dtype, out=out)
    return exchange.finish()


def broadcast(x: torch.Tensor, out: torch.Tensor, codec: Codec, messages: Messages, root: int, pieces: int = 1) -> int:
    """Write rank `root`'s x[T, H] to every rank's out[T, H] as its payload decodes; return the bytes sent.

    Of other ranks only the shape of x counts. A rank whose `out` is empty decodes nothing, as one that only sends.
    """
    rows, cols = x.shape
    rank, ranks = messages.ranks.rank, messages.ranks.world_size
    sizes = [rows if r == root else 0 for r in range(ranks)]
    gather = messages.gather(sizes, codec.payload_bytes(cols, x.dtype), pieces, x.device, codec.varies)
    for piece in gather.pieces:
        if rank == root:
            kernels.encode(x[piece], codec, out=gather.place(piece))
        gather.send(piece)
    if out.numel():
        for sender, piece, payload in gather.arrivals():
            if sender == root:
                kernels.decode(payload, codec, cols=cols, dtype=out.dtype, out=out[piece])
    return gather.finish()


ALGORITHMS = {"one_step": one_step, "two_step": two_step, "reduce_scatter": reduce_scatter, "all_gather": all_gather}
"""Algorithms over messages of one level, by the name of their task."""


def _scatter_rows(x: torch.Tensor, stripes: "Stripes", scatter: Scatter, codec: Codec, messages: Messages):
    """Encode and send x[T, H], each rank its stripe."""
    if not isinstance(stripes, Dealt):
        encode_stripes(scatter, lambda rank, piece: x[stripes.part(rank, piece)], codec, messages)
        return
    for piece in scatter.pieces:
        rows, mine = x[stripes.whole(piece)], stripes.part(messages.ranks.rank, piece)
        kernels.encode(rows, codec, out=scatter.whole(piece)[: len(rows)])
        scatter.send(messages.ranks.rank, piece, mine.stop - mine.start)


def _decode_all(gather: Gather, stripes: "Stripes", codec: Codec, out: torch.Tensor):
    """Decode every rank's stripe into out[T, H]."""
    cols = out.shape[1]
    if isinstance(stripes, Dealt):
        for piece in gather.pieces:
            rows = out[stripes.whole(piece)]
            kernels.decode(gather.whole(piece)[: len(rows)], codec, cols=cols, dtype=out.dtype, out=rows)
        return
    for rank, piece, payload in gather.arrivals():
        kernels.decode(payload, codec, cols=cols, dtype=out.dtype, out=out[stripes.part(rank, piece)])


def _deal(
    rows: int, messages: Messages, pieces: int, fixed: bool = False, sizes: Sequence[int] | None = None
) -> "Stripes":
    """Deal out rows to ranks, evenly or in `sizes`; `fixed` if it matters which rank gets which."""
    ranks = messages.ranks.world_size
    even = Stripes.even(rows, ranks)
    if sizes and list(sizes) != even.sizes:
        return Stripes(sizes)
    return Dealt(rows, ranks, pieces) if messages.whole_pieces and (pieces == 1 or not fixed) else even


def encode_stripes(scatter: Scatter, rows_of: Callable[[int, slice], torch.Tensor], codec: Codec, messages: Messages):
    """Encode and send the rows that `rows_of` gives for each rank and piece of its stripe.

    This rank's own stripe comes last: the others are on their way meanwhile.
    """
    for piece in scatter.pieces:
        for rank in (*messages.ranks.peers, messages.ranks.rank):
            rows = rows_of(rank, piece)
            kernels.encode(rows, codec, out=scatter.place(rank, piece, len(rows)))
            scatter.send(rank, piece, len(rows))


def cut(rows: int, cols: int, codec: Codec, ranks: int, device: str = "cpu") -> tuple[int, int]:
    """[rows, cols] as more and shorter rows, so that few rows spread evenly over ranks and no decoded bit changes.

    Kernels of GPUs are compiled for a length of rows, which takes a second or so, and a server's prompts have all
    lengths. So on `device` other than the CPU rows stay as they are.

    >>> from flashcomm.codecs import parse
    >>> cut(1, 4096, parse("int8g128"), ranks=4), cut(5, 4096, parse("int8g128"), ranks=4)
    ((4, 1024), (20, 1024))
    >>> cut(5, 4096, parse("int8g128"), ranks=4, device="cuda")
    (5, 4096)
    """
    unit = codec.unit(cols)
    if rows == 0 or cols == 0 or cols % unit or device != "cpu":
        return rows, cols
    best = (0.0, 1)
    for pieces in range(1, min(cols // unit, ranks) + 1):
        if cols // unit % pieces == 0:
            stripe = -(-rows * pieces // ranks)
            balance = rows * pieces / (stripe * ranks)
            if balance > best[0]:
                best = (balance, pieces)
            if balance >= _BALANCE:
                break
    return rows * best[1], cols // best[1]


class Stripes:
    """Rows dealt out to ranks in runs.

    >>> Stripes.even(5, 3).sizes, Stripes([1, 3]).part(1, slice(2, 4))
    ([2, 2, 1], slice(3, 4, None))
    """

    def __init__(self, sizes: Sequence[int]):
        edges = list(itertools.accumulate(sizes, initial=0))
        self._slices = [slice(*pair) for pair in itertools.pairwise(edges)]
        self.sizes = list(sizes)
        """Rows of each rank."""

    @classmethod
    def even(cls, rows: int, ranks: int) -> "Stripes":
        """Runs of equal length; the last ranks may have fewer rows, or none."""
        length = -(-rows // ranks)
        edges = [min(rank * length, rows) for rank in range(ranks + 1)]
        return cls([stop - start for start, stop in itertools.pairwise(edges)])

    def part(self, rank: int, piece: slice) -> slice:
        """The rows of `rank` in a piece of its stripe; fewer, or none, where the stripe is shorter."""
        stripe = self._slices[rank]
        return slice(min(stripe.start + piece.start, stripe.stop), min(stripe.start + piece.stop, stripe.stop))


class Dealt(Stripes):
    """Rows dealt out piece by piece, so that those of all ranks in a piece lie together: a kernel for each piece.

    >>> dealt = Dealt(7, ranks=2, pieces=2)
    >>> dealt.sizes, dealt.part(1, slice(0, 2)), dealt.part(1, slice(2, 4)), dealt.whole(slice(2, 4))
    ([4, 3], slice(2, 4, None), slice(6, 7, None), slice(4, 7, None))
    """

    def __init__(self, rows: int, ranks: int, pieces: int):
        self._rows, self._ranks = rows, ranks
        cuts = cut_into(-(-rows // ranks), pieces)
        parts = [[self.part(rank, piece) for piece in cuts] for rank in range(ranks)]
        self.sizes = [sum(part.stop - part.start for part in its) for its in parts]

    def part(self, rank: int, piece: slice) -> slice:
        """See `Stripes`."""
        length = piece.stop - piece.start
        start = min(self._ranks * piece.start + rank * length, self._rows)
        return slice(start, min(start + length, self._rows))

    def whole(self, piece: slice) -> slice:
        """The rows of all ranks in a piece."""
        return slice(self._ranks * piece.start, min(self._ranks * piece.stop, self._rows))
