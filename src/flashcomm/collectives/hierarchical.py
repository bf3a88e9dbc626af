"""The hierarchical all-reduce: inside of each host, between hosts, inside again.

    reduce-scatter inside | all-reduce between | all-gather inside
        (L - 1) / L M         (H - 1) / H of        (L - 1) / L M
                              2 M / L

A message travels between hosts in pieces. While one piece travels, the next is added up inside of the host, and those
that have arrived are handed round. A rank sends 1 / L of the bytes that it would send to other hosts without levels.
Sums stay fp32 from the first level to the last.

Hazard: while a rank waits for the ranks of its host it moves no messages, and ranks must not wait for each other in a
circle. So a rank hands a piece round only after it has that piece from all hosts and its own piece has left for them.
Then a rank that is behind lacks nothing that is kept here, and has sent all that would have to be read here first.

Shape legend: H hosts, L ranks of a host, M payload bytes, T rows, C columns.

Source: FlashCommunication V2 (arXiv 2508.03760), hierarchical all-reduce; fp32 between the levels is our own.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from flashcomm import kernels
from flashcomm.codecs import Codec, Levels, Pair
from flashcomm.collectives.algorithms import Stripes, cut, encode_stripes
from flashcomm.transports.base import Messages, Ranks, Run, Task

AddInside = Callable[[slice], torch.Tensor]
HandRound = Callable[[slice], None]


def hierarchical(
    x: torch.Tensor,
    out: torch.Tensor,
    codec: Codec,
    inside: Ranks,
    prepare: Callable[[Task], Run],
    between: Messages,
    pieces: int = 1,
) -> int:
    """Sum every rank's x[T, C] into out[T, C]; return the bytes that this rank sent to other hosts.

    Args:
        x: rows, of any strides.
        out: contiguous rows.
        codec: a `Levels`.
        inside: the ranks of this rank's host.
        prepare: makes a collective over `inside` ready.
        between: messages to the ranks with this one's place on other hosts.
        pieces: in which a message travels between hosts.
    """
    assert isinstance(codec, Levels)
    ranks, hosts = inside.world_size, between.ranks.world_size
    rows, cols = cut(x.shape[0], x.shape[1], codec, ranks * hosts * pieces, x.device.type)
    x, into = x.reshape(rows, cols), out.view(rows, cols)
    missing = -rows % ranks
    if missing:
        # All ranks of a host own the same number of rows; zeros stand for those that the last one lacks.
        x = torch.cat([x, x.new_zeros(missing, cols)])
    whole = torch.empty_like(x) if missing else into
    sums = torch.empty(len(x) // ranks, cols, dtype=torch.float32, device=x.device)

    reduce_inside, gather_inside = inside_tasks(codec, ranks, cols, x.dtype, x.device)

    def move(task: Task, rows: torch.Tensor, out: torch.Tensor):
        if len(rows):
            prepare(replace(task, rows=len(rows)))(rows, out)

    def add_inside(part: slice) -> torch.Tensor:
        move(reduce_inside, x[_times(ranks, part)], sums[part])
        return sums[part]

    def hand_round(part: slice):
        move(gather_inside, sums[part], whole[_times(ranks, part)])

    if hosts == 2 and not isinstance(codec.between, Pair):
        # Two ranks send the same bytes in one step and in two, and one step rounds once.
        sent = _one_step(codec.between, between, sums, pieces, add_inside, hand_round)
    else:
        sent = _two_step(codec.between, between, sums, pieces, add_inside, hand_round)
    if missing:
        into.copy_(whole[:rows])
    return sent


def inside_tasks(codec: Levels, ranks: int, cols: int, dtype: torch.dtype, device: torch.device) -> tuple[Task, Task]:
    """The reduce-scatter and the all-gather inside of a host, for its smallest piece."""
    first, second = codec.inside.formats
    either = partial(Task, cols=cols, device=device)
    return (
        either(name="reduce_scatter", codec=first, rows=ranks, dtype=dtype, out_dtype=torch.float32),
        either(name="all_gather", codec=second, rows=1, dtype=torch.float32, out_dtype=dtype),
    )


def _one_step(
    codec: Codec, between: Messages, sums: torch.Tensor, pieces: int, add_inside: AddInside, hand_round: HandRound
) -> int:
    cols = sums.shape[1]
    width = codec.payload_bytes(cols, sums.dtype)
    gather = between.gather([len(sums)] * between.ranks.world_size, width, pieces, sums.device, codec.varies)
    for piece in gather.pieces:
        kernels.encode(add_inside(piece), codec, out=gather.place(piece))
        gather.send(piece)
    for piece in gather.pieces:
        kernels.decode_sum(gather.wait(piece), codec, cols=cols, dtype=sums.dtype, out=sums[piece])
        gather.wait_gone(piece)
        hand_round(piece)
    return gather.finish()


def _two_step(
    codec: Codec, between: Messages, sums: torch.Tensor, pieces: int, add_inside: AddInside, hand_round: HandRound
) -> int:
    (first, second), cols = codec.formats, sums.shape[1]
    stripes = Stripes.even(len(sums), between.ranks.world_size)
    width, sum_width = first.payload_bytes(cols, sums.dtype), second.payload_bytes(cols, sums.dtype)
    scatter = between.scatter(stripes.sizes, width, pieces, sums.device, first.varies)
    gather = between.gather(stripes.sizes, sum_width, pieces, sums.device, second.varies)
    encode_stripes(scatter, lambda host, piece: add_inside(stripes.part(host, piece)), first, between)
    for piece in gather.pieces:
        kernels.decode_sum_encode(scatter.wait(piece), first, second, cols=cols, out=gather.place(piece))
        gather.send(piece)
    own = between.ranks.rank
    for piece in gather.pieces:
        payloads = gather.wait(piece)
        gather.wait_gone(piece)
        # All ranks of a host have the same place between hosts, so they hand round the same parts in the same order.
        for host in range(between.ranks.world_size):
            part = stripes.part(host, piece)
            payload = (gather.place(piece) if host == own else payloads[host])[: part.stop - part.start]
            kernels.decode(payload, second, cols=cols, dtype=sums.dtype, out=sums[part])
            hand_round(part)
    return scatter.finish() + gather.finish()


def _times(ranks: int, part: slice) -> slice:
    return slice(part.start * ranks, part.stop * ranks)
