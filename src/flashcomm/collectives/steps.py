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

import torch

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
    sent = kernels.encode(x, codec, out=state.buffer("sent", x.device, rows, width))
    received = state.buffer("received", x.device, state.ranks, rows, width)
    gather(received, sent, state.group)
    kernels.decode_sum(received, codec, cols=cols, dtype=x.dtype, out=out)
    return (state.ranks - 1) * rows * width


def two_step(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """Sum of every rank's x[T, H] into out[T, H]. Returns the bytes that this rank sent."""
    first, second = codec.steps
    rows, cols = cut(x.shape[0], x.shape[1], codec, state.ranks)
    width = second.payload_bytes(cols, x.dtype)
    received, stripe, mine = _scatter(x.reshape(rows, cols), first, state)
    reduced = state.buffer("reduced", x.device, stripe, width)
    kernels.decode_sum_encode(received[:, :mine], first, second, cols=cols, out=reduced[:mine])
    gathered = state.buffer("gathered", x.device, state.ranks * stripe, width)
    gather(gathered, reduced, state.group)
    kernels.decode(gathered[:rows], second, cols=cols, dtype=x.dtype, out=out.view(rows, cols))
    return (state.ranks - 1) * stripe * (received.shape[-1] + width)


def reduce_scatter(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """out[S, H] = sum over ranks of their x[R * S, H] rows that belong to this rank. Returns the bytes sent."""
    received, stripe, mine = _scatter(x, codec, state)
    kernels.decode_sum(received[:, :mine], codec, cols=x.shape[1], dtype=x.dtype, out=out)
    return (state.ranks - 1) * stripe * received.shape[-1]


def all_gather(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """out[R * T, H] = every rank's x[T, H], each as its payload decodes, our own too. Returns the bytes sent."""
    rows, cols = x.shape
    width = codec.payload_bytes(cols, x.dtype)
    sent = kernels.encode(x, codec, out=state.buffer("sent", x.device, rows, width))
    received = state.buffer("received", x.device, state.ranks * rows, width)
    gather(received, sent, state.group)
    kernels.decode(received, codec, cols=cols, dtype=x.dtype, out=out)
    return (state.ranks - 1) * rows * width


def all_to_all(
    x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, out_rows: list[int], in_rows: list[int]
) -> int:
    """Rows of x to the ranks in turn, in_rows[i] to rank i; out_rows[i] from rank i. Returns the bytes sent."""
    cols = x.shape[1]
    width = codec.payload_bytes(cols, x.dtype)
    sent = kernels.encode(x, codec, out=state.buffer("sent", x.device, x.shape[0], width))
    received = state.buffer("received", x.device, out.shape[0], width)
    torch.distributed.all_to_all_single(received, sent, out_rows, in_rows, group=state.group)
    kernels.decode(received, codec, cols=cols, dtype=x.dtype, out=out)
    return (x.shape[0] - in_rows[state.rank]) * width


def _scatter(x: torch.Tensor, codec: Codec, state: GroupState) -> tuple[torch.Tensor, int, int]:
    """Send each rank its stripe of x[T, H]: (received[R, S, P], S, how many of the S rows are real on this rank)."""
    rows, cols = x.shape
    stripe = -(-rows // state.ranks)
    width = codec.payload_bytes(cols, x.dtype)
    # The last stripes may be short; their missing rows travel as whatever the buffer held and nobody decodes them.
    sent = state.buffer("sent", x.device, state.ranks * stripe, width)
    kernels.encode(x, codec, out=sent[:rows])
    received = state.buffer("received", x.device, state.ranks, stripe, width)
    exchange(received, sent, state.group)
    return received, stripe, min(max(rows - state.rank * stripe, 0), stripe)
