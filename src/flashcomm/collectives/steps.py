"""The algorithms, on rows: they move payloads and never look inside.

    one_step   encode | all-gather | decode and sum                      one rounding, (R - 1) payloads sent
    two_step   encode | all-to-all | decode, sum, encode | all-gather | decode
                                                                         two roundings, 2 (R - 1) / R payloads sent

A two-step all-reduce is a reduce-scatter followed by an all-gather. The owner of a stripe decodes it from the payload
that it sent, like everybody else, so all ranks end with the same bits.

Shape legend: R ranks, T rows, H columns, S rows of one rank's stripe, P payload bytes of a row.

Source: Flash Communication (arXiv 2412.04964), Algorithm 1; one_step: arXiv 2411.09510.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from flashcomm import kernels
from flashcomm.codecs import Codec
from flashcomm.collectives.state import GroupState, exchange, gather

# A stripe is whole rows; where that leaves some ranks idle, rows are cut at group borders until at least this share of
# the rows of the longest stripe is real on average.
_BALANCE = 0.9


def cut(rows: int, cols: int, codec: Codec, ranks: int) -> tuple[int, int]:
    """[rows, cols] as more and shorter rows, so that few rows spread evenly over ranks and no decoded bit changes.

    >>> from flashcomm.codecs import parse
    >>> cut(1, 4096, parse("int8g128"), ranks=4)
    (4, 1024)
    """
    unit = math.lcm(*(step.segment(cols) for step in codec.steps))
    if rows == 0 or cols == 0 or cols % unit:
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


def one_step(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """Sum of every rank's x[T, H] into out[T, H]. Returns the bytes that this rank sent."""
    rows, cols = x.shape
    width = codec.payload_bytes(cols, x.dtype)
    received = state.buffer("received", x.device, state.ranks, rows, width)
    coming = _expect(received, state)
    mine = kernels.encode(x, codec, out=received[state.rank])
    _gather(received, mine, state, coming)
    kernels.decode_sum(received, codec, cols=cols, dtype=x.dtype, out=out)
    return (state.ranks - 1) * rows * width


