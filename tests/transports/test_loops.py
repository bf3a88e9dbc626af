"""The rule of `shared/loops.py`, checked on its own functions in every execution of a small world.

What a rank does is not written down here a second time: the functions run uncompiled, under the addresses and arguments
that `shared/prepare.py` gives them, with stand-ins for what touches memory (`run_rows`, and inside the intrinsics
the builder of atomic loads and stores, which is told their order). What they touch, in which order, is what
`interleavings` explores. Each planted fault changes one line of the source, and must be found.

Not modelled: what `_meet` does while it waits (spin, yield, poll), which touches no memory that ranks share.
"""

import dataclasses
import functools
import inspect
import itertools
import struct
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcomm
import interleavings
import promises
from flashcomm.codecs import parse
from flashcomm.kernels import cpu
from flashcomm.transports.base import Ranks, Task
from flashcomm.transports.shared import loops, memory, prepare, sizes
from interleavings import Deliver, Made, Publish, Read, Wait, Write, parts

START = 1 << 40
"""Where the memory pretends to be mapped."""


class Seen(int):
    """A counter's value: this rank's own, and whatever a rank may wait for."""

    address: int
    log: "Log"
    order: str

    def __lt__(self, least):
        self.log.add(Wait(self.address, int(least), self.order == "acquire"))
        return False

    def __le__(self, most):
        return self < most + 1


class Builder:
    """Stands in for LLVM's: loads and stores happen at once."""

    def __init__(self, log: "Log"):
        self._log = log

    def inttoptr(self, address, kind):
        return int(address)

    def store_atomic(self, value, address, order, alignment):
        assert (alignment, address % 8) == (8, 0)
        self._log.counters[address] = int(value)
        self._log.add(Publish(address, int(value), order == "release"))

    def load_atomic(self, address, order, alignment):
        assert (alignment, address % 8) == (8, 0)
        seen = Seen(self._log.counters.get(address, 0))
        seen.address, seen.log, seen.order = address, self._log, order
        return seen


@dataclasses.dataclass(frozen=True)
class Rows:
    """One call of `run_rows`."""

    sources: int
    """Ranks whose rows are read."""
    rank_stride: int
    source: int
    source_stride: int
    target: int
    target_stride: int
    first: int
    last: int

    def targets(self) -> list[tuple[int, int]]:
        """From where to where it writes."""
        return self._spans([self.target], self.target_stride)

    def origins(self) -> list[tuple[int, int]]:
        """From where to where it reads, rank by rank."""
        return self._spans([self.source + rank * self.rank_stride for rank in range(self.sources)], self.source_stride)

    def _spans(self, starts, stride):
        return [(s + self.first * stride, s + self.last * stride) for s in starts] if self.first < self.last else []


class Log:
    """What the threads of a rank do, thread by thread."""

    def __init__(self):
        self.counters: dict[int, int] = {}
        self.threads: dict[int, list] = {}
        self._thread = threading.local()

    def begin(self, place):
        self._thread.log = self.threads.setdefault(int(place[loops.BASE]), [])

    def add(self, operation):
        self._thread.log.append(operation)

    def run_rows(
        self, each, ranks, rank_stride, source, source_stride, after, target, target_stride, scratch, first, last
    ):
        # Operands are numbers and registers; a program that never names its source reads nothing.
        named = after[:, 2 : 2 + cpu.simd.MAX_OPERANDS]
        reads_after = sum(bool((named == register).any()) for register in (cpu.program.SOURCE, cpu.program.NEXT))
        strides = int(rank_stride), int(source), int(source_stride), int(target), int(target_stride)
        self.add(Rows(int(ranks) + reads_after, *strides, int(first), int(last)))


@functools.cache
def _compile(source):
    return compile(source, loops.__file__, "exec")


