"""What moves the payloads of a call: memory that the ranks share or write to where all can, messages otherwise."""

from collections.abc import Callable
from functools import partial

import torch

from flashcomm import kernels
from flashcomm.codecs import Codec
from flashcomm.collectives import shared, steps, symmetric
from flashcomm.collectives.state import GroupState


def mover(
    name: str,
    codec: Codec,
    x: torch.Tensor,
    state: GroupState,
    pieces: int = 1,
    *,
    out_dtype: torch.dtype | None = None,
) -> Callable[..., int]:
    """The function ``name`` of `steps` for rows x[T, H], or its counterpart in `shared`; all ranks get the same.

    Args:
        name: one_step, two_step, reduce_scatter or all_gather.
        codec: what the payloads are encoded with.
        x: rows; only their shape, dtype and device matter.
        state: of the group.
        pieces: of messages.
        out_dtype: of the result, if not that of x.
    """
    key = (name, codec, x.shape, x.dtype, x.device.type, pieces, out_dtype)
    if key not in state.calls:
        state.remember(key, _mover(name, codec, x, state, pieces, out_dtype or x.dtype))
    return state.calls[key]


def _mover(
    name: str, codec: Codec, x: torch.Tensor, state: GroupState, pieces: int, out_dtype: torch.dtype
) -> Callable[..., int]:
    if state.shared and x.numel() and x.device.type == "cpu" and not kernels.any_missing(codec, "cpu"):
        return getattr(shared, name)(codec, *x.shape, x.dtype, out_dtype, state)
    in_one_launch = symmetric.mover(name, codec, x, state) if out_dtype == x.dtype else None
    if in_one_launch:
        return in_one_launch
    return partial(getattr(steps, name), pieces=pieces)
