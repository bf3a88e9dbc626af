"""Four collectives with compressed payloads, over any `torch.distributed` process group.

They mirror torch's own, but return their result: ``x = flashcomm.all_reduce(x, codec="int8g128", group=tp)``. Under one
algorithm a token's result depends on that token alone, every rank gets the same bits, and sums are fp32 in rank order.

Not supported: autograd (these are for inference), integer and fp64 tensors except with codec ``none``.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flashcomm import codecs, kernels, planner
from flashcomm.codecs import FLOAT_DTYPES, Codec, Levels, Pair, Plain
from flashcomm.collectives import shared, steps
from flashcomm.collectives.levels import hierarchical
from flashcomm.collectives.moving import mover
from flashcomm.collectives.state import GroupState, gather, scatter_sum, state_of
from flashcomm.collectives.stats import Tally, reset_stats, stats, tally

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Work", "all_gather", "all_reduce", "all_to_all", "reduce_scatter", "reset_stats", "stats"]


class Work:
    """Handle of an asynchronous collective.

    Example: ``work = flashcomm.all_reduce(x, async_op=True); ...; y = work.wait()``.
    """

    def __init__(
        self,
        out: torch.Tensor,
        future: "Future | None" = None,
        event: Any = None,
        plain: "tuple[Any, Callable[[BaseException], Exception]] | None" = None,
    ):
        self._out, self._future, self._event, self._plain = out, future, event, plain

    def wait(self) -> torch.Tensor:
        """The result, once it is there. On CUDA the current stream waits, not the host. Raises what the call raised."""
        if self._future is not None:
            self._future.result()
        if self._event is not None:
            torch.cuda.current_stream(self._out.device).wait_event(self._event)
        if self._plain is not None:
            work, failure = self._plain
            try:
                work.wait()
            except RuntimeError as error:
                raise failure(error) from error
            # The backend's handle must not be waited for twice.
            self._plain = None
        return self._out

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        if self._event is not None:
            return self._event.query()
        # Another thread may be waiting.
        if (plain := self._plain) is not None:
            return plain[0].is_completed()
        return self._future is None or self._future.done()


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
    state = _entered(x, group)
    key = ("all_reduce", codec, algorithm, x.shape, x.dtype, x.device, strict, batch_invariant)
    call = state.calls.get(key) if isinstance(codec, _KEYS) else None
    if call is None:
        codec = _fitting(codec, x)
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
        call = _decided(
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
            run=_plain_all_reduce
            if plan.algorithm == "plain"
            else _moving(plan.algorithm, plan.codec, x, _row_shape(x.shape), state, plan.pieces),
            rows=_row_shape(x.shape),
            refusal=refusal,
        )
        state.remember(key, call)
    return _run(call, x, state, out, async_op)


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
    state = _entered(x, group)
    key = ("reduce_scatter", codec, algorithm, x.shape, x.dtype, x.device)
    call = state.calls.get(key) if isinstance(codec, _KEYS) else None
    if call is None:
        codec, shape = _step(_fitting(codec, x), 0, algorithm), _part(x.shape, state.ranks)
        plan = _single_step_plan(algorithm, codec, state, x)
        # A vector is cut into R rows, whose owners sum one each.
        rows = (state.ranks, x.numel() // state.ranks) if x.dim() == 1 else _row_shape(x.shape)
        call = _decided(
            x,
            state,
            op="reduce_scatter",
            plan=plan,
            codec=codec,
            contract=_contract("reduce_scatter", plan.algorithm, codec, x, x.shape),
            shape=shape,
            plain_bytes=x.numel() * x.element_size() * (state.ranks - 1) // state.ranks,
            run=_plain_reduce_scatter
            if plan.algorithm == "plain"
            else _moving("reduce_scatter", codec, x, rows, state, plan.pieces),
            rows=rows,
        )
        state.remember(key, call)
    return _run(call, x, state, out, async_op)


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
    state = _entered(x, group)
    key = ("all_gather", codec, algorithm, x.shape, x.dtype, x.device)
    call = state.calls.get(key) if isinstance(codec, _KEYS) else None
    if call is None:
        codec = _step(_fitting(codec, x), 1, algorithm)
        plan = _single_step_plan(algorithm, codec, state, x)
        call = _decided(
            x,
            state,
            op="all_gather",
            plan=plan,
            codec=codec,
            contract=_contract("all_gather", plan.algorithm, codec, x, x.shape),
            shape=(state.ranks * x.shape[0], *x.shape[1:]) if x.dim() else (state.ranks,),
            plain_bytes=x.numel() * x.element_size() * (state.ranks - 1),
            run=_plain_all_gather
            if plan.algorithm == "plain"
            else _moving("all_gather", codec, x, _row_shape(x.shape), state, plan.pieces),
            rows=_row_shape(x.shape),
        )
        state.remember(key, call)
    return _run(call, x, state, out, async_op)


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
    state = _entered(x, group)
    codec = _exchangeable(x, _fitting(codec, x), algorithm)
    in_rows = _split("input_split_sizes", input_split_sizes, x.shape[0], state.ranks)
    out_rows = _split("output_split_sizes", output_split_sizes, None if output_split_sizes else x.shape[0], state.ranks)
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

    call = _decided(
        x,
        state,
        op="all_to_all",
        plan=plan,
        codec=codec,
        contract=_contract("all_to_all", plan.algorithm, codec, x, ("*", *x.shape[1:])),
        shape=shape,
        plain_bytes=(sum(in_rows) - in_rows[state.rank]) * x.shape[-1] * x.element_size(),
        run=run,
        rows=_row_shape(x.shape),
        # Ranks may hold different numbers of rows, so even a rank that has none takes part.
        even_if_empty=True,
    )
    return _run(call, x, state, out, async_op)


# What may be given as a codec, and remembers a call; a tuple, because `str | Codec` would be made anew in every call.
_KEYS = str, Codec


def _moving(name: str, codec: Codec, x: torch.Tensor, rows: tuple[int, int], state: GroupState, pieces: int = 1) -> Any:
    """The function that runs a compressed call on rows of x."""
    if name == "hierarchical":
        return partial(hierarchical, pieces=pieces)
    return mover(name, codec, x.reshape(rows), state, pieces)


def _entered(x: torch.Tensor, group: "dist.ProcessGroup | DeviceMesh | None") -> GroupState:
    """The state of `group`, once `x` is a tensor that a collective can take."""
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        raise ValueError(
            f"x must be a dense tensor, not {type(x).__name__ if not isinstance(x, torch.Tensor) else x.layout}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("flashcomm is for inference and would cut the gradient: call it under torch.no_grad()")
    if not x.data_ptr():
        kernels.check_storage(x)
    state = state_of(group)
    state.meet(x.device)
    return state


def _fitting(codec: "str | Codec", x: torch.Tensor) -> Codec:
    """The parsed codec, if it can encode `x`."""
    codec = codecs.parse(codec)
    if x.dtype not in FLOAT_DTYPES and not isinstance(codec, Plain):
        raise ValueError(
            f"codec {codec} compresses bf16, fp16 and fp32, not {x.dtype}. Use codec='none' for other types"
        )
    return codec


def _step(codec: Codec, place: int, algorithm: str) -> Codec:
    """Of a codec for the steps of an all-reduce, the one for a collective that is a single step."""
    if isinstance(codec, Levels):
        raise ValueError(f"only all_reduce has levels: of {codec}, give one of {codec.inside} and {codec.between}")
    if algorithm in ("two_step", "hierarchical"):
        raise ValueError(f"only all_reduce can be {algorithm}. Allowed here: auto, one_step, plain")
    return codec.steps[place]


def _exchangeable(x: torch.Tensor, codec: Codec, algorithm: str) -> Codec:
    """The codec, if rows of `x` can be exchanged in it."""
    if isinstance(codec, Pair):
        raise ValueError(f"all_to_all sends once, so it takes a single codec, not the pair {codec}")
    if x.dim() < 2:
        raise ValueError(f"all_to_all exchanges rows: x needs at least 2 dimensions, not {list(x.shape)}")
    return _step(codec, 0, algorithm)


def _part(shape: torch.Size, ranks: int) -> tuple[int, ...]:
    """The shape of one rank's part of dimension 0."""
    if not shape or shape[0] % ranks:
        raise ValueError(f"reduce_scatter splits dimension 0 over {ranks} ranks, which {list(shape)} does not allow")
    return shape[0] // ranks, *shape[1:]


