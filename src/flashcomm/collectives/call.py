"""One collective from its arguments to its result: decided, agreed on and remembered once, then run.

Deciding takes longer than a small sum, so what `_decide` makes of a codec, shape and dtype serves every later call.
`start` is the one way in, for the public verbs and for the operators of compiled graphs.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

import torch

from flashcomm import kernels, planner
from flashcomm.codecs import Codec
from flashcomm.collectives import arguments, routes
from flashcomm.collectives.group import Group, group_of
from flashcomm.collectives.rules import ALL_REDUCE, ALL_TO_ALL, Rows, Splits, Verb
from flashcomm.collectives.stats import Tally, tally
from flashcomm.errors import CollectiveError, RanksDisagree, TimedOut, Unavailable, kind_of
from flashcomm.transports import pages
from flashcomm.transports.backend import Backend
from flashcomm.transports.base import OnRows, Ranks, Run, Task, nothing_to_abandon
from flashcomm.transports.lanes import Lane


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
        """Block until the result is there, and return it; raise what the call raised.

        On CUDA the current stream waits, not the host.
        """
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
        """The backend's own handle of a plain collective that it runs; None of any other."""
        return self._plain[0] if self._plain else None

    def add_done_callback(self, function: Callable[[], object]):
        """Call `function` as soon as `wait` blocks the host no longer: at once, or from a thread of its own.

        Not from the lane's: `function` may wait for another collective, which runs there.
        """
        if self._future is not None:
            self._future.add_done_callback(lambda _: Thread(target=function, daemon=True).start())
        elif (plain := self._plain) is not None:
            plain[0].get_future().add_done_callback(lambda _: function())
        else:
            function()


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One collective, decided and checked on this rank."""

    verb: str
    """Name, such as ``all_reduce``."""
    ranks: Ranks
    backend: Backend
    plan: planner.Plan
    contract: str
    shape: torch.Size
    """Shape of the result."""
    dtype: torch.dtype
    device: torch.device
    large: bool
    """Whether memory for the result comes from `transports.pages`."""
    plain_bytes: int
    """Bytes that the plain collective would send from this rank."""
    prepared: Run
    lane: Lane | None
    """Keeps the order of calls; None if nothing is sent, by one rank or without values."""
    refusal: str | None
    """Reason to refuse it if ``strict``; raised after the agreement, since a missing kernel may be one rank's alone."""
    tally: Tally

    def start(self, x: torch.Tensor, out: torch.Tensor | None, async_op: bool) -> "torch.Tensor | Work":
        """Run on `x`; return the result, or a `Work` if `async_op`."""
        if out is None and self.large:
            out = pages.empty(self.shape, self.dtype)
        elif out is None:
            # empty_like takes half the time of empty.
            like = x.is_contiguous() and x.shape == self.shape
            out = torch.empty_like(x) if like else torch.empty(self.shape, dtype=self.dtype, device=self.device)
        elif out.shape != self.shape or out.dtype != self.dtype or out.device != self.device:
            raise _refuse_out(out, self.shape, self.dtype, self.device)
        if self.dtype.is_complex:
            # Only complex numbers may be conjugated views.
            x = x.resolve_conj()
            arguments.check_writable(out)
        if self.refusal:
            raise Unavailable(f"strict: {self.verb} of {list(out.shape)} {out.dtype} {self.refusal}")
        if async_op:
            return self._start_later(x, out)
        lane = self.lane
        if lane is None:
            self._run(x, out)
            return out
        # `with` would take twice as long.
        lane.turn.acquire()
        try:
            # Calls that were started before, and run on the lane's thread.
            if lane.last is not None:
                lane.finish()
            self._run(x, out)
        finally:
            lane.turn.release()
        return out

    def _run(self, x: torch.Tensor, out: torch.Tensor):
        """Run on this thread; `x` and `out` may have any strides."""
        lane = self.lane
        try:
            if lane is not None and lane.late:
                raise TimedOut(lane.late)
            sent = self.prepared(x, out)
        except BaseException as error:
            why = f"rank {self.ranks.rank} failed in the middle of an earlier call: {error!r}"
            self.prepared.abandon(why)
            if lane is not None and kind_of(error) is TimedOut:
                lane.give_up(str(error), why)
            if not isinstance(error, RuntimeError):
                raise
            raise self._failure(error) from error
        self.tally.add(sent, self.plain_bytes)

    def _start_later(self, x: torch.Tensor, out: torch.Tensor) -> Work:
        lane, plain = self.lane, self.plan.algorithm == "plain"
        if lane is not None and plain and self.verb == ALL_REDUCE.name and out.is_contiguous() and not lane.late:
            # On the backend's own thread or stream, where it keeps its place among the caller's collectives.
            work = self.backend.all_reduce(x, out, async_op=True)
            self.tally.add(self.plain_bytes, self.plain_bytes)
            return Work(out, plain=(work, self._failure))
        if lane is not None and out.device.type == "cuda":
            stream = lane.stream(out.device)
            stream.wait_stream(torch.cuda.current_stream(out.device))
            with torch.cuda.stream(stream):
                self.start(x, out, async_op=False)
            for tensor in (x, out):
                tensor.record_stream(stream)
            return Work(out, event=stream.record_event())
        if lane is None or plain or lane.thread is None:
            # A backend's operation keeps its place among the caller's collectives.
            self.start(x, out, async_op=False)
            return Work(out)
        # Inference mode and grad mode are per thread.
        return Work(out, future=lane.submit(torch.inference_mode()(self._run), x, out))

    def _failure(self, error: BaseException) -> CollectiveError:
        """The error that the caller gets for `error`."""
        ranks, kind = self.ranks, kind_of(error)
        text = f"{self.verb} over {ranks.world_size} ranks failed on rank {ranks.rank} ({self.contract}): {error}"
        if kind is RanksDisagree:
            return kind(text)
        return kind(f"{text}. A peer that is gone, or that does not join within the group's timeout, looks like this")