def two_step(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """Sum of every rank's x[T, H] into out[T, H]. Returns the bytes that this rank sent."""
    first, second = codec.steps
    rows, cols = cut(x.shape[0], x.shape[1], codec, state.ranks)
    stripes = Stripes(rows, state)
    received = _scatter(x.reshape(rows, cols), first, stripes, state)
    width = second.payload_bytes(cols, x.dtype)
    gathered = state.buffer("gathered", x.device, state.ranks, stripes.length, width)
    mine = stripes.real(state.rank)
    # gloo sends only once the receiver is ready, so be ready before the sums, not after.
    coming = _expect(gathered, state)
    kernels.decode_sum_encode(received[:, :mine], first, second, cols=cols, out=gathered[state.rank, :mine])
    into = out.view(rows, cols)

    def decode(rank: int):
        part = into[stripes.of(rank)]
        kernels.decode(gathered[rank, : part.shape[0]], second, cols=cols, dtype=x.dtype, out=part)

    _gather(gathered, gathered[state.rank], state, coming, decode)
    return (state.ranks - 1) * stripes.length * (received.shape[-1] + width)


def reduce_scatter(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """out[S, H] = sum over ranks of their x[R * S, H] rows that belong to this rank. Returns the bytes sent."""
    stripes = Stripes(x.shape[0], state)
    received = _scatter(x, codec, stripes, state)
    kernels.decode_sum(received, codec, cols=x.shape[1], dtype=x.dtype, out=out)
    return (state.ranks - 1) * stripes.length * received.shape[-1]


def all_gather(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """out[R * T, H] = every rank's x[T, H], each as its payload decodes, our own too. Returns the bytes sent."""
    rows, cols = x.shape
    width = codec.payload_bytes(cols, x.dtype)
    received = state.buffer("received", x.device, state.ranks, rows, width)
    coming = _expect(received, state)
    mine = kernels.encode(x, codec, out=received[state.rank])
    into = out.view(state.ranks, rows, cols)

    def decode(rank: int):
        kernels.decode(received[rank], codec, cols=cols, dtype=x.dtype, out=into[rank])

    _gather(received, mine, state, coming, decode)
    return (state.ranks - 1) * rows * width


def all_to_all(
    x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, out_rows: list[int], in_rows: list[int]
) -> int:
    """Rows of x to the ranks in turn, in_rows[i] to rank i; out_rows[i] from rank i. Returns the bytes sent."""
    cols = x.shape[1]
    width = codec.payload_bytes(cols, x.dtype)
    sent = kernels.encode(x, codec, out=state.buffer("sent", x.device, x.shape[0], width))
    received = state.buffer("received", x.device, out.shape[0], width)
    if state.direct(x.device):
        going, coming = sent.split(in_rows), received.split(out_rows)
        pending = [state.receive(coming[peer], peer) for peer in state.peers() if out_rows[peer]]
        pending += [state.send(going[peer], peer) for peer in state.peers() if in_rows[peer]]
        coming[state.rank].copy_(going[state.rank])
        for work in pending:
            work.wait()
    else:
        dist.all_to_all_single(received, sent, out_rows, in_rows, group=state.group)
    kernels.decode(received, codec, cols=cols, dtype=x.dtype, out=out)
    return (x.shape[0] - in_rows[state.rank]) * width


class Stripes:
    """Rows dealt out to ranks in runs of `length`; the last ranks may have fewer, or none.

    Missing rows travel as whatever the buffer held, and nobody decodes them.
    """

    def __init__(self, rows: int, state: GroupState):
        self.rows, self.length = rows, -(-rows // state.ranks)

    def of(self, rank: int) -> slice:
        """The rows of `rank`."""
        return slice(min(rank * self.length, self.rows), min((rank + 1) * self.length, self.rows))

    def real(self, rank: int) -> int:
        """How many rows `rank` has."""
        return self.of(rank).stop - self.of(rank).start


def _scatter(x: torch.Tensor, codec: Codec, stripes: Stripes, state: GroupState) -> torch.Tensor:
    """Send each rank its stripe of x[T, H]; returns received[R, S, P], what every rank sent to this one."""
    width = codec.payload_bytes(x.shape[1], x.dtype)
    sent = state.buffer("sent", x.device, state.ranks, stripes.length, width)
    received = state.buffer("received", x.device, state.ranks, stripes.length, width)
    direct = state.direct(x.device)
    pending = [state.receive(received[peer], peer) for peer in state.peers()] if direct else []
    for peer in state.peers():
        kernels.encode(x[stripes.of(peer)], codec, out=sent[peer, : stripes.real(peer)])
        if direct:
            pending.append(state.send(sent[peer], peer))
    # Our own stripe last: the others are on their way meanwhile, and it needs no copy.
    mine = received if direct else sent
    kernels.encode(x[stripes.of(state.rank)], codec, out=mine[state.rank, : stripes.real(state.rank)])
    if not direct:
        exchange(received, sent, state.group)
    for work in pending:
        work.wait()
    return received[:, : stripes.real(state.rank)]


def _expect(received: torch.Tensor, state: GroupState) -> "list[tuple[int, dist.Work]]":
    """Start receiving every other rank's part of a gather into received[R, ...]; (rank, work) in order of arrival."""
    if not state.direct(received.device):
        return []
    return [(peer, state.receive(received[peer], peer)) for peer in reversed(state.peers())]


def _gather(
    received: torch.Tensor,
    mine: torch.Tensor,
    state: GroupState,
    coming: "list[tuple[int, dist.Work]]",
    arrived: Callable[[int], None] = lambda rank: None,
):
    """received[R, ...] = every rank's `mine`, which lies in its place already; `arrived(r)` once rank r's is there."""
    if not state.direct(received.device):
        # The source must not overlap the destination.
        gather(received, mine.clone(), state.group)
        for rank in range(state.ranks):
            arrived(rank)
        return
    going = [state.send(mine, peer) for peer in state.peers()]
    arrived(state.rank)
    for peer, work in coming:
        work.wait()
        arrived(peer)
    for work in going:
        work.wait()
