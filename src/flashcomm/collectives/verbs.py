"""Collectives and messages with compressed payloads, over any `torch.distributed` process group.

They mirror torch's own, but collectives return their result, as in ``x = flashcomm.all_reduce(x, "int8g128", tp)``.
Under one algorithm a token's result depends on that token alone, every rank gets the same bits, and sums are fp32 in
rank order.

Not supported: autograd, which `flashcomm.training` adds; integer and fp64 tensors except with codec ``none``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from flashcomm.codecs import Codec
from flashcomm.collectives import arguments, hops
from flashcomm.collectives.call import Work, start
from flashcomm.collectives.group import group_of
from flashcomm.collectives.rules import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, from_root

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def all_reduce(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    algorithm: str = "auto",
    out: torch.Tensor | None = None,
    async_op: bool = False,
    strict: bool = False,
    batch_invariant: bool = False,
) -> torch.Tensor | Work:
    """Sum `x` over the ranks of `group`, with the same bits on every rank.

    Args:
        x: bf16, fp16 or fp32 of any shape and strides; the last dimension is a token's values, which groups of the
            codec never cross. Not changed, unless it is also `out`. Same shape and dtype on all ranks.
        codec: wire format, for example ``int8g128``; ``none`` for the plain collective.
        group: process group; None for the default one. Or a `DeviceMesh`: of 1 dimension, its group; of 2, all of its
            ranks in ascending order, where dimension 0 leads from host to host and dimension 1 from rank to rank of a
            host, the levels of ``hierarchical``. Ranks must ascend along both. See docs/algorithms.md.
        algorithm: ``auto``, ``one_step``, ``two_step``, ``hierarchical`` or ``plain``; `flashcomm.planner.choose`
            explains ``auto``.
        out: tensor of x's shape, dtype and device for the result; may be `x`.
        async_op: return a `Work`, whose ``wait()`` gives the result. Calls of a group run one after the other in the
            order in which they were started, so some ranks may give this and others not. On gloo compressed calls run
            on a thread of the group, on CUDA on a stream, and the plain collective wherever the backend runs it.
            Compressed calls over other CPU backends, and of CUDA tensors over gloo, finish before they return.
        strict: raise where ``auto`` would run uncompressed although a codec was asked for, or a codec without a kernel.
        batch_invariant: let ``auto`` choose by world size and codec alone, so that a token's result does not depend
            on the size of its batch.

    Returns:
        Tensor of x's shape and dtype, contiguous unless `out` is given; a `Work` if `async_op`.

    Raises:
        ValueError: a wrong argument; raised before any communication.
        RuntimeError: ranks that disagree about the call (`flashcomm.errors.RanksDisagree`), a lost peer (`PeerLost`), a
            peer that is late (`TimedOut`), or what `strict` refuses (`Unavailable`).

    Source: Flash Communication (arXiv 2412.04964); fp32 sums and identical bits on all ranks are our own rules.
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.collectives import graph

        return graph.all_reduce(x, codec, group, algorithm, out, async_op, strict, batch_invariant)
    return start(ALL_REDUCE, x, codec, group, algorithm, out, async_op, strict, batch_invariant)