# Types of a codec argument under which a call is remembered; a tuple, because `str | Codec` would be made anew in
# every call.
_KEYS = str, Codec
_EQUAL: Splits = (None, None)
_SIZES_CHARACTERS = 200


def start(
    verb: Verb,
    x: torch.Tensor,
    codec: "str | Codec",
    group: Any,
    algorithm: str = "auto",
    out: torch.Tensor | None = None,
    async_op: bool = False,
    strict: bool = False,
    batch_invariant: bool = False,
    splits: Splits = _EQUAL,
    because: str | None = None,
) -> "torch.Tensor | Work":
    """Run a verb; the arguments are those of the public functions in `verbs`.

    `because` is the reason, if the caller has one, why the values travel uncompressed; it is counted instead of the
    plan's.
    """
    x = arguments.check_tensor(x, out)
    home = group_of(group)
    try:
        key = verb.name, codec, algorithm, x.shape, x.dtype, x.device
    except RuntimeError:
        # A nested tensor has no shape.
        raise arguments.not_dense(x, "x") from None
    if strict or batch_invariant or because or verb.root is not None:
        key = (*key, strict, batch_invariant, because, verb.root)
    equal = splits is _EQUAL or splits == _EQUAL
    if not equal and verb is not ALL_TO_ALL:
        # Those of a step of a server are the same in all of its layers.
        to, come = splits
        splits = to if to is None else tuple(to), come if come is None else tuple(come)
        key = (*key, splits)
    # Those of an all-to-all vary from call to call, so they would crowd out calls that repeat.
    repeats = (equal or verb is not ALL_TO_ALL) and isinstance(codec, _KEYS)
    call = home.calls.get(key) if repeats else None
    if call is None:
        call = _decide(verb, x, codec, home, algorithm, strict, batch_invariant, splits, because, out)
        if repeats:
            home.remember(key, call)
    return call.start(x, out, async_op)


