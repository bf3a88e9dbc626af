"""Check the arguments of the collectives, before any communication."""

import math
from collections.abc import Sequence

import torch

from flashcomm import codecs, kernels
from flashcomm.codecs import FLOAT_DTYPES, Codec, Levels, Pair, Plain


def check_tensor(x: torch.Tensor):
    """Refuse what no collective can take.

    Raises:
        ValueError: not a dense tensor, or one that requires a gradient.
    """
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        raise ValueError(
            f"x must be a dense tensor, not {type(x).__name__ if not isinstance(x, torch.Tensor) else x.layout}"
        )
    # Not a call: this is in every collective.
    if x.requires_grad:
        check_grad(x)
    if not x.data_ptr():
        kernels.check_storage(x)


def check_grad(x: torch.Tensor):
    """Refuse a tensor that requires a gradient where gradients are recorded."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("flashcomm is for inference and would cut the gradient: call it under torch.no_grad()")


def fitting(codec: "str | Codec", x: torch.Tensor) -> Codec:
    """Parse the codec, and check that it can encode `x`."""
    codec = codecs.parse(codec)
    if x.dtype not in FLOAT_DTYPES and not isinstance(codec, Plain):
        raise ValueError(
            f"codec {codec} compresses bf16, fp16 and fp32, not {x.dtype}. Use codec='none' for other types"
        )
    return codec


def single_step(codec: Codec, place: int, algorithm: str) -> Codec:
    """The format of a collective that sends once: the first or the second of a pair, by its `place`."""
    if isinstance(codec, Levels):
        raise ValueError(f"only all_reduce has levels: of {codec}, give one of {codec.inside} and {codec.between}")
    if algorithm in ("two_step", "hierarchical"):
        raise ValueError(f"only all_reduce can be {algorithm}. Allowed here: auto, one_step, plain")
    return codec.formats[place]


def exchangeable(x: torch.Tensor, codec: Codec, algorithm: str) -> Codec:
    """Check that rows of `x` can be exchanged in the codec, and return it."""
    if isinstance(codec, Pair):
        raise ValueError(f"all_to_all sends once, so it takes a single codec, not the pair {codec}")
    if x.dim() < 2:
        raise ValueError(f"all_to_all exchanges rows: x needs at least 2 dimensions, not {list(x.shape)}")
    return single_step(codec, 0, algorithm)


def part_shape(shape: torch.Size, ranks: int) -> tuple[int, ...]:
    """Shape of one rank's part of dimension 0."""
    if not shape or shape[0] % ranks:
        raise ValueError(f"reduce_scatter splits dimension 0 over {ranks} ranks, which {list(shape)} does not allow")
    return shape[0] // ranks, *shape[1:]


def gathered_shape(shape: torch.Size, ranks: int) -> tuple[int, ...]:
    """Shape of all ranks' parts, concatenated along dimension 0."""
    return (ranks * shape[0], *shape[1:]) if shape else (ranks,)


def row_shape(shape: torch.Size) -> tuple[int, int]:
    """[..., H] as [T, H]."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def all_to_all_rows(
    x: torch.Tensor, in_sizes: Sequence[int] | None, out_sizes: Sequence[int] | None, rank: int, ranks: int
) -> tuple[list[int], list[int]]:
    """Entries of dimension 0 to each rank and from each rank.

    Raises:
        ValueError: sizes that do not fit `x`, the number of ranks, or each other.
    """
    to = split_sizes("input_split_sizes", in_sizes, x.shape[0], ranks)
    come = split_sizes("output_split_sizes", out_sizes, None if out_sizes else x.shape[0], ranks)
    if to[rank] != come[rank]:
        raise ValueError(
            f"rank {rank} keeps {to[rank]} rows by input_split_sizes and {come[rank]} by output_split_sizes: give the "
            "same number"
        )
    return to, come


def split_sizes(name: str, sizes: Sequence[int] | None, rows: int | None, ranks: int) -> list[int]:
    """Rows for each rank: `sizes`, or equal parts of `rows`."""
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