def _compromise(x: torch.Tensor, codec: Codec, plan: planner.Plan) -> str | None:
    """What `strict` refuses about a plan, if anything."""
    if plan.declined:
        return f"would run uncompressed: {plan.reason}"
    if plan.algorithm != "plain":
        for step in codec.steps:
            if reason := kernels.missing(step, x.device.type):
                return f"would run {step} without a kernel: {reason}"
    return None


def _row_shape(shape: torch.Size) -> tuple[int, int]:
    """[..., H] as [T, H]."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


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


def _split(name: str, sizes: Sequence[int] | None, rows: int | None, ranks: int) -> list[int]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One collective, decided and checked on this rank; remembered, because deciding takes longer than a small sum."""

    op: str
    plan: planner.Plan
    codec: Codec
    contract: str
    identity: str | None
    """What ranks compare of a calibrated codec beside its spelling."""
    shape: torch.Size
    """Of the result."""
    dtype: torch.dtype
    device: torch.device
    plain_bytes: int
    """What the plain collective would send from this rank."""
    run: Callable[[torch.Tensor, Codec, GroupState, torch.Tensor], int]
    """Runs on x and the result, of any strides; returns the bytes sent."""
    refusal: str | None
    """Why ``strict`` refuses it; raised after the agreement, since a missing kernel may be one rank's alone."""
    tally: Tally

    def __call__(self, x: torch.Tensor, state: GroupState, out: torch.Tensor):
        """Run on this thread; `x` and `out` may have any strides."""
        try:
            sent = self.run(x, self.codec, state, out)
        except BaseException as error:
            state.abandon(f"rank {state.rank} failed in the middle of an earlier call: {error!r}")
            if not isinstance(error, RuntimeError):
                raise
            raise self.failure(state, error) from error
        self.tally.add(sent, self.plain_bytes)

    def failure(self, state: GroupState, error: BaseException) -> RuntimeError:
        """What `error` means to the caller."""
        return RuntimeError(
            f"{self.op} over {state.ranks} ranks failed on rank {state.rank} ({self.contract}): {error}. "
            "A peer that is gone, or that does not join within the group's timeout, looks like this"
        )