def _decide(
    verb: Verb,
    x: torch.Tensor,
    codec: "str | Codec",
    home: Group,
    algorithm: str,
    strict: bool,
    batch_invariant: bool,
    splits: Splits,
    because: str | None,
    out: torch.Tensor | None,
) -> Call:
    """Check and decide everything that depends only on x's shape, dtype and device, and agree on it with all ranks."""
    ranks = home.ranks
    asked = arguments.fitting(codec, x)
    if verb is ALL_TO_ALL:
        asked = arguments.exchangeable(x, asked, algorithm)
    elif verb.root is not None:
        asked = arguments.sent_once(asked, verb.name)
    elif verb.place is not None:
        asked = arguments.single_step(asked, verb.place, algorithm)
    rows = verb.rows(x, splits, ranks.rank, ranks.world_size)
    # The same on all ranks: of uneven parts that of the longest.
    size = (max(rows.sizes) * rows.cols if rows.sizes else x.numel()) * x.element_size()
    if ranks.world_size > 1:
        home.meet(x.device)
    facts = home.facts_for(x.device)
    exact = "bf16" if x.dtype == torch.bfloat16 else "fp32"
    if verb is ALL_REDUCE:
        plan = planner.choose(size, facts, asked, algorithm=algorithm, batch_invariant=batch_invariant, exact=exact)
    else:
        plan = _plan_single_step(size, facts, asked, algorithm)
    # Also where values will travel as they are: a wrong format must not wait for a larger message.
    if x.numel():
        for checked in dict.fromkeys((asked, plan.codec)):
            checked.check(rows.cols, ranks.world_size)
    if out is not None and (out.shape != rows.shape or out.dtype != x.dtype or out.device != x.device):
        raise _refuse_out(out, rows.shape, x.dtype, x.device)
    uncompressed = plan.algorithm == "plain" or plan.declined or because is not None
    refusal = _refusal(plan, x.device.type) if strict else None
    # What was asked for, so that ranks that differ find out even where neither compresses.
    contract = _contract(verb, plan.algorithm, asked, x, rows.sizes) + (
        f", strict={refusal or 'yes'}" if strict else ""
    )
    if plan.codec.identity != str(plan.codec):
        # Once per calibrated codec, not once more for every new shape.
        home.agree(f"codec={plan.codec.identity}", x.device)
    moves = ranks.world_size > 1 and bool(x.numel() or ((verb is ALL_TO_ALL or rows.sizes) and rows.cols))
    task = _task(verb, plan, rows, x) if moves and plan.algorithm != "plain" else None
    load = partial(routes.load, task, home.meet(x.device).lane) if task else lambda: None
    home.agree(contract, x.device, load, known_as=_without_rows(contract, verb, x))
    return Call(
        verb=verb.name,
        ranks=ranks,
        backend=home.backend,
        plan=plan,
        contract=contract,
        shape=rows.shape,
        dtype=x.dtype,
        device=x.device,
        large=pages.is_large(rows.shape, x.dtype, x.device),
        plain_bytes=rows.plain_bytes,
        prepared=routes.run_of(task, home) if task else _uncompressed(verb, rows, home, moves),
        lane=home.meet(x.device).lane if moves else None,
        refusal=refusal,
        tally=tally(
            verb.name,
            plan.algorithm,
            str(plan.codec),
            because or plan.reason,
            uncompressed=uncompressed,
            declined=arguments.declined(plan, asked, facts, exact),
            slow=None if uncompressed else kernels.any_missing(plan.codec, x.device.type),
        ),
    )


def _task(verb: Verb, plan: planner.Plan, rows: Rows, x: torch.Tensor) -> Task:
    return Task(
        name=plan.algorithm if verb is ALL_REDUCE else verb.name,
        codec=plan.codec,
        rows=rows.count,
        cols=rows.cols,
        dtype=x.dtype,
        out_dtype=x.dtype,
        device=x.device,
        pieces=plan.pieces,
        splits=rows.splits,
        root=verb.root or 0,
        sizes=rows.sizes,
    )


