"""Check the arguments of the collectives, before any communication."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from flashcomm import codecs, kernels, planner
from flashcomm.codecs import FLOAT_DTYPES, Codec, Levels, Pair, Plain


def check_tensor(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Refuse what no collective can take, and return `x` so that its memory holds its values.

    Raises:
        ValueError: `x` or `out` is not a dense tensor, `x` requires a gradient, or the result cannot be written to the
            memory of `out`.
    """
    # This is in every collective, so it asks no more than it must: a nested `x` is found where its shape is needed.
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        raise not_dense(x, "x")
    if out is not None:
        try:
            usual = out.is_contiguous() and not out.is_neg() and not out.is_nested
        except (AttributeError, RuntimeError):
            usual = False
        if not usual:
            check_writable(out)
    if x.requires_grad:
        check_grad(x)
    if x.is_neg():
        # A view whose values are not those in memory.
        x = x.resolve_neg()
    if not x.data_ptr():
        kernels.check_storage(x)
    return x


def not_dense(x: object, name: str) -> ValueError:
    """Explain which kind of tensor `x` is, or that it is none; `name` is the argument's."""
    given = ("a nested one" if x.is_nested else x.layout) if isinstance(x, torch.Tensor) else type(x).__name__
    return ValueError(f"{name} must be a dense tensor, not {given}")


def check_writable(out: torch.Tensor):
    """Refuse a tensor into whose memory nothing can be written as it is.

    Raises:
        ValueError: not a dense tensor, a pending negation or conjugation, or elements that share memory.
    """
    if not isinstance(out, torch.Tensor) or out.layout is not torch.strided or out.is_nested:
        raise not_dense(out, "out")
    if out.is_neg() or out.is_conj():
        pending = "negation" if out.is_neg() else "conjugation"
        raise ValueError(f"out is a view with a pending {pending}: give a tensor whose memory holds its values")
    if not out.is_contiguous() and _overlaps(out):
        raise ValueError(
            f"out must have memory for each of its elements, but some of {list(out.shape)} with strides "
            f"{list(out.stride())} share theirs: give a tensor that is not expanded"
        )


def _overlaps(x: torch.Tensor) -> bool:
    """Whether two elements lie at one address."""
    if not x.numel():
        return False
    steps = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    reaches = itertools.accumulate((stride * (size - 1) for stride, size in steps), initial=0)
    # The usual case: a step of each dimension leads beyond all that shorter steps reach.
    if all(stride > reach for (stride, _), reach in zip(steps, reaches, strict=False)):
        return False
    if steps[0][0] == 0:
        return True
    places = torch.zeros((), dtype=torch.long, device="cpu")
    for stride, size in steps:
        places = places[..., None] + stride * torch.arange(size, dtype=torch.long, device="cpu")
    return len(places.unique()) < x.numel()


CUTS_THE_GRADIENT = (
    "flashcomm is for inference and would cut the gradient: call it under torch.no_grad(), or take the verbs of "
    "flashcomm.training, which gradients pass through"
)


def check_grad(x: torch.Tensor):
    """Refuse a tensor that requires a gradient where gradients are recorded."""
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(CUTS_THE_GRADIENT)


def fitting(codec: "str | Codec", x: torch.Tensor) -> Codec:
    """Parse the codec, and check that it can encode `x`."""
    codec = codecs.parse(codec)
    if x.dtype not in FLOAT_DTYPES and not isinstance(codec, Plain):
        also = ", or pass torch.view_as_real(x).flatten(-2)" if x.is_complex() else ""
        raise ValueError(
            f"codec {codec} compresses bf16, fp16 and fp32, not {x.dtype}. Use codec='none' for other types{also}"
        )
    return codec


def declined(plan: planner.Plan, asked: Codec, facts: planner.Facts, exact: str) -> str | None:
    """The codec that was asked for, if `auto` sends values uncompressed instead; None if `auto` does as asked.

    Whoever asks for `exact`, a cast that holds the values, is not declined.
    """
    if not plan.declined or planner.on_level(asked, facts) == codecs.parse(exact):
        return None
    return str(asked)


