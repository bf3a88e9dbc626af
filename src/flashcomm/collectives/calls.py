"""A collective once it is decided: what is left to do for each call, and the handle of one that is under way."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from flashcomm import kernels, planner
from flashcomm.codecs import Codec
from flashcomm.collectives import shared
from flashcomm.collectives.state import GroupState, gather, plain_sums, scatter_sum
from flashcomm.collectives.stats import Tally, tally


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

    @property
    def backend_work(self) -> Any:
        """The backend's own handle, of a plain collective that it runs; None of anything else."""
        return self._plain[0] if self._plain else None

    def add_done_callback(self, function: Callable[[], object]):
        """Call `function` as soon as `wait` blocks the host no longer: at once, or from another thread."""
        if self._future is not None:
            self._future.add_done_callback(lambda _: function())
        elif (plain := self._plain) is not None:
            plain[0].get_future().add_done_callback(lambda _: function())
        else:
            function()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
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


def decided(
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
) -> Call:
    """The call for tensors like x, of which nothing is left to check or to choose but what differs from call to call.

    Args:
        run: runs on rows of x and of the result.
        rows: the shape of x as rows.
        even_if_empty: whether a rank without rows takes part, because others may have some.
        op, plan, codec, contract, shape, plain_bytes, refusal: as `Call` has them.
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
    return Call(
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


def run_call(
    call: Call, x: torch.Tensor, state: GroupState, out: torch.Tensor | None, async_op: bool
) -> torch.Tensor | Work:
    """The result for `x`, once ranks agree; a `Work` if `async_op`."""
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


def plain_all_reduce(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """The backend's own; as `Call.run`."""
    if out.data_ptr() != x.data_ptr() or out.stride() != x.stride():
        out.copy_(x)
    with plain_sums():
        dist.all_reduce(out, group=state.group)
    return 2 * x.numel() * x.element_size() * (state.ranks - 1) // state.ranks


def _start_plain_all_reduce(call: Call, x: torch.Tensor, state: GroupState, out: torch.Tensor) -> Work:
    """On the backend's own thread or stream; it keeps its place among the caller's collectives."""
    if out.data_ptr() != x.data_ptr() or out.stride() != x.stride():
        out.copy_(x)
    with plain_sums():
        work = dist.all_reduce(out, group=state.group, async_op=True)
    call.tally.add(call.plain_bytes, call.plain_bytes)
    return Work(out, plain=(work, partial(call.failure, state)))


def plain_reduce_scatter(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """The backend's own; as `Call.run`."""
    scatter_sum(out, x.contiguous(), state.group)
    return x.numel() * x.element_size() * (state.ranks - 1) // state.ranks


def plain_all_gather(x: torch.Tensor, codec: Codec, state: GroupState, out: torch.Tensor) -> int:
    """The backend's own; as `Call.run`."""
    gather(out, x.contiguous(), state.group)
    return (state.ranks - 1) * x.numel() * x.element_size()
