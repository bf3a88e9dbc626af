"""The hierarchical all-reduce: inside of each host, between hosts, inside again.

    reduce-scatter inside | all-reduce between | all-gather inside
        (L - 1) / L M         (H - 1) / H of        (L - 1) / L M
                              2 M / L

A message travels between hosts in pieces; while one does, the next is added up inside of the host, and those that have
arrived are handed round. A rank sends 1 / L of what it would send to other hosts without levels. Sums stay fp32 from
the first level to the last.

Hazard: a rank that waits for those of its host moves no messages, and ranks must not wait for each other in a circle.
So it hands a piece round only once it has that piece from all hosts and its own has left for them: who is behind then
lacks nothing that is kept here, and has sent all that would have to be read here first.

Shape legend: H hosts, L ranks of a host, M payload bytes, T rows, C columns.

Source: FlashCommunication V2 (arXiv 2508.03760), hierarchical all-reduce; fp32 between the levels is our own.
"""

import torch

from flashcomm import kernels
from flashcomm.codecs import Codec, Levels, Pair
from flashcomm.collectives.moving import mover
from flashcomm.collectives.shared import Prepared
from flashcomm.collectives.state import GroupState
from flashcomm.collectives.steps import Gather, Scatter, Stripes, cut


def hierarchical(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, pieces: int = 1) -> int:
    """Sum of every rank's x[T, C] into out[T, C]. Returns the bytes that this rank sent to other hosts."""
    assert isinstance(codec, Levels)
    inside, between = state.levels()
    inside.meet(x.device)
    between.meet(x.device)
    rows, cols = cut(x.shape[0], x.shape[1], codec, inside.ranks * between.ranks * pieces)
    x, into = x.reshape(rows, cols), out.view(rows, cols)
    missing = -rows % inside.ranks
    if missing:
        # All ranks of a host own as many rows; what the last one lacks is nobody's.
        x = torch.cat([x, x.new_zeros(missing, cols)])
    whole = torch.empty_like(x) if missing else into
    sums = torch.empty(len(x) // inside.ranks, cols, dtype=torch.float32, device=x.device)

    def add_inside(part: slice) -> torch.Tensor:
        _move("reduce_scatter", codec.inside.steps[0], inside, x[_times(inside.ranks, part)], sums[part])
        return sums[part]

    def hand_round(part: slice):
        _move("all_gather", codec.inside.steps[1], inside, sums[part], whole[_times(inside.ranks, part)])

    if between.ranks == 2 and not isinstance(codec.between, Pair):
        # Of two ranks each sends all that it has in one step or in two, and one rounds once.
        sent = _one_step(codec.between, between, sums, pieces, add_inside, hand_round)
    else:
        sent = _two_step(codec.between, between, sums, pieces, add_inside, hand_round)
    if missing:
        into.copy_(whole[:rows])
    return sent


def _one_step(codec: Codec, between: GroupState, sums: torch.Tensor, pieces: int, add_inside, hand_round) -> int:
    cols = sums.shape[1]
    width = codec.payload_bytes(cols, sums.dtype)
    gather = Gather([len(sums)] * between.ranks, width, pieces, sums.device, between)
    for piece in gather.pieces:
        gather.send(piece, kernels.encode(add_inside(piece), codec, out=gather.mine(piece)))
    for piece in gather.pieces:
        payloads = gather.wait_all(piece)
        kernels.decode_sum(payloads, codec, cols=cols, dtype=sums.dtype, out=sums[piece])
        gather.wait_gone(piece)
        hand_round(piece)
    return gather.finish()


def _two_step(codec: Codec, between: GroupState, sums: torch.Tensor, pieces: int, add_inside, hand_round) -> int:
    (first, second), cols = codec.steps, sums.shape[1]
    stripes = Stripes(len(sums), between)
    scatter = Scatter(stripes, first.payload_bytes(cols, sums.dtype), pieces, sums.device, between)
    gather = Gather(stripes.sizes, second.payload_bytes(cols, sums.dtype), pieces, sums.device, between)
    scatter.send_all(lambda host, piece: add_inside(stripes.part(host, piece)), first)
    for piece in gather.pieces:
        payload = kernels.decode_sum_encode(scatter.wait_all(piece), first, second, cols=cols, out=gather.mine(piece))
        gather.send(piece, payload)
    for piece in gather.pieces:
        gather.wait_all(piece)
        gather.wait_gone(piece)
        # All ranks of a host are the same rank here, so they come to the same parts in the same order.
        for host in range(between.ranks):
            part = stripes.part(host, piece)
            kernels.decode(gather.of(host, piece), second, cols=cols, dtype=sums.dtype, out=sums[part])
            hand_round(part)
    return scatter.finish() + gather.finish()


def _times(ranks: int, part: slice) -> slice:
    return slice(part.start * ranks, part.stop * ranks)


def _move(name: str, codec: Codec, state: GroupState, x: torch.Tensor, out: torch.Tensor):
    if len(x):
        run = mover(name, codec, x, state, out_dtype=out.dtype)
        if isinstance(run, Prepared):
            state.reserve(run.half_bytes)
        run(x, codec, state, out)