def single_step(codec: Codec, place: int, algorithm: str) -> Codec:
    """The format of a collective that sends once: the first or the second of a pair, by its `place`."""
    if isinstance(codec, Levels):
        raise ValueError(f"only all_reduce has levels: of {codec}, give one of {codec.inside} and {codec.between}")
    if algorithm in ("two_step", "hierarchical"):
        raise ValueError(f"only all_reduce can be {algorithm}. Allowed here: auto, one_step, plain")
    return codec.formats[place]


def exchangeable(x: torch.Tensor, codec: Codec, algorithm: str) -> Codec:
    """Check that rows of `x` can be exchanged in the codec, and return it."""
    if x.dim() < 2:
        raise ValueError(f"all_to_all exchanges rows: x needs at least 2 dimensions, not {list(x.shape)}")
    return sent_once(codec, "all_to_all", algorithm)


def sent_once(codec: Codec, verb: str, algorithm: str = "auto") -> Codec:
    """Check that a codec is one format, for a verb that sends once, and return it."""
    if isinstance(codec, Pair):
        raise ValueError(f"{verb} sends once, so it takes a single codec, not the pair {codec}")
    return single_step(codec, 0, algorithm)


def group_rank(group: dist.ProcessGroup, role: str, rank: int | None, in_group: int | None) -> int:
    """A rank of a group, from a global rank or the rank in the group, as torch takes them.

    Args:
        group: the process group.
        role: ``dst`` or ``src``, for errors.
        rank: global rank.
        in_group: rank in the group.

    Raises:
        ValueError: none of them, both of them, or a rank outside of the group.
    """
    if (rank is None) == (in_group is None):
        given = "both" if rank is not None else "neither"
        unsupported = "; receiving from any rank is not supported, because both ends compare what they do"
        raise ValueError(
            f"give {role}, a global rank, or group_{role}, a rank of the group, not {given}"
            + (unsupported if role == "src" and rank is None else "")
        )
    members = dist.get_process_group_ranks(group)
    if rank is not None and rank not in members:
        raise ValueError(f"{role} = {rank} is not in the group: use one of the global ranks {members}")
    if in_group is not None and not 0 <= in_group < len(members):
        raise ValueError(f"group_{role} = {in_group}: use a rank of the group, 0 to {len(members) - 1}")
    return members.index(rank) if rank is not None else int(in_group or 0)


def part_shape(shape: torch.Size, ranks: int) -> tuple[int, ...]:
    """Shape of one rank's part of dimension 0."""
    if not shape or shape[0] % ranks:
        raise ValueError(f"reduce_scatter splits dimension 0 over {ranks} ranks, which {list(shape)} does not allow")
    return shape[0] // ranks, *shape[1:]


def gathered_shape(shape: torch.Size, ranks: int) -> tuple[int, ...]:
    """Shape of all ranks' parts, concatenated along dimension 0."""
    return (ranks * shape[0], *shape[1:]) if shape else (ranks,)


def uneven_rows(
    name: str, x: torch.Tensor, sizes: Sequence[int] | None, rows: int | None, rank: int, ranks: int
) -> tuple[int, ...] | None:
    """Entries of dimension 0 of each rank, or None if they are equal.

    Args:
        name: of the argument, for errors.
        x: this rank's tensor.
        sizes: the argument; None for equal parts.
        rows: that all sizes add up to; None if x is this rank's part.
        rank, ranks: of the group.

    Raises:
        ValueError: sizes that do not fit `x` or the number of ranks.
    """
    if sizes is None:
        return None
    if x.dim() < 2:
        raise ValueError(f"{name} counts rows: x needs at least 2 dimensions, not {list(x.shape)}")
    found = split_sizes(name, sizes, rows, ranks)
    if rows is None and found[rank] != x.shape[0]:
        raise ValueError(f"{name} = {found} gives rank {rank} other than its {x.shape[0]} rows")
    return None if len(set(found)) == 1 else tuple(found)


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