def reduce_scatter(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    input_split_sizes: Sequence[int] | None = None,
    algorithm: str = "auto",
    out: torch.Tensor | None = None,
    async_op: bool = False,
) -> torch.Tensor | Work:
    """Sum `x` over the ranks; rank r keeps the r-th of R parts of dimension 0.

    One all-to-all of payloads, then a sum in fp32: one rounding per rank, none of the sum but to x's dtype.

    Args:
        x: as for `all_reduce`; dimension 0 must be a multiple of the world size, unless `input_split_sizes` says how
            it is cut.
        codec: wire format; of a pair, the first.
        input_split_sizes: rows of each rank, the same on all ranks, 0 allowed; equal parts if None. Other than equal
            parts take messages, never shared memory, and need x of at least 2 dimensions.
        algorithm: ``auto`` or ``one_step`` compress, ``plain`` does not.
        group, out, async_op: as for `all_reduce`.

    Returns:
        Tensor ``[x.shape[0] / R, ...]``, or ``[input_split_sizes[r], ...]``; a `Work` if `async_op`.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.collectives import graph

        return graph.reduce_scatter(x, codec, group, input_split_sizes, algorithm, out, async_op)
    return start(REDUCE_SCATTER, x, codec, group, algorithm, out, async_op, splits=(input_split_sizes, None))


def all_gather(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    output_split_sizes: Sequence[int] | None = None,
    algorithm: str = "auto",
    out: torch.Tensor | None = None,
    async_op: bool = False,
) -> torch.Tensor | Work:
    """Concatenate every rank's `x` along dimension 0; a rank's own part goes through the codec like the others.

    Args:
        x: as for `all_reduce`; with `output_split_sizes`, ranks may differ in dimension 0.
        codec: wire format; of a pair, the second.
        output_split_sizes: rows of each rank, as for `reduce_scatter`.
        algorithm: ``auto`` or ``one_step`` compress, ``plain`` does not.
        group, out, async_op: as for `all_reduce`.

    Returns:
        Tensor ``[R * x.shape[0], ...]``, or ``[sum(output_split_sizes), ...]``; a `Work` if `async_op`.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.collectives import graph

        return graph.all_gather(x, codec, group, output_split_sizes, algorithm, out, async_op)
    return start(ALL_GATHER, x, codec, group, algorithm, out, async_op, splits=(None, output_split_sizes))