def _decided(
    x: torch.Tensor,
    state: GroupState,
    *,
    op: str,
    plan: planner.Plan,
    codec: Codec,
    contract: str,
    shape: Sequence[int],
    plain_bytes: int,
    run: Callable[[torch.Tensor, Codec, GroupState, torch.Tensor], int],
    rows: tuple[int, int],
    even_if_empty: bool = False,
    refusal: str | None = None,
) -> _Call:
    """The call for tensors like x, of which nothing is left to check or to choose but what differs from call to call.

    Args:
        run: runs on rows of x and of the result.
        rows: the shape of x as rows.
        even_if_empty: whether a rank without rows takes part, because others may have some.
        op, plan, codec, contract, shape, plain_bytes, refusal: as `_Call` has them.
    """
    if x.numel():
        codec.check(rows[1], state.ranks)
    if state.ranks == 1:
        run = _copy
    elif not x.numel() and not (even_if_empty and rows[1]):
        run = _nothing
    elif not isinstance(run, shared.Prepared):
        run = partial(_on_rows, run, rows)
    uncompressed = plan.algorithm == "plain" or plan.declined
    slow = None if uncompressed else kernels.any_missing(codec, x.device.type)
    return _Call(
        op=op,
        plan=plan,
        codec=codec,
        contract=contract,
        identity=codec.identity if codec.identity != str(codec) else None,
        shape=torch.Size(shape),
        dtype=x.dtype,
        device=x.device,
        plain_bytes=plain_bytes,
        run=run,
        refusal=refusal,
        tally=tally(op, f"{op}/{plan.algorithm}/{codec}", plan.reason, uncompressed=uncompressed, slow=slow),
    )


