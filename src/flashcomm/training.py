"""Collectives that gradients pass through: each direction is one of our collectives, with its own codec.

    y = flashcomm.training.all_reduce(x @ w, "fp8g128+taco", tp)  # row-wise linear; gradients pass unchanged
    x = flashcomm.training.copy(x, "fp8g128+taco", tp)            # before a column-wise one; gradients are summed

A sum, a gather or an exchange is a linear map, and the gradient of its input is its transpose, applied to the gradient
of its result. Rounding is passed straight through: the gradient is that of the exact collective, and what it loses is
the error of its own codec, bounded as that of the forward pass. All ranks get the same bits where the exact ones would.

    forward           backward                                        in Megatron-LM
    all_reduce        identity; all_reduce if `sum_gradients`         g
    copy              all_reduce                                      f
    all_gather        reduce_scatter; own part, if not `sum_gradients`  gather of sequence parallelism
    reduce_scatter    all_gather                                      its opposite
    all_to_all        all_to_all with the splits exchanged            experts

Hazard: the backward pass communicates, so all ranks must run it, in the same order: a tensor requires a gradient on all
ranks or on none, and the graph is the same. A rank that does not come is an error after the group's timeout.

In compiled models these calls break the graph where gradients are recorded, and run between two graphs. The verbs of
`flashcomm` itself refuse tensors that require gradients, because they would cut the graph without a word.

Source: f and g of Megatron-LM (arXiv 1909.08053, section 3), sequence parallelism (arXiv 2205.05198, section 4.2.2),
compression of both directions in TACO (arXiv 2604.24088); straight-through estimates (arXiv 1308.3432).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flashcomm import collectives
from flashcomm.codecs import Codec
from flashcomm.collectives import arguments
from flashcomm.collectives.group import group_of
from flashcomm.collectives.rules import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, Splits, Verb

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def all_reduce(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    sum_gradients: bool = False,
    backward: str | Codec | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Sum `x` over the ranks.

    Args:
        x: bf16, fp16 or fp32 of any shape, as for `flashcomm.all_reduce`.
        codec: wire format of the sum.
        group: as for `flashcomm.all_reduce`.
        sum_gradients: whether the gradient of the result differs between ranks, as where each has a loss of its own, so
            that the gradient of `x` is their sum. By default all ranks go on alike, and it passes unchanged.
        backward: wire format of that sum; None for `codec`.
        algorithm: as for `flashcomm.all_reduce`, in both directions.

    Returns:
        Tensor of x's shape and dtype, with the same bits on every rank.

    Raises:
        ValueError, RuntimeError: those of `flashcomm.all_reduce`; a format that the backward pass could not use is
            refused in the forward pass, before any communication.

    Example: with 2 ranks and x = [1.0, 2.0] on both, y = all_reduce(x, "fp32") is [2.0, 4.0], and y.sum().backward()
    leaves x.grad = [1.0, 1.0]; with ``sum_gradients=True`` it is [2.0, 2.0].
    """
    back = _Call(ALL_REDUCE, _or(backward, codec), group, algorithm) if sum_gradients else _Identity()
    return _through(x, _Call(ALL_REDUCE, codec, group, algorithm), back)


