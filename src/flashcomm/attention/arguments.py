"""Check the arguments of attention over ranks, before any communication."""

import math
from collections.abc import Sequence

import torch

from flashcomm import codecs
from flashcomm.codecs import FLOAT_DTYPES, Codec, Levels, Pair
from flashcomm.collectives.arguments import check_grad, not_dense

ALGORITHMS = ("auto", "one_step", "two_step")


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
    """Refuse tensors that do not fit together.

    Raises:
        ValueError: not dense, not 4-D, of another dtype or device, or shapes that do not match.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_one(name, x, 4, "[batch, heads, tokens, head size]")
        if (x.dtype, x.device) != (query.dtype, query.device):
            raise ValueError(f"{name} is {x.dtype} on {x.device}, but query {query.dtype} on {query.device}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, not {list(key.shape)} and {list(value.shape)}")
    (batch, heads, _, size), (key_batch, key_heads, _, key_size) = query.shape, key.shape
    if (batch, size) != (key_batch, key_size):
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must agree in batch (dimension 0) and head size "
            "(dimension 3)"
        )
    if not batch or not size or not key_heads or not heads or heads % key_heads:
        raise ValueError(
            f"{heads} query heads do not divide evenly among {key_heads} key heads, or a dimension of "
            f"{list(query.shape)} is 0: give a multiple, and at least one of each"
        )


def check_partials(out: torch.Tensor, lse: torch.Tensor):
    """Refuse a partial result that `merge` cannot take.

    Raises:
        ValueError: not dense, of a wrong number of dimensions or dtype, or shapes that do not match.
    """
    _check_one("out", out, 4, "[batch, heads, queries, head size]")
    check_grad(lse)
    if lse.shape != out.shape[:3] or lse.dtype != torch.float32 or lse.device != out.device:
        raise ValueError(
            f"lse must be torch.float32 {list(out.shape[:3])} on {out.device}, not {lse.dtype} {list(lse.shape)} on "
            f"{lse.device}"
        )


def _check_one(name: str, x: torch.Tensor, dims: int, shape: str):
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided or x.is_nested:
        raise not_dense(x, name)
    check_grad(x)
    if x.dim() != dims:
        raise ValueError(f"{name} must be {shape}, not {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be bf16, fp16 or fp32, not {x.dtype}")


def check_mask(mask: torch.Tensor | None, wanted: Sequence[int]):
    """Refuse a mask that does not broadcast to `wanted`: [batch, heads, all queries, this rank's keys].

    Raises:
        ValueError: neither bool nor floating point, or another shape.
    """
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or (mask.dtype != torch.bool and not mask.is_floating_point()):
        given = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attn_mask must be bool (True: visible) or floating point (added to the scores), not {given}")
    check_grad(mask)
    ends = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.dim() > 4 or any(size not in (1, want) for size, want in ends):
        raise ValueError(
            f"attn_mask {list(mask.shape)} does not broadcast to {list(wanted)}: batch, query heads, queries of all "
            "ranks, keys of this rank"
        )


def check_exchange(codec: "str | Codec", algorithm: str, ranks: int, sharded: bool) -> tuple[Codec, bool]:
    """Parse the codec, and choose the exchange: (codec, whether in two steps).

    Raises:
        ValueError: an unknown algorithm, or a codec or queries that it cannot serve.
    """
    codec = codecs.parse(codec)
    if isinstance(codec, Levels):
        raise ValueError(f"only all_reduce has levels: of {codec}, give one of {codec.inside} and {codec.between}")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm!r}. Allowed here: {', '.join(ALGORITHMS)}")
    if sharded and algorithm != "auto":
        raise ValueError(f"sharded queries have one algorithm: leave out algorithm={algorithm!r}")
    if algorithm == "one_step" and isinstance(codec, Pair):
        raise ValueError(f"one_step sends once, so it takes a single codec, not the pair {codec}")
    # With two ranks both send the same bytes, and one_step rounds once instead of twice. Never by size, so that a
    # token's result cannot depend on its batch.
    return codec, algorithm == "two_step" or (algorithm == "auto" and (ranks > 2 or isinstance(codec, Pair)))


def checked_scale(scale: float | None, size: int) -> float:
    """`scale`, or 1 / sqrt(head size).

    Raises:
        ValueError: not finite.
    """
    chosen = size**-0.5 if scale is None else scale
    if not math.isfinite(chosen):
        raise ValueError(f"scale must be finite, not {chosen}")
    return chosen
