"""Four collectives with compressed payloads, over any `torch.distributed` process group.

They mirror torch's own, but return their result: ``x = flashcomm.all_reduce(x, codec="int8g128", group=tp)``. Under one
algorithm a token's result depends on that token alone, every rank gets the same bits, and sums are fp32 in rank order.

Not supported: autograd (these are for inference), integer and fp64 tensors except with codec ``none``.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flashcomm import kernels, planner
from flashcomm.codecs import Codec
from flashcomm.collectives import steps
from flashcomm.collectives.arguments import (
    entered,
    exchangeable,
    fitting,
    part_shape,
    row_shape,
    single_step,
    split_sizes,
)
from flashcomm.collectives.calls import (
    Work,
    decided,
    plain_all_gather,
    plain_all_reduce,
    plain_reduce_scatter,
    run_call,
)
from flashcomm.collectives.levels import hierarchical
from flashcomm.collectives.moving import mover
from flashcomm.collectives.state import GroupState
from flashcomm.collectives.stats import reset_stats, stats

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Work", "all_gather", "all_reduce", "all_to_all", "reduce_scatter", "reset_stats", "stats"]


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
    """Sum of `x` over the ranks of `group`, the same bits on every rank.

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
        async_op: return a `Work`, whose ``wait()`` gives the result. On gloo compressed calls then run on a thread of
            their own, on CUDA on a stream, and the plain collective wherever the backend runs it. Compressed calls over
            other CPU backends finish before they return.
        strict: raise where ``auto`` would run uncompressed although a codec was asked for, or a codec without a kernel.
        batch_invariant: let ``auto`` choose by world size and codec alone, so that a token's result does not depend
            on the size of its batch.

    Returns:
        Tensor of x's shape and dtype, contiguous unless `out` is given; a `Work` if `async_op`.

    Raises:
        ValueError: a wrong argument; raised before any communication.
        RuntimeError: ranks that disagree about the call, a lost peer, or what `strict` refuses.

    Source: Flash Communication (arXiv 2412.04964); fp32 sums and identical bits on all ranks are our own rules.
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.collectives import compiled

        return compiled.all_reduce(x, codec, group, algorithm, out, async_op, strict, batch_invariant)
    state = entered(x, group)
    key = ("all_reduce", codec, algorithm, x.shape, x.dtype, x.device, strict, batch_invariant)
    call = state.calls.get(key) if isinstance(codec, _KEYS) else None
    if call is None:
        codec = fitting(codec, x)
        state.meet(x.device)
        plan = planner.choose(
            x.numel() * x.element_size(),
            state.facts_for(x.device),
            codec,
            algorithm=algorithm,
            batch_invariant=batch_invariant,
            exact="bf16" if x.dtype == torch.bfloat16 else "fp32",
        )
        refusal = _compromise(x, plan.codec, plan) if strict else None
        if x.numel():
            # Also where values will travel as they are: a wrong format must not wait for a larger message.
            codec.check(x.shape[-1] if x.dim() else 1, state.ranks)
        call = decided(
            x,
            state,
            op="all_reduce",
            plan=plan,
            codec=plan.codec,
            # What was asked for, so that ranks that differ find out even where neither compresses.
            contract=_contract("all_reduce", plan.algorithm, codec, x, x.shape)
            + (f", strict={refusal or 'yes'}" if strict else ""),
            shape=x.shape,
            plain_bytes=2 * x.numel() * x.element_size() * (state.ranks - 1) // state.ranks,
            run=plain_all_reduce
            if plan.algorithm == "plain"
            else _moving(plan.algorithm, plan.codec, x, row_shape(x.shape), state, plan.pieces),
            rows=row_shape(x.shape),
            refusal=refusal,
        )
        state.remember(key, call)
    return run_call(call, x, state, out, async_op)


