"""The rules of each collective: which format it uses, and what becomes of x's shape and bytes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from flashcomm.collectives import arguments
from flashcomm.transports.backend import Backend

Splits = tuple[Sequence[int] | None, Sequence[int] | None]
"""Entries of dimension 0 to each rank and from each rank; None for equal parts.

Of a reduce-scatter the first counts, of an all-gather the second, and all ranks give the same; of an all-to-all both.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """x as rows, and the result."""

    count: int
    cols: int
    shape: torch.Size
    """Shape of the result."""
    plain_bytes: int
    """Bytes that the plain collective sends from a rank."""
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Rows to each rank and from each rank, of an all-to-all."""
    sizes: tuple[int, ...] | None = None
    """Rows of each rank, of a reduce-scatter and an all-gather with other than equal parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """A collective."""

    name: str
    place: int | None
    """The format of a pair that it uses, 0 or 1; None for an all-reduce, which uses both."""
    rows: Callable[[torch.Tensor, Splits, int, int], Rows]
    """Cut x into rows, from x, its splits, the rank and the number of ranks; ValueError if that is impossible."""
    plain: Callable[[Backend, torch.Tensor, torch.Tensor, Rows], Any]
    """Run the backend's own collective on rows of x and contiguous rows of the result."""
    root: int | None = None
    """The rank that sends, of a broadcast."""


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _rows(x: torch.Tensor, shape: Sequence[int], plain_bytes: int) -> Rows:
    count, cols = arguments.row_shape(x.shape)
    return Rows(count=count, cols=cols, shape=torch.Size(shape), plain_bytes=plain_bytes)


def _all_reduce(x: torch.Tensor, splits: Splits, rank: int, ranks: int) -> Rows:
    return _rows(x, x.shape, 2 * _bytes(x) * (ranks - 1) // ranks)


def _reduce_scatter(x: torch.Tensor, splits: Splits, rank: int, ranks: int) -> Rows:
    count = x.shape[0] if x.dim() else 0
    if sizes := arguments.uneven_rows("input_split_sizes", x, splits[0], count, rank, ranks):
        return _uneven(x, sizes, sizes[rank], _bytes(x) // count * (count - sizes[rank]))
    shape, plain_bytes = arguments.part_shape(x.shape, ranks), _bytes(x) * (ranks - 1) // ranks
    if x.dim() == 1:
        # A vector is cut into R rows, whose owners sum one each.
        return Rows(count=ranks, cols=x.numel() // ranks, shape=torch.Size(shape), plain_bytes=plain_bytes)
    return _rows(x, shape, plain_bytes)


def _all_gather(x: torch.Tensor, splits: Splits, rank: int, ranks: int) -> Rows:
    if sizes := arguments.uneven_rows("output_split_sizes", x, splits[1], None, rank, ranks):
        return _uneven(x, sizes, sum(sizes), _bytes(x) * (ranks - 1))
    return _rows(x, arguments.gathered_shape(x.shape, ranks), _bytes(x) * (ranks - 1))


def _uneven(x: torch.Tensor, sizes: Sequence[int], entries: int, plain_bytes: int) -> Rows:
    """Rows of a result with `entries` of dimension 0."""
    count, cols = arguments.row_shape(x.shape)
    per_entry = math.prod(x.shape[1:-1])
    return Rows(
        count=count,
        cols=cols,
        shape=torch.Size((entries, *x.shape[1:])),
        plain_bytes=plain_bytes,
        sizes=tuple(size * per_entry for size in sizes),
    )


def _all_to_all(x: torch.Tensor, splits: Splits, rank: int, ranks: int) -> Rows:
    to, come = arguments.all_to_all_rows(x, *splits, rank, ranks)
    count, cols = arguments.row_shape(x.shape)
    # An entry of dimension 0 is several rows where x has more dimensions than two.
    per_entry = math.prod(x.shape[1:-1])
    return Rows(
        count=count,
        cols=cols,
        shape=torch.Size((sum(come), *x.shape[1:])),
        plain_bytes=(sum(to) - to[rank]) * per_entry * cols * x.element_size(),
        splits=(tuple(n * per_entry for n in to), tuple(n * per_entry for n in come)),
    )


def _plain_reduce_scatter(backend: Backend, x: torch.Tensor, out: torch.Tensor, rows: Rows):
    if rows.sizes:
        backend.reduce_rows(x, out, rows.sizes)
    else:
        backend.reduce_scatter(x, out)


def _plain_all_gather(backend: Backend, x: torch.Tensor, out: torch.Tensor, rows: Rows):
    if rows.sizes:
        backend.gather_rows(x, out, rows.sizes)
    else:
        backend.all_gather(x, out)


def _plain_all_to_all(backend: Backend, x: torch.Tensor, out: torch.Tensor, rows: Rows):
    assert rows.splits
    backend.all_to_all(out, x.contiguous(), rows.splits[1], rows.splits[0])


ALL_REDUCE = Verb(
    name="all_reduce", place=None, rows=_all_reduce, plain=lambda backend, x, out, _: backend.all_reduce(x, out)
)
REDUCE_SCATTER = Verb(name="reduce_scatter", place=0, rows=_reduce_scatter, plain=_plain_reduce_scatter)
ALL_GATHER = Verb(name="all_gather", place=1, rows=_all_gather, plain=_plain_all_gather)
ALL_TO_ALL = Verb(name="all_to_all", place=0, rows=_all_to_all, plain=_plain_all_to_all)


@lru_cache(maxsize=1024)
def from_root(root: int) -> Verb:
    """The broadcast of rank `root`."""

    def rows(x: torch.Tensor, splits: Splits, rank: int, ranks: int) -> Rows:
        return _rows(x, x.shape, _bytes(x) * (ranks - 1) if rank == root else 0)

    def plain(backend: Backend, x: torch.Tensor, out: torch.Tensor, _: Rows):
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        backend.broadcast(out, root).wait()

    return Verb(name="broadcast", place=0, root=root, rows=rows, plain=plain)