def copy(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Return `x`, which all ranks hold alike, and sum its gradients, of which each rank has a share.

    Args:
        x: bf16, fp16 or fp32 of any shape, the same on all ranks.
        codec: wire format of the sum of gradients.
        group, algorithm: as for `all_reduce`.

    Returns:
        A view of `x`.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.

    Example: with 2 ranks, y = copy(x, "fp32") is x; where y's gradient is [1.0] on rank 0 and [2.0] on rank 1, x's is
    [3.0] on both.
    """
    return _through(x, _Identity(), _Call(ALL_REDUCE, codec, group, algorithm))


def all_gather(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    sum_gradients: bool = True,
    backward: str | Codec | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Concatenate every rank's `x` along dimension 0; the gradient is reduced and scattered.

    Args:
        x: as for `flashcomm.all_gather`, of one shape on all ranks.
        codec: wire format of the gather; of a pair, the second.
        group: as for `flashcomm.all_reduce`.
        sum_gradients: whether the gradient of the result differs between ranks, as before a column-wise linear. If not,
            a rank keeps its part of it, and nothing is sent.
        backward: wire format of the reduce-scatter, of a pair the first; None for `codec`.
        algorithm: ``auto``, ``one_step`` or ``plain``, in both directions.

    Returns:
        Tensor ``[R * x.shape[0], ...]``.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.

    Example: with 2 ranks that hold [1.0] and [2.0], y = all_gather(x, "fp32") is [1.0, 2.0]; where y's gradient is
    [1.0, 1.0] on both, x's is [2.0].
    """
    back = _Call(REDUCE_SCATTER, _or(backward, codec), group, algorithm) if sum_gradients else _OwnPart(group)
    return _through(x, _Call(ALL_GATHER, codec, group, algorithm), back)


def reduce_scatter(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    backward: str | Codec | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Sum `x` over the ranks, of which rank r keeps the r-th part of dimension 0; the gradient is gathered.

    Args:
        x: as for `flashcomm.reduce_scatter`.
        codec: wire format of the sum; of a pair, the first.
        group: as for `flashcomm.all_reduce`.
        backward: wire format of the gather, of a pair the second; None for `codec`.
        algorithm: ``auto``, ``one_step`` or ``plain``, in both directions.

    Returns:
        Tensor ``[x.shape[0] / R, ...]``.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.

    Example: with 2 ranks and x = [1.0, 2.0] on both, y = reduce_scatter(x, "fp32") is [2.0] on rank 0 and [4.0] on rank
    1; where y's gradients are [1.0] and [3.0], x's is [1.0, 3.0] on both.
    """
    back = _Call(ALL_GATHER, _or(backward, codec), group, algorithm)
    return _through(x, _Call(REDUCE_SCATTER, codec, group, algorithm), back)


def all_to_all(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    backward: str | Codec | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Send rows of `x` to every rank in turn, and receive theirs; gradients of rows travel back the same way.

    Args:
        x, output_split_sizes, input_split_sizes: as for `flashcomm.all_to_all`.
        codec: wire format, not a pair.
        group: as for `flashcomm.all_reduce`.
        backward: wire format of the gradients, not a pair; None for `codec`.
        algorithm: ``auto``, ``one_step`` or ``plain``, in both directions.

    Returns:
        Tensor ``[sum(output_split_sizes), ...]``.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.

    Example: rank 0 sends its only row to rank 1, ``output_split_sizes=[0, 0], input_split_sizes=[0, 1]``; the gradient
    that rank 1 has for this row comes back to rank 0.
    """
    to, come = input_split_sizes, output_split_sizes
    if (to is None) != (come is None) and _recorded(x):
        # The result has another number of rows, whose equal parts would be others.
        ranks = group_of(group).ranks
        to, come = arguments.all_to_all_rows(x, to, come, ranks.rank, ranks.world_size)
    there = _Call(ALL_TO_ALL, codec, group, algorithm, (to, come))
    return _through(x, there, _Call(ALL_TO_ALL, _or(backward, codec), group, algorithm, (come, to)))


def _or(backward: str | Codec | None, codec: str | Codec) -> str | Codec:
    return codec if backward is None else backward


@dataclass(frozen=True, slots=True)
class _Call:
    """A collective as a linear map."""

    verb: Verb
    codec: str | Codec
    group: Any
    algorithm: str
    splits: Splits = (None, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"algorithm": self.algorithm}
        if self.verb is ALL_TO_ALL:
            options |= {"input_split_sizes": self.splits[0], "output_split_sizes": self.splits[1]}
        return getattr(collectives, self.verb.name)(x, self.codec, self.group, **options)

    def checked(self, x: torch.Tensor) -> torch.Tensor:
        """Refuse tensors like `x` as the call would; return the result without memory for its values."""
        codec, ranks = arguments.fitting(self.codec, x), group_of(self.group).ranks
        if self.verb is ALL_TO_ALL:
            codec = arguments.exchangeable(x, codec, self.algorithm)
        elif self.verb.place is not None:
            codec = arguments.single_step(codec, self.verb.place, self.algorithm)
        rows = self.verb.rows(x, self.splits, ranks.rank, ranks.world_size)
        if x.numel():
            codec.check(rows.cols, ranks.world_size)
        return x.new_empty(rows.shape, device="meta")


class _Identity:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # An input that is returned itself would be taken for one that was changed in place.
        return x.view_as(x)

    def checked(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass(frozen=True, slots=True)
class _OwnPart:
    """This rank's part of dimension 0."""

    group: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        ranks = group_of(self.group).ranks
        return x.chunk(ranks.world_size)[ranks.rank]

    def checked(self, x: torch.Tensor) -> torch.Tensor:
        return x


_Map = _Call | _Identity | _OwnPart


class _Through(torch.autograd.Function):
    """A linear map whose transpose is another, so that gradients have gradients too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: _Map, back: _Map) -> torch.Tensor:
        ctx.there, ctx.back, ctx.shape = there, back, x.shape
        return there(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        # A scalar's part of a gather is a vector of one value.
        return _Through.apply(gradient, ctx.back, ctx.there).view(ctx.shape), None, None


def _record(x: torch.Tensor, there: _Map, back: _Map) -> torch.Tensor:
    # All that would be refused later, in the backward pass, where other ranks may have begun to wait.
    back.checked(there.checked(x))
    return _Through.apply(x, there, back)  # pyright: ignore[reportReturnType]


# Groups are no arguments of a graph.
_between_graphs: Any = torch.compiler.disable(_record, reason="flashcomm.training runs between two graphs")


def _recorded(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _through(x: torch.Tensor, there: _Map, back: _Map) -> torch.Tensor:
    return _between_graphs(x, there, back) if _recorded(x) else there(x)