def uncompiled(log, *faults) -> types.ModuleType:
    """A copy of `loops` that runs in Python and tells `log`; `faults` are (line, what to put there)."""
    source = inspect.getsource(loops)
    for right, wrong in faults:
        assert right in source, f"the fault no longer fits: {right}"
        source = source.replace(right, wrong)
    module = types.ModuleType("uncompiled")
    module.__file__ = loops.__file__
    exec(_compile(source), module.__dict__)
    publish, observe, builder = module.publish._defn, module.observe._defn, Builder(log)
    context = types.SimpleNamespace(get_dummy_value=lambda: None)
    module.publish = lambda *args: publish(None, None, None)[1](context, builder, None, args)
    module.observe = lambda *args: observe(None, None)[1](context, builder, None, args)
    module.run_rows = log.run_rows
    for name in ("_meet", "_epoch", "_program"):
        setattr(module, name, getattr(module, name).py_func)
    return module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A collective on x[rows, cols]."""

    name: str
    rows: int
    cols: int = 1
    codec: str = "bf16"
    dtype: torch.dtype = torch.bfloat16
    piece: int | None = None
    """Rows to a piece, if not as many as fit."""

    def prepared(self, rank: int, ranks: int) -> prepare.Prepared:
        """As shared memory would run it."""
        task = Task(
            name=self.name,
            codec=parse(self.codec),
            rows=self.rows,
            cols=self.cols,
            dtype=self.dtype,
            out_dtype=self.dtype,
            device=torch.device("cpu"),
        )
        ready = prepare.prepare(task, rank, ranks)
        assert ready
        return dataclasses.replace(ready, piece=self.piece) if self.piece else ready


class Machine:
    """Ranks on one host, as addresses. A payload is words of some bytes, or for None a single one."""

    def __init__(
        self, ranks: int, half_bytes: int = sizes.HALF_BYTES, threads: int = 1, word_bytes: int | None = 2, faults=()
    ):
        self.ranks, self.half_bytes, self.threads = ranks, half_bytes, threads
        self._word_bytes = word_bytes
        self.logs = [Log() for _ in range(ranks)]
        self.modules = [uncompiled(log, *faults) for log in self.logs]
        self.regions = []
        for rank in range(ranks):
            us = Ranks(rank=rank, world_size=ranks, timeout_s=30.0, tell=lambda fact: [fact])
            region = memory._Region(us, half_bytes, threads)
            region._polls = np.zeros(8 * ranks, np.uint8)
            region.places = [region._place(START, thread) for thread in range(threads)]
            self.regions.append(region)
        self.memories = [memory.SharedMemory(region._ranks, region) for region in self.regions]
        self.first, self.end = START + self.regions[0]._header_bytes, START + self.regions[0]._size
        self.expected: list[dict] = [{} for _ in range(ranks)]
        self._kept: list[torch.Tensor] = []

    def has(self, address: int) -> bool:
        """Whether it is in the memory that ranks share."""
        return START <= address < self.end

    def half_of(self, start: int, end: int) -> tuple[int, int, int]:
        """(rank, thread, half) in which all of these bytes are."""
        half, last = ((address - self.first) // self.half_bytes for address in (start, end - 1))
        assert half == last >= 0
        assert end <= self.end
        return half // 2 // self.threads, half // 2 % self.threads, half % 2

    def run(self, call: Call):
        """Have every rank note what it does for `call`, and what its result must be."""
        xs, outs, ready = [], [], None
        for rank, shared in enumerate(self.memories):
            ready = call.prepared(rank, self.ranks)
            assert ready.half_bytes <= self.half_bytes, "SharedMemory.prepare would have made room"
            x = torch.empty(ready.x_rows, ready.cols, dtype=call.dtype)
            out = torch.empty(ready.out_rows, ready.cols, dtype=call.dtype)
            function = getattr(self.modules[rank], ready.function.py_func.__name__)
            begin = self.logs[rank].begin

            def noted(place, *args, function=function, begin=begin):
                begin(place)
                return function(place, *args)

            memory.InMemory(dataclasses.replace(ready, function=noted), shared)(x, out)
            xs.append(x)
            outs.append(out)
        self._kept += xs + outs
        words, sum_words = (len(self._words(0, width)) for width in (ready.width, ready.sum_width))
        for rank, out in enumerate(outs):
            for row in range(len(out)):
                self.expected[rank][_row(out, row)] = self._result(call, ready, xs, rank, row, words, sum_words)

    def _result(self, call, ready, xs, rank, row, words, sum_words):
        """The words that a rank must have read when it writes a row of its result."""
        of = lambda peer, row: parts(("x", _row(xs[peer], row)), words)  # noqa: E731
        everyone = range(self.ranks)
        if call.name == "all_gather":
            return of(row // ready.rows, row % ready.rows)
        if call.name == "broadcast":
            return of(0, row)
        if call.name == "reduce_scatter":
            return [word for peer in everyone for word in of(peer, rank * ready.rows + row)]
        payloads = [word for peer in everyone for word in of(peer, row)]
        return payloads if call.name == "one_step" else parts(Made(payloads), sum_words)

    def actors(self) -> list[list]:
        """What every thread of every rank does."""
        return [
            list(self._operations(rank, operations))
            for rank, log in enumerate(self.logs)
            for operations in log.threads.values()
        ]

    def _words(self, address, count_bytes):
        if self._word_bytes is None:
            return [(address, count_bytes)]
        assert address % self._word_bytes == count_bytes % self._word_bytes == 0
        return range(address, address + count_bytes, self._word_bytes)

    def _operations(self, rank, operations):
        left = self.expected[rank]
        for operation in operations:
            if not isinstance(operation, Rows):
                yield operation
                continue
            for r in range(operation.first, operation.last):
                source = operation.source + r * operation.source_stride
                target = operation.target + r * operation.target_stride
                value = None
                if self.has(source):
                    for peer in range(operation.sources):
                        yield from map(
                            Read, self._words(source + peer * operation.rank_stride, operation.source_stride)
                        )
                else:
                    value = ("x", source)
                if self.has(target):
                    for part, word in enumerate(self._words(target, operation.target_stride)):
                        yield Write(word, part, value)
                    yield Deliver(None)
                else:
                    assert target in left, "no row of the result, or a second time"
                    yield Deliver(tuple(left.pop(target)))


def _row(t: torch.Tensor, row: int) -> int:
    return t.data_ptr() + row * t.stride(0) * t.element_size()


def ranks_that(ranks: int, calls, **kwargs) -> list[list]:
    """What `ranks` ranks do for these calls, one after the other; every row of every result is delivered once."""
    machine = Machine(ranks, half_bytes=64, **kwargs)
    for call in calls:
        machine.run(call)
    actors = machine.actors()
    assert not any(machine.expected), "rows of the result that no rank writes"
    return actors


def one_step(rows, **kwargs):
    return Call(name="one_step", rows=rows, piece=1, **kwargs)


def gather(rows, **kwargs):
    return Call(name="all_gather", rows=rows, piece=1, **kwargs)


def broadcast(rows, **kwargs):
    return Call(name="broadcast", rows=rows, piece=1, **kwargs)


def scatter(rows, **kwargs):
    return Call(name="reduce_scatter", rows=rows, piece=1, **kwargs)


def two_step(rows, piece=1, **kwargs):
    return Call(name="two_step", rows=rows, piece=piece, **kwargs)


WIDE = {"cols": 2, "codec": "fp32"}
"""Payloads of four words."""

# (ranks, epochs, calls)
WORLDS = {
    "one_step": (2, 5, [one_step(5, cols=2)]),
    "one_step, long rows": (2, 4, [one_step(4, **WIDE)]),
    "reduce_scatter": (2, 5, [scatter(10)]),
    "all_gather": (2, 5, [gather(5, cols=2)]),
    "broadcast": (2, 5, [broadcast(5, cols=2)]),
    "two_step": (2, 4, [two_step(4, piece=2, cols=2)]),
    "two_step, no row for one rank": (2, 6, [two_step(3)]),
    "two_step, sums longer than values": (2, 4, [two_step(4, piece=2, codec="bf16:fp32")]),
    "one after the other": (2, 5, [gather(1), two_step(2, piece=2), one_step(1), scatter(2)]),
    "sums before and after": (2, 5, [two_step(2, piece=2), one_step(1), two_step(2, piece=2)]),
    "one_step, three ranks": (3, 3, [one_step(3)]),
    "reduce_scatter, three ranks": (3, 2, [scatter(6)]),
    "all_gather, three ranks": (3, 3, [gather(3)]),
    "broadcast, between others": (3, 3, [gather(1), broadcast(1), one_step(1)]),
    "two_step, three ranks": (3, 3, [two_step(3, piece=3), one_step(1)]),
    "two_step, three ranks, no row for one": (3, 3, [gather(1), two_step(2, piece=2)]),
}


@pytest.mark.parametrize("world", WORLDS)
def test_no_race_no_wrong_result_and_no_deadlock_in_any_execution(world):
    ranks, count, calls = WORLDS[world]
    actors = ranks_that(ranks, calls)
    assert [sum(isinstance(o, Publish) for o in actor) for actor in actors] == [count] * ranks
    found = interleavings.explore(actors)
    assert found.wrong == {}
    assert found.states > 100


LOOP = "while observe(counter) < epoch:"
PUBLISH = "publish(place[COUNTERS] + place[RANK] * place[COUNTER_STRIDE], epoch"
OWN = "own = half + place[RANK] * place[STRIDE]"
ALL = "for peer in range(place[RANKS]):\n        counter ="
NEXT = ALL.replace("place[RANKS]", "(place[RANK] + 1) % place[RANKS], (place[RANK] + 1) % place[RANKS] + 1")
HALF, OTHER_HALF = "(epoch & 1) * place[HALF]", "((epoch + 1) & 1) * place[HALF]"

# What is planted: (the line, what stands there instead, ranks, calls, what must be found).
FAULTS = {
    "does not wait": (LOOP, "while False:", 2, [gather(3)], {"race", "value"}),
    "does not wait for the sums": (
        *("missing = _meet(place, epoch + 2)", f"{PUBLISH} + 2)"),
        *(2, [two_step(2, piece=2)], {"race", "value"}),
    ),
    "does not publish the sums": (
        *("missing = _meet(place, epoch + 2)", "missing = ALL_MET"),
        *(2, [two_step(2, piece=2)], {"race", "value"}),
    ),
    "meets twice at one epoch": (
        *("_meet(place, epoch + 2)", "_meet(place, epoch + 1)"),
        *(2, [two_step(2, piece=2)], {"race", "value"}),
    ),
    "waits for the next rank only": (ALL, NEXT, 3, [one_step(2)], {"race", "value"}),
    "waits for an epoch less": (LOOP, "while observe(counter) < epoch - 1:", 2, [gather(3)], {"race", "value"}),
    "waits for an epoch more": (LOOP, "while observe(counter) <= epoch:", 2, [gather(3)], {"deadlock"}),
    "publishes an epoch more": (f"{PUBLISH})", f"{PUBLISH} + 1)", 2, [one_step(3)], {"race", "value"}),
    "publishes before it writes": (OWN, f"{OWN}; {PUBLISH} + 1)", 2, [two_step(2, piece=2)], {"race", "value"}),
    "publishes out of order": ('"release"', '"monotonic"', 2, [one_step(2)], {"race"}),
    "waits out of order": ('"acquire"', '"monotonic"', 2, [one_step(2)], {"race"}),
    "has one half": (HALF, "0 * place[HALF]", 2, [one_step(3)], {"race", "value"}),
    "puts sums over values": (OTHER_HALF, HALF, 2, [two_step(2, piece=2)], {"race", "value"}),
    "writes where others do": (OWN, "own = half", 2, [gather(2)], {"race", "value"}),
    "reads another's stripe": ("theirs = half + mine * n * width", "theirs = half", 2, [scatter(4)], {"value"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    right, wrong, ranks, calls, kinds = FAULTS[fault]
    found = interleavings.explore(ranks_that(ranks, calls, faults=[(right, wrong)]))
    assert set(found.wrong) == kinds


def test_two_ranks_do_not_notice_who_waits_for_the_next_only():
    """The control of the controls: the fault needs three ranks."""
    assert interleavings.explore(ranks_that(2, [one_step(4)], faults=[(ALL, NEXT)])).wrong == {}


WORD, MARK, OTHER = "word", 1, 2
VALUE = parts("value", 1)
GIVES, TAKES = Write(WORD, 0, "value"), [Read(WORD), Deliver(tuple(VALUE))]


@pytest.mark.parametrize(
    "actors, kinds",
    [
        ([[GIVES, Publish(MARK, 1, True)], [Wait(MARK, 1, True), *TAKES]], set()),
        ([[GIVES, Publish(MARK, 1, False)], [Wait(MARK, 1, True), *TAKES]], {"race"}),
        ([[GIVES, Publish(MARK, 1, True)], [Wait(MARK, 1, False), *TAKES]], {"race"}),
        ([[GIVES, Publish(MARK, 1, True)], TAKES], {"race", "value"}),
        # What is written after something was published is not known to who saw only that.
        ([[Publish(MARK, 1, True), GIVES, Publish(MARK, 2, True)], [Wait(MARK, 1, True), Read(WORD)]], {"race"}),
        # Not even to who came late: on ARM the first value may be seen after the second was stored.
        (
            [
                [Publish(MARK, 1, True), GIVES, Publish(MARK, 2, False), Publish(OTHER, 1, False)],
                [Wait(OTHER, 1, False), Wait(MARK, 1, True), Read(WORD)],
            ],
            {"race"},
        ),
        # What an actor learnt it passes on.
        (
            [
                [GIVES, Publish(MARK, 1, True)],
                [Wait(MARK, 1, True), Publish(OTHER, 1, True)],
                [Wait(OTHER, 1, True), *TAKES],
            ],
            set(),
        ),
        (
            [[Wait(OTHER, 1, True), Publish(MARK, 1, True)], [Wait(MARK, 1, True), Publish(OTHER, 1, True)]],
            {"deadlock"},
        ),
        # Two readers are no race, a reader and a writer are.
        ([[Read(WORD)], [Read(WORD)]], set()),
        ([[Read(WORD)], [GIVES]], {"race"}),
        ([[GIVES], [GIVES]], {"race"}),
    ],
)
def test_the_explorer_knows_what_release_and_acquire_mean(actors, kinds):
    assert set(interleavings.explore(actors).wrong) == kinds


def check_addresses(ranks: int, threads: int, call: Call, faults=()):
    """Whose memory, which half, no byte twice in an epoch, and the right rows in the result."""
    # As SharedMemory.prepare does.
    needed = call.prepared(0, ranks).half_bytes
    half_bytes = max(sizes.HALF_BYTES, 1 << (needed - 1).bit_length())
    machine = Machine(ranks, half_bytes=half_bytes, threads=threads, word_bytes=None, faults=faults)
    machine.run(call)
    machine.run(dataclasses.replace(call, rows=call.rows + ranks))
    counters = []
    for rank, log in enumerate(machine.logs):
        for base, operations in log.threads.items():
            (thread,) = (t for t, place in enumerate(machine.regions[rank].places) if place[loops.BASE] == base)
            counters += {o.counter for o in operations if isinstance(o, Publish)}
            check_spans(machine, rank, thread, operations)
    actors = machine.actors()
    assert not any(machine.expected), "rows of the result that no rank writes"
    assert interleavings.replay(actors).wrong == {}
    counters.sort()
    assert len(counters) == len(actors)
    assert counters[0] >= START + memory._NONCE_BYTES
    assert counters[-1] + 8 <= machine.first
    assert all(later - sooner >= 128 for sooner, later in itertools.pairwise(counters))


def check_spans(machine: Machine, rank: int, thread: int, operations: list):
    """Epoch e writes this rank's half e % 2 before e + 1 is published, and reads all halves e % 2 after."""
    epoch, written = 0, []
    for operation in operations:
        if isinstance(operation, Publish):
            epoch, written = operation.value, []
        if isinstance(operation, Rows):
            for start, end in filter(lambda span: machine.has(span[0]), operation.targets()):
                assert machine.half_of(start, end) == (rank, thread, epoch % 2)
                assert all(end <= s or e <= start for s, e in written)
                written.append((start, end))
            for start, end in filter(lambda span: machine.has(span[0]), operation.origins()):
                assert machine.half_of(start, end)[1:] == (thread, (epoch - 1) % 2)