def _on_rows(run, rows, x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """Call `run` with rows of x and contiguous rows of the result."""
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    sent = run(x.reshape(rows), codec, state, target.view(-1, rows[1]))
    if target is not out:
        out.copy_(target)
    return sent


def _copy(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    out.copy_(x.reshape(out.shape))
    return 0


def _nothing(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    return 0


def _run(
    call: _Call, x: torch.Tensor, state: GroupState, out: torch.Tensor | None, async_op: bool
) -> torch.Tensor | Work:
    if out is None:
        # Like x is found in half the time.
        like = x.is_contiguous() and x.shape == call.shape
        out = torch.empty_like(x) if like else torch.empty(call.shape, dtype=call.dtype, device=call.device)
    elif out.shape != call.shape or out.dtype != call.dtype or out.device != call.device:
        raise ValueError(
            f"out must be {call.dtype} {list(call.shape)} on {call.device}, "
            f"not {out.dtype} {list(out.shape)} on {out.device}"
        )
    if call.identity:
        # Once per calibrated codec, not once more for every new shape.
        state.agree(f"codec={call.identity}", call.device)
    state.agree(call.contract, call.device)
    if isinstance(call.run, shared.Prepared):
        state.reserve(call.run.half_bytes)
    if call.refusal:
        raise RuntimeError(f"strict: {call.op} of {list(out.shape)} {out.dtype} {call.refusal}")
    if not async_op:
        call(x, state, out)
        return out
    if (
        call.op == "all_reduce"
        and call.plan.algorithm == "plain"
        and state.ranks > 1
        and x.numel()
        and out.is_contiguous()
    ):
        return _start_plain_all_reduce(call, x, state, out)
    if out.device.type == "cuda":
        stream = state.stream(out.device)
        stream.wait_stream(torch.cuda.current_stream(out.device))
        with torch.cuda.stream(stream):
            call(x, state, out)
        for tensor in (x, out):
            tensor.record_stream(stream)
        return Work(out, event=stream.record_event())
    if state.ranks == 1 or call.plan.algorithm == "plain" or not state.direct(out.device):
        # What is not made of our own point-to-point messages keeps its place among the caller's collectives.
        call(x, state, out)
        return Work(out)
    lane_state, lane = state.lane()
    # Inference mode and grad mode are per thread.
    return Work(out, future=lane.submit(torch.inference_mode()(call), x, lane_state, out))


def _plain_all_reduce(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    if out.data_ptr() != x.data_ptr() or out.stride() != x.stride():
        out.copy_(x)
    dist.all_reduce(out, group=state.group)
    return 2 * x.numel() * x.element_size() * (state.ranks - 1) // state.ranks


def _start_plain_all_reduce(call: _Call, x: torch.Tensor, state: GroupState, out: torch.Tensor) -> Work:
    """On the backend's own thread or stream; it keeps its place among the caller's collectives."""
    if out.data_ptr() != x.data_ptr() or out.stride() != x.stride():
        out.copy_(x)
    work = dist.all_reduce(out, group=state.group, async_op=True)
    call.tally.add(call.plain_bytes, call.plain_bytes)
    return Work(out, plain=(work, partial(call.failure, state)))


def _plain_reduce_scatter(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    scatter_sum(out, x.contiguous(), state.group)
    return x.numel() * x.element_size() * (state.ranks - 1) // state.ranks


def _plain_all_gather(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    gather(out, x.contiguous(), state.group)
    return (state.ranks - 1) * x.numel() * x.element_size()