def reduce_scatter(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    algorithm: str = "auto",
    out: torch.Tensor | None = None,
    async_op: bool = False,
) -> torch.Tensor | Work:
    """Sum of `x` over the ranks, of which rank r keeps the r-th of R equal parts of dimension 0.

    One all-to-all of payloads, then a sum in fp32: one rounding per rank, none of the sum but to x's dtype.

    Args:
        x: as for `all_reduce`; dimension 0 must be a multiple of the world size.
        codec: wire format; of a pair, the first.
        algorithm: ``auto`` or ``one_step`` compress, ``plain`` does not.
        group, out, async_op: as for `all_reduce`.

    Returns:
        Tensor ``[x.shape[0] / R, ...]``; a `Work` if `async_op`.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.collectives import compiled

        return compiled.reduce_scatter(x, codec, group, algorithm, out, async_op)
    state = entered(x, group)
    key = ("reduce_scatter", codec, algorithm, x.shape, x.dtype, x.device)
    call = state.calls.get(key) if isinstance(codec, _KEYS) else None
    if call is None:
        codec, shape = single_step(fitting(codec, x), 0, algorithm), part_shape(x.shape, state.ranks)
        state.meet(x.device)
        plan = _single_step_plan(algorithm, codec, state, x)
        # A vector is cut into R rows, whose owners sum one each.
        rows = (state.ranks, x.numel() // state.ranks) if x.dim() == 1 else row_shape(x.shape)
        call = decided(
            x,
            state,
            op="reduce_scatter",
            plan=plan,
            codec=codec,
            contract=_contract("reduce_scatter", plan.algorithm, codec, x, x.shape),
            shape=shape,
            plain_bytes=x.numel() * x.element_size() * (state.ranks - 1) // state.ranks,
            run=plain_reduce_scatter
            if plan.algorithm == "plain"
            else _moving("reduce_scatter", codec, x, rows, state, plan.pieces),
            rows=rows,
        )
        state.remember(key, call)
    return run_call(call, x, state, out, async_op)


def all_gather(
    x: torch.Tensor,
    codec: str | Codec = "int8g128",
    group: "dist.ProcessGroup | DeviceMesh | None" = None,
    *,
    algorithm: str = "auto",
    out: torch.Tensor | None = None,
    async_op: bool = False,
) -> torch.Tensor | Work:
    """Every rank's `x`, concatenated along dimension 0; a rank's own part goes through the codec like the others.

    Args:
        x: as for `all_reduce`.
        codec: wire format; of a pair, the second.
        algorithm: ``auto`` or ``one_step`` compress, ``plain`` does not.
        group, out, async_op: as for `all_reduce`.

    Returns:
        Tensor ``[R * x.shape[0], ...]``; a `Work` if `async_op`.

    Raises:
        ValueError, RuntimeError: as for `all_reduce`.
    """
    if torch.compiler.is_dynamo_compiling():
        from flashcomm.collectives import compiled

        return compiled.all_gather(x, codec, group, algorithm, out, async_op)
    state = entered(x, group)
    key = ("all_gather", codec, algorithm, x.shape, x.dtype, x.device)
    call = state.calls.get(key) if isinstance(codec, _KEYS) else None
    if call is None:
        codec = single_step(fitting(codec, x), 1, algorithm)
        state.meet(x.device)
        plan = _single_step_plan(algorithm, codec, state, x)
        call = decided(
            x,
            state,
            op="all_gather",
            plan=plan,
            codec=codec,
            contract=_contract("all_gather", plan.algorithm, codec, x, x.shape),
            shape=(state.ranks * x.shape[0], *x.shape[1:]) if x.dim() else (state.ranks,),
            plain_bytes=x.numel() * x.element_size() * (state.ranks - 1),
            run=plain_all_gather
            if plan.algorithm == "plain"
            else _moving("all_gather", codec, x, row_shape(x.shape), state, plan.pieces),
            rows=row_shape(x.shape),
        )
        state.remember(key, call)
    return run_call(call, x, state, out, async_op)


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
    """Rows of `x` to every rank in turn, and theirs back, as `torch.distributed.all_to_all_single` does.

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
        from flashcomm.collectives import compiled

        return compiled.all_to_all(x, codec, group, output_split_sizes, input_split_sizes, algorithm, out, async_op)
    state = entered(x, group)
    codec = exchangeable(x, fitting(codec, x), algorithm)
    in_rows = split_sizes("input_split_sizes", input_split_sizes, x.shape[0], state.ranks)
    out_rows = split_sizes(
        "output_split_sizes", output_split_sizes, None if output_split_sizes else x.shape[0], state.ranks
    )
    state.meet(x.device)
    plan = _single_step_plan(algorithm, codec, state, x)
    shape = (sum(out_rows), *x.shape[1:])
    if in_rows[state.rank] != out_rows[state.rank]:
        raise ValueError(
            f"rank {state.rank} keeps {in_rows[state.rank]} rows by input_split_sizes and "
            f"{out_rows[state.rank]} by output_split_sizes: give the same number"
        )
    # An entry of dimension 0 is several of the codec's rows where x has more dimensions than two.
    per_entry = math.prod(x.shape[1:-1])
    in_rows, out_rows = ([n * per_entry for n in sizes] for sizes in (in_rows, out_rows))

    def run(rows: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
        if plan.algorithm == "plain":
            dist.all_to_all_single(out, rows.contiguous(), out_rows, in_rows, group=state.group)
            return (rows.shape[0] - in_rows[state.rank]) * rows.shape[1] * rows.element_size()
        return steps.all_to_all(rows, codec, state, out, out_rows, in_rows)

    call = decided(
        x,
        state,
        op="all_to_all",
        plan=plan,
        codec=codec,
        contract=_contract("all_to_all", plan.algorithm, codec, x, ("*", *x.shape[1:])),
        shape=shape,
        plain_bytes=(sum(in_rows) - in_rows[state.rank]) * x.shape[-1] * x.element_size(),
        run=run,
        rows=row_shape(x.shape),
        # Ranks may hold different numbers of rows, so even a rank that has none takes part.
        even_if_empty=True,
    )
    return run_call(call, x, state, out, async_op)


# What may be given as a codec, and remembers a call; a tuple, because `str | Codec` would be made anew in every call.
_KEYS = str, Codec


def _moving(name: str, codec: Codec, x: torch.Tensor, rows: tuple[int, int], state: GroupState, pieces: int = 1) -> Any:
    """The function that runs a compressed call on rows of x."""
    if name == "hierarchical":
        return partial(hierarchical, pieces=pieces)
    return mover(name, codec, x.reshape(rows), state, pieces)


def _compromise(x: torch.Tensor, codec: Codec, plan: planner.Plan) -> str | None:
    """What `strict` refuses about a plan, if anything."""
    if plan.declined:
        return f"would run uncompressed: {plan.reason}"
    if plan.algorithm != "plain":
        for step in codec.steps:
            if reason := kernels.missing(step, x.device.type):
                return f"would run {step} without a kernel: {reason}"
    return None


def _contract(op: str, algorithm: str, codec: Codec, x: torch.Tensor, shape: Sequence) -> str:
    """What all ranks must agree on before the first transfer."""
    dtype, size = str(x.dtype).removeprefix("torch."), "x".join(map(str, shape)) or "scalar"
    return f"op={op}, algorithm={algorithm}, codec={codec}, dtype={dtype}, shape={size}"


def _single_step_plan(algorithm: str, codec: Codec, state: GroupState, x: torch.Tensor) -> planner.Plan:
    plan = planner.choose(0, state.ranks, codec, algorithm=algorithm, batch_invariant=True)
    if plan.algorithm == "plain":
        return plan
    count = planner.pieces(x.numel() * x.element_size(), x.device.type) if state.facts.hosts != 1 else 1
    return planner.Plan(algorithm="one_step", codec=codec, reason=plan.reason, pieces=count)