def _uncompressed(verb: Verb, rows: Rows, home: Group, moves: bool) -> Run:
    """Run the plain collective, or what is left of it where nothing is sent."""
    if not moves:
        return _copy if home.ranks.world_size == 1 else _nothing
    backend = home.backend

    def plain(x: torch.Tensor, out: torch.Tensor) -> int:
        verb.plain(backend, x, out, rows)
        return rows.plain_bytes

    return OnRows(plain, (rows.count, rows.cols), nothing_to_abandon)


def _plan_single_step(size: int, facts: planner.Facts, codec: Codec, algorithm: str) -> planner.Plan:
    plan = planner.choose(0, facts.ranks, codec, algorithm=algorithm, batch_invariant=True)
    if plan.algorithm == "plain":
        return plan
    pieces = planner.pieces(size, codec, facts.device) if facts.hosts != 1 else 1
    return planner.Plan(algorithm="one_step", codec=codec, reason=plan.reason, pieces=pieces)


def _refuse_out(out: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> ValueError:
    return ValueError(
        f"out must be {dtype} {list(shape)} on {device}, not {out.dtype} {list(out.shape)} on {out.device}"
    )


def _refusal(plan: planner.Plan, device: str) -> str | None:
    """The reason why `strict` refuses a plan; None if it does not."""
    if plan.declined:
        return f"would run uncompressed: {plan.reason}"
    if plan.algorithm != "plain":
        for single in plan.codec.formats:
            if reason := kernels.missing(single, device):
                return f"would run {single} without a kernel: {reason}"
    return None


def _contract(verb: Verb, algorithm: str, codec: Codec, x: torch.Tensor, sizes: Sequence[int] | None = None) -> str:
    """The text that all ranks must agree on before the first transfer."""
    shape: Sequence[object] = ("*", *x.shape[1:]) if verb is ALL_TO_ALL else x.shape
    if sizes:
        text = "+".join(map(str, sizes))
        # What is compared has room for the sizes of some 40 ranks.
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        shape = (text if len(text) < _SIZES_CHARACTERS else f"{sum(sizes)} rows, {digest}", *x.shape[1:])
    op = verb.name if verb.root is None else f"{verb.name} from rank {verb.root}"
    return f"op={op}, algorithm={algorithm}, {describe(str(codec), x.dtype, shape)}"


def describe(codec: str, dtype: torch.dtype, shape: Sequence[object]) -> str:
    """Text of a format, dtype and shape.

    >>> describe("int8g128", torch.bfloat16, (2, 64))
    'codec=int8g128, dtype=bfloat16, shape=2x64'
    """
    size = "x".join(map(str, shape)) or "scalar"
    return f"codec={codec}, dtype={str(dtype).removeprefix('torch.')}, shape={size}"


def _without_rows(contract: str, verb: Verb, x: torch.Tensor) -> str:
    """The contract under which later calls are known to be agreed on.

    A comparison makes the host wait for all that a GPU has still to do, and a server's prompts have all lengths. So on
    GPUs only the first of calls that differ in nothing but their number of rows is compared, its number, too.
    """
    if x.device.type == "cpu" or x.dim() < 2 or verb is ALL_TO_ALL:
        return contract
    call, _, shape = contract.rpartition("shape=")
    _, strict, refusal = shape.partition(", strict=")
    return f"{call}shape=*x{x.shape[-1]}{strict}{refusal}"


class _Local:
    """A `base.Run` that sends nothing."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], Any]):
        self._function = function

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> int:
        self._function(x, out)
        return 0

    def abandon(self, why: str):
        """See `base.Run`."""


_copy = _Local(lambda x, out: out.copy_(x.reshape(out.shape)))
_nothing = _Local(lambda x, out: None)