def all_to_all(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    algorithm: str = "auto",
    out: torch.Tensor | None = None,
    async_op: bool = False,
) -> torch.Tensor | Work:
    """Send rows of `x` to every rank in turn, and receive theirs, as `torch.distributed.all_to_all_single` does.

    Args:
        x: ``[rows, ...]``, at least 2-D; the shape may differ between ranks in dimension 0 only. Split sizes vary from
            call to call, so ranks do not compare them; sizes that do not fit together are an error during the call.
        codec: wire format, not a pair.
        output_split_sizes: rows to receive from each rank; equal parts of x's rows if None.
        input_split_sizes: rows to send to each rank; equal parts if None.
        algorithm: ``auto`` or ``one_step`` compress, ``plain`` does not.
        group, out, async_op: as for `all_reduce`.

    Returns:
        Tensor ``[sum(output_split_sizes), ...]``; a `Work` if `async_op`.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.collectives import graph

        return graph.all_to_all(x, codec, group, output_split_sizes, input_split_sizes, algorithm, out, async_op)
    splits = input_split_sizes, output_split_sizes
    return start(ALL_TO_ALL, x, codec, group, algorithm, out, async_op, splits=splits)


def broadcast(
    tensor: torch.Tensor,
    src: int | None = None,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    async_op: bool = False,
    group_src: int | None = None,
    *,
    codec: str | Codec = "int8g128",
    strict: bool = False,
) -> torch.Tensor | Work:
    """Write rank `src`'s `tensor` to that of every rank of `group`, as its payload decodes.

    The tensor of `src` changes too: it becomes what the others decode, so every rank ends with the same bits.

    Args:
        tensor: bf16, fp16 or fp32 of any shape and strides, of one shape and dtype on all ranks; others only with codec
            ``none``. The last dimension is a row, as for `all_reduce`.
        src: global rank that sends.
        group: as for `all_reduce`.
        async_op: as for `all_reduce`.
        group_src: rank of the group that sends, in the place of `src`.
        codec: wire format, not a pair; ``none`` for the plain collective.
        strict: raise if the codec has no kernel.

    Returns:
        `tensor`; a `Work` if `async_op`.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.

    Example::

        flashcomm.broadcast(weights, src=0, codec="lossless")
    """
    root = arguments.group_rank(group_of(group).backend.group, "src", src, group_src)
    return start(from_root(root), tensor, codec, group, "auto", tensor, async_op, strict)


def send(
    tensor: torch.Tensor,
    dst: int | None = None,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    tag: int = 0,
    group_dst: int | None = None,
    *,
    codec: str | Codec = "int8g128",
    strict: bool = False,
) -> None:
    """Send `tensor` to rank `dst`, which calls `recv` or `irecv`; no other rank of `group` takes part.

    Both ends give the same codec, dtype and shape, and are told before values travel if they do not. Messages from one
    rank to another with one tag arrive in the order in which they were started, blocking or not; those of `flashcomm`
    and of torch do not mix.

    Args:
        tensor: bf16, fp16 or fp32 of any shape and strides; others only with codec ``none``. Not changed. The last
            dimension is a row, as for `all_reduce`.
        dst: global rank that receives.
        group: as for `all_reduce`.
        tag: keeps messages apart from those of other tags, from 0; NCCL knows no tags.
        group_dst: rank of the group that receives, in the place of `dst`.
        codec: wire format, not a pair; ``none`` for values as they are, by the backend.
        strict: raise if the codec has no kernel.

    Raises:
        ValueError: a wrong argument; raised before any communication.
        RuntimeError: ends that disagree (`flashcomm.errors.RanksDisagree`), a lost peer (`PeerLost`), or one that does
            not come within the group's timeout (`TimedOut`).

    Example::

        flashcomm.send(hidden, dst=1, codec="lossless")  # rank 0
        flashcomm.recv(hidden, src=0, codec="lossless")  # rank 1, into a tensor of that shape and dtype

    Source: the handshake is our own; the formats are those of the collectives.
    """
    _hop("dst", tensor, dst, group, tag, group_dst, codec, strict, async_op=False)


def isend(
    tensor: torch.Tensor,
    dst: int | None = None,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    tag: int = 0,
    group_dst: int | None = None,
    *,
    codec: str | Codec = "int8g128",
    strict: bool = False,
) -> Work:
    """Start `send`; `tensor` must not change until the returned `Work` has been waited for.

    On the CPU the message is made and sent by a thread of this pair of ranks, on CUDA on a stream.

    Args:
        tensor, dst, group, tag, group_dst, codec, strict: as for `send`.

    Raises:
        ValueError: a wrong argument. Other errors are raised by ``wait()``.
    """
    work, _ = _hop("dst", tensor, dst, group, tag, group_dst, codec, strict, async_op=True)
    assert isinstance(work, Work)
    return work


def recv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    tag: int = 0,
    group_src: int | None = None,
    *,
    codec: str | Codec = "int8g128",
    strict: bool = False,
) -> int:
    """Receive into `tensor` what rank `src` sends with `send` or `isend`; return `src` as a global rank.

    Args:
        tensor: for the result, of the sent shape and dtype, of any strides.
        src: global rank that sends. Any rank, as torch allows, is refused: both ends compare what they do.
        group_src: rank of the group that sends, in the place of `src`.
        group, tag, codec, strict: as for `send`.

    Raises:
        ValueError, RuntimeError: as for `send`.
    """
    _, source = _hop("src", tensor, src, group, tag, group_src, codec, strict, async_op=False)
    return source


def irecv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    tag: int = 0,
    group_src: int | None = None,
    *,
    codec: str | Codec = "int8g128",
    strict: bool = False,
) -> Work:
    """Start `recv`; the returned ``Work.wait()`` returns `tensor` once it holds the result.

    Args:
        tensor, src, group, tag, group_src, codec, strict: as for `recv`.

    Raises:
        ValueError: a wrong argument. Other errors are raised by ``wait()``.
    """
    work, _ = _hop("src", tensor, src, group, tag, group_src, codec, strict, async_op=True)
    assert isinstance(work, Work)
    return work


def _hop(
    role: str,
    tensor: torch.Tensor,
    rank: int | None,
    group: "dist.ProcessGroup | DeviceMesh | None",
    tag: int,
    group_rank: int | None,
    codec: str | Codec,
    strict: bool,
    async_op: bool,
) -> tuple[torch.Tensor | Work, int]:
    """Send or receive; return the tensor or its `Work`, and the global rank of the other end."""
    home = group_of(group)
    mine, other = home.ranks.rank, hops.other_end(home, role, rank, group_rank, tag)
    ends = (mine, other) if role == "dst" else (other, mine)
    result = hops.start(tensor, codec, home, *ends, tag, async_op, strict)
    return result, dist.get_global_rank(home.backend.group, other)