@settings(max_examples=60)
@given(
    ranks=st.integers(2, 5),
    threads=st.integers(1, 3),
    name=st.sampled_from(["one_step", "two_step", "reduce_scatter", "all_gather"]),
    codec=st.sampled_from(["bf16", "fp32", "int8g128", "int4g32:int8g128", "int3sg7", "bf16:fp32"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    cols=st.sampled_from([1, 7, 128, 300, 4096, 100_003, 1 << 18, 1 << 19]),
    values=st.sampled_from([0, 1 << 15, 1 << 19, 3 << 18, 5 << 18]),
    more=st.integers(0, 2),
)
def test_every_address_is_in_its_place(ranks, threads, name, codec, dtype, cols, values, more):
    stripes = ranks if name == "reduce_scatter" else 1
    rows = max(1, min(values // cols, 100) // stripes + more) * stripes
    codec = codec if name == "two_step" else codec.split(":")[-1]
    check_addresses(ranks, threads, Call(name=name, rows=rows, cols=cols, codec=codec, dtype=dtype))


LARGE = {"cols": 4096, "codec": "fp32"}
MISPLACED = {
    "goes beyond its half": ("min(piece, last - r)", "last - r", Call(name="one_step", rows=100, **LARGE)),
    "uses one half": ("(epoch & 1) * place[HALF]", "0 * place[HALF]", Call(name="one_step", rows=100, **LARGE)),
    "lays stripes over each other": (
        *("own + stripe * n * width", "own + stripe * width"),
        Call(name="reduce_scatter", rows=90, **LARGE),
    ),
    "leaves room before its sums": (
        *("place[STRIDE] - start * sum_width\n        run_rows(each", "place[STRIDE]\n        run_rows(each"),
        Call(name="two_step", rows=20, **LARGE),
    ),
    "delivers to the start": (
        "target = out + r * out_stride",
        "target = out",
        Call(name="one_step", rows=100, **LARGE),
    ),
    "takes rows of another piece": (
        "length + r) * x_stride",
        "length) * x_stride",
        Call(name="one_step", rows=100, **LARGE),
    ),
}


@pytest.mark.parametrize("fault", MISPLACED)
def test_planted_faults_of_addresses_are_found(fault):
    right, wrong, call = MISPLACED[fault]
    check_addresses(3, 2, call)
    with pytest.raises(AssertionError):
        check_addresses(3, 2, call, faults=[(right, wrong)])


@pytest.mark.parametrize("codec", ["fp32", "int8g128", "int4g32", "int3sg7", "nvfp4", "int2g32+spike"])
@pytest.mark.parametrize("name", ["one_step", "two_step", "reduce_scatter", "all_gather"])
def test_the_compiled_loops_write_where_the_uncompiled_do(name, codec):
    """Ranks are threads here, and every byte that no rank should write keeps its mark."""
    ranks, half_bytes, mark = 3, 1 << 14, 0xA5
    call = Call(name=name, rows=6, cols=130, codec=codec, piece=3)
    machine = Machine(ranks, half_bytes=half_bytes, word_bytes=None)
    held = np.full(machine.end - START, mark, np.uint8)
    untouched = np.ones(len(held), bool)
    header_bytes = machine.first - START
    held[:header_bytes], untouched[:header_bytes] = 0, False
    for region in machine.regions:
        # Nobody's process is watched: poll ignores descriptors below 0.
        region._polls = np.frombuffer(bytearray(struct.pack("ihh", -1, 0, 0) * ranks), np.uint8)
        region.places = [region._place(held.ctypes.data, 0)]

    def run(rank):
        ready = call.prepared(rank, ranks)
        out = torch.empty(ready.out_rows, ready.cols, dtype=call.dtype)
        x = torch.randn(ready.x_rows, ready.cols, generator=torch.Generator().manual_seed(rank)).to(call.dtype)
        for _ in range(3):
            memory.InMemory(ready, machine.memories[rank])(x, out)
        return x, out

    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(run, range(ranks)))
    if name in ("one_step", "two_step"):
        total = flashcomm.simulate.all_reduce([x for x, _ in results], codec, name)
        assert all(promises.same(total, out) for _, out in results)
    traced = Machine(ranks, half_bytes=half_bytes, word_bytes=None)
    for _ in range(3):
        traced.run(call)
    for log in traced.logs:
        for operations in log.threads.values():
            for operation in operations:
                for start, end in operation.targets() if isinstance(operation, Rows) else ():
                    if traced.has(start):
                        untouched[start - START : end - START] = False
    assert untouched.any()
    assert not (untouched & (held != mark)).any()
    assert (held[header_bytes:][~untouched[header_bytes:]] != mark).any()
