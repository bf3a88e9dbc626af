"""The hierarchical all-reduce: inside of each host, between hosts, inside again.

    reduce-scatter inside | all-reduce between | all-gather inside
        (L - 1) / L M         (H - 1) / H of        (L - 1) / L M
                              2 M / L

A rank sends 1 / L of what it would send to other hosts without levels. Sums stay fp32 from the first level to the last.

Shape legend: H hosts, L ranks of a host, M payload bytes, T rows, C columns.

Source: FlashCommunication V2 (arXiv 2508.03760), hierarchical all-reduce; fp32 between the levels is our own.
"""

import torch

from flashcomm.codecs import Codec, Levels, Pair
from flashcomm.collectives import steps
from flashcomm.collectives.moving import mover
from flashcomm.collectives.shared import Prepared
from flashcomm.collectives.state import GroupState


def hierarchical(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor, pieces: int = 1) -> int:
    """Sum of every rank's x[T, C] into out[T, C]. Returns the bytes that this rank sent to other hosts."""
    assert isinstance(codec, Levels)
    inside, between = state.levels()
    rows, cols = steps.cut(x.shape[0], x.shape[1], codec, inside.ranks * between.ranks)
    x, into = x.reshape(rows, cols), out.view(rows, cols)
    missing = -rows % inside.ranks
    if missing:
        # Stripes are of one length; what the last one lacks is nobody's.
        x = torch.cat([x, x.new_zeros(missing, cols)])
    stripe = torch.empty(len(x) // inside.ranks, cols, dtype=torch.float32, device=x.device)
    _move("reduce_scatter", codec.inside.steps[0], inside, x, stripe)
    # Of two ranks each sends all that it has either way, and one_step rounds once.
    name = "one_step" if between.ranks == 2 and not isinstance(codec.between, Pair) else "two_step"
    sent = _move(name, codec.between, between, stripe, stripe, pieces)
    whole = into if not missing else torch.empty_like(x)
    _move("all_gather", codec.inside.steps[1], inside, stripe, whole)
    if missing:
        into.copy_(whole[:rows])
    return sent


def _move(name: str, codec: Codec, state: GroupState, x: torch.Tensor, out: torch.Tensor, pieces: int = 1) -> int:
    run = mover(name, codec, x, state, pieces, out_dtype=out.dtype)
    if isinstance(run, Prepared):
        state.reserve(run.half_bytes)
    return run(x, codec, state, out)
