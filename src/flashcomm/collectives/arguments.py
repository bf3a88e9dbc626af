"""What the collectives may be given: the errors of a wrong argument, before any communication."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flashcomm import codecs, kernels
from flashcomm.codecs import FLOAT_DTYPES, Codec, Levels, Pair, Plain
from flashcomm.collectives.state import GroupState, state_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def entered(x: torch.Tensor, group: "dist.ProcessGroup | DeviceMesh | None") -> GroupState:
    """The state of `group`, once `x` is a tensor that a collective can take."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        raise ValueError(
            f"x must be a dense tensor, not {type(x).__name__ if not isinstance(x, torch.Tensor) else x.layout}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("flashcomm is for inference and would cut the gradient: call it under torch.no_grad()")
    if not x.data_ptr():
        kernels.check_storage(x)
    return state_of(group)


def fitting(codec: "str | Codec", x: torch.Tensor) -> Codec:
    """The parsed codec, if it can encode `x`."""
    codec = codecs.parse(codec)
    if x.dtype not in FLOAT_DTYPES and not isinstance(codec, Plain):
        raise ValueError(
            f"codec {codec} compresses bf16, fp16 and fp32, not {x.dtype}. Use codec='none' for other types"
        )
    return codec


def single_step(codec: Codec, place: int, algorithm: str) -> Codec:
    """Of a codec for the steps of an all-reduce, the one for a collective that is a single step."""
    if isinstance(codec, Levels):
        raise ValueError(f"only all_reduce has levels: of {codec}, give one of {codec.inside} and {codec.between}")
    if algorithm in ("two_step", "hierarchical"):
        raise ValueError(f"only all_reduce can be {algorithm}. Allowed here: auto, one_step, plain")
    return codec.steps[place]


def exchangeable(x: torch.Tensor, codec: Codec, algorithm: str) -> Codec:
    """The codec, if rows of `x` can be exchanged in it."""
    if isinstance(codec, Pair):
        raise ValueError(f"all_to_all sends once, so it takes a single codec, not the pair {codec}")
    if x.dim() < 2:
        raise ValueError(f"all_to_all exchanges rows: x needs at least 2 dimensions, not {list(x.shape)}")
    return single_step(codec, 0, algorithm)


def part_shape(shape: torch.Size, ranks: int) -> tuple[int, ...]:
    """The shape of one rank's part of dimension 0."""
    if not shape or shape[0] % ranks:
        raise ValueError(f"reduce_scatter splits dimension 0 over {ranks} ranks, which {list(shape)} does not allow")
    return shape[0] // ranks, *shape[1:]


def row_shape(shape: torch.Size) -> tuple[int, int]:
    """[..., H] as [T, H]."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def split_sizes(name: str, sizes: Sequence[int] | None, rows: int | None, ranks: int) -> list[int]:
    """The rows for each rank: `sizes`, or equal parts of `rows`."""
    if sizes is None:
        assert rows is not None
        if rows % ranks:
            raise ValueError(f"{rows} rows do not split evenly over {ranks} ranks: give {name}")
        return [rows // ranks] * ranks
    sizes = list(sizes)
    if len(sizes) != ranks or min(sizes) < 0 or (rows is not None and sum(sizes) != rows):
        total = "" if rows is None else f" that add up to {rows}"
        raise ValueError(f"{name} must be {ranks} non-negative numbers of rows{total}, not {sizes}")
    return sizes
