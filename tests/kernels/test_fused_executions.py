"""The protocol of `symmetric/exchange.py`, checked on its own functions in every execution of a small world.

The kernels run as Python with stand-ins for what touches memory: flags become counters, payloads words, and
`interleavings` explores in which orders they may be seen. The stream is part of the world: the programs of a launch
begin when those of the rank's launch before have ended. Each planted fault replaces a line wherever it stands,
and must be found.

Not modelled: the threads of a program, which barriers hold together, and a flag that never comes.
"""

import dataclasses
import functools
import inspect
import itertools
import types

import pytest

pytest.importorskip("triton")

import interleavings
from flashcomm.transports.symmetric import exchange
from interleavings import Deliver, Made, Publish, Read, Wait, Write, parts
from thorough import thorough

LOST, BUFFERS, EPOCHS, X, OUT = 0, 1 << 8, 1 << 12, 1 << 20, 1 << 30
"""Where pointers of a rank pretend to point."""
MEMORY, SPACING = 1 << 40, 1 << 20
"""Where the ranks' memory pretends to be, and how far apart."""
HALF_BYTES, WIDTH = 1 << 10, 16
ENDED = 1 << 60
"""Counters of launches that have ended."""


class Number(int):
    """An integer of Triton: what is made of it is one, too."""

    def to(self, dtype):
        return self


for _name in ("add", "sub", "mul", "mod", "and", "floordiv", "radd", "rmul"):
    setattr(
        Number,
        f"__{_name}__",
        lambda self, other, operator=getattr(int, f"__{_name}__"): Number(operator(self, int(other))),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """An all-reduce of x[rows, 1]."""

    name: str
    rows: int


class Program:
    """One program of one rank, which notes what it does."""

    def __init__(self, rank: int, ranks: int, block: int, blocks: int, faults=()):
        self.rank, self.ranks, self.block, self.blocks = rank, ranks, block, blocks
        self.operations: list = []
        self.delivered: list[int] = []
        self._expected: dict[int, list] = {}
        self._epoch = 0
        self._module = self._uncompiled(faults)

    def run(self, call: Call, place: int, in_order: bool):
        """Launch number `place`, after all programs of the one before if `in_order`."""
        if in_order and place:
            self.operations += [Wait(self._ended(block), place, True) for block in range(self.blocks)]
        offset = place << 10
        self._expected = {OUT + offset + row: self._result(call, offset, row) for row in range(call.rows)}
        widths = [WIDTH] if call.name == "one_step" else [WIDTH, WIDTH]
        pointers = map(Number, (X + offset, OUT + offset, BUFFERS, EPOCHS, LOST))
        numbers = map(Number, (1, self.rank, call.rows, 1, HALF_BYTES, *widths))
        constants = dict.fromkeys(("VALUES", "FIRST", "SECOND", "V", "EDGE", "WORDS", "PTX"))
        getattr(self._module, call.name)(*pointers, *numbers, R=self.ranks, **constants)
        self.operations.append(Publish(self._ended(self.block), place + 1, True))

    def _ended(self, block):
        return ENDED + self.rank * self.blocks + block

    def _result(self, call, offset, row):
        """The payloads that must have been read when a row of the result is written."""
        owner = row // -(-call.rows // self.ranks)
        reader = self.rank if call.name == "one_step" else owner
        payloads = []
        for peer in range(self.ranks):
            payload = parts(("x", peer, X + offset + row), 1)
            payloads += payload if peer == reader else parts(Made(payload), 1)
        if call.name == "one_step":
            return payloads
        total = parts(Made(payloads), 1)
        return total if owner == self.rank else parts(Made(total), 1)

    def _uncompiled(self, faults):
        source = inspect.getsource(exchange)
        for right, wrong in faults:
            assert right in source, f"the fault no longer fits: {right}"
            source = source.replace(right, wrong)
        module = types.ModuleType("uncompiled")
        exec(_compile(source), module.__dict__)
        module.tl = self._language()
        numbers = range(self.ranks)
        module.range = lambda *ends: map(Number, range(*ends))
        module.wait, module.signal = self._wait, self._signal
        module._copy = self._copy
        module.read_values = lambda ptr, *_: ("x", self.rank, int(ptr))
        module._encode = self._encode
        module.read_sum = lambda ptr, stride, *_: self._read(ptr + rank * stride for rank in numbers)
        module.read = lambda ptr, *_: self._read([ptr])
        module.write_values = self._deliver
        return module

    def _language(self):
        return types.SimpleNamespace(
            program_id=lambda axis: Number(self.block),
            num_programs=lambda axis: Number(self.blocks),
            load=self._load,
            # No launch of a rank overlaps another here.
            atomic_xchg=lambda ptr, value: Number(0),
            store=self._store,
            debug_barrier=lambda: None,
            multiple_of=lambda ptr, n: ptr,
            cdiv=lambda a, b: Number(-(-a // b)),
            full=lambda shape, value, dtype: Number(value),
            where=lambda condition, yes, no: yes if condition else no,
            minimum=min,
            pointer_type=lambda element: None,
            uint8=None,
            int32=None,
            int64=None,
        )

    def _load(self, ptr):
        if ptr == LOST:
            return Number(0)
        return Number(self._epoch if ptr >= EPOCHS else MEMORY + (ptr - BUFFERS) * SPACING)

    def _store(self, ptr, value):
        assert ptr == EPOCHS + self.block, "only this program's epoch"
        self._epoch = int(value)

    def _wait(self, flag, epoch, patience, ptx):
        self.operations.append(Wait(int(flag), int(epoch), True))
        return True

    def _signal(self, flag, epoch, ptx):
        self.operations.append(Publish(int(flag), int(epoch), True))

    def _copy(self, target, source, width, words):
        self.operations += [Read(int(source)), Write(int(target), 0), Deliver(None)]

    def _encode(self, ptr, x, *_):
        # A sum is made of what was read, and then forgotten.
        self.operations += [Write(int(ptr), 0, x), Deliver(None)]

    def _read(self, addresses):
        self.operations += [Read(int(address)) for address in addresses]

    def _deliver(self, ptr, *_):
        self.delivered.append(int(ptr))
        self.operations.append(Deliver(tuple(self._expected[int(ptr)])))


@functools.cache
def _compile(source):
    # Without the decorators the kernels are functions of Python.
    lines = [line for line in source.splitlines() if not line.startswith("@triton.jit")]
    return compile("\n".join(lines), exchange.__file__, "exec")


def programs_that(ranks: int, blocks: int, calls, faults=(), in_order=True) -> list[list]:
    """Operations of every program for these calls, one launch after the other."""
    made = [
        Program(rank, ranks, block, blocks, faults) for rank, block in itertools.product(range(ranks), range(blocks))
    ]
    for place, call in enumerate(calls):
        for program in made:
            program.run(call, place, in_order)
    for rank in range(ranks):
        rows = sorted(row for program in made if program.rank == rank for row in program.delivered)
        assert rows == [OUT + (place << 10) + row for place, call in enumerate(calls) for row in range(call.rows)]
    return [program.operations for program in made]


def one_step(rows):
    return Call(name="one_step", rows=rows)


def two_step(rows):
    return Call(name="two_step", rows=rows)


SIZES = [one_step(2), one_step(1), one_step(1)]
"""The third puts a payload where the other program read one of the first."""

# (ranks, programs, calls)
WORLDS = {
    "one_step": (2, 1, [one_step(1)] * 4),
    "one_step, three ranks": (3, 1, [one_step(1)] * 3),
    "two_step": (2, 1, [two_step(2)] * 4),
    "two_step, two rows of a stripe": (2, 1, [two_step(4)] * 3),
    "two_step, no row for one rank": (2, 1, [two_step(1)] * 4),
    "two_step, three ranks": (3, 1, [two_step(3)] * 2),
    "one after the other": (2, 1, [two_step(2), one_step(1), two_step(1), one_step(2)]),
    "of different sizes, two programs": (2, 2, SIZES),
}
LARGE = {"one_step, three ranks", "of different sizes, two programs"}
"""Worlds with so many states that exploring them takes half a minute."""


@pytest.mark.parametrize("world", [thorough(name) if name in LARGE else name for name in WORLDS])
def test_no_race_no_wrong_result_and_no_deadlock_in_any_execution(world):
    ranks, blocks, calls = WORLDS[world]
    found = interleavings.explore(programs_that(ranks, blocks, calls))
    assert found.wrong == {}
    assert found.states > 100


AWAIT = "patience = _await(buffers_ptr, rank, {}, peer, epoch, patience, lost_ptr, R, PTX)"

# What is planted: (the line, what stands there instead, ranks, programs, calls, what must be found).
FAULTS = {
    "does not wait for payloads": (AWAIT.format(0), "pass", 2, 1, [one_step(1)], {"race", "value"}),
    "does not wait for the sums": (AWAIT.format(1), "pass", 2, 1, [two_step(2)], {"race", "value"}),
    "signals the sums an epoch late": (
        *("_flag(buffers_ptr, peer, 1, rank, R), epoch,", "_flag(buffers_ptr, peer, 1, rank, R), epoch - 1,"),
        *(2, 1, [two_step(2)], {"deadlock"}),
    ),
    "signals an epoch more": (
        *("_flag(buffers_ptr, peer, 0, rank, R), epoch,", "_flag(buffers_ptr, peer, 0, rank, R), epoch + 1,"),
        *(2, 1, [one_step(1)] * 2, {"race", "value"}),
    ),
    "has one flag for both steps": ("(step * R + source)", "source", 2, 1, [two_step(2)], {"race", "value"}),
    "has one half": ("(epoch & 1)", "(epoch & 0)", 2, 1, [one_step(1)] * 2, {"race", "value"}),
    "does not count": (
        "tl.store(epochs_ptr + tl.program_id(0), epoch)",
        "pass",
        2,
        1,
        [one_step(1)] * 2,
        {"race", "value"},
    ),
    "sends to where it wrote": (
        *("theirs = _place(buffers_ptr, peer, start + rank * of_rank)", "theirs = mine"),
        *(2, 1, [one_step(1)], {"value"}),
    ),
    "receives where it stages": ("stage + R * of_rank, stage", "stage, stage", 2, 1, [two_step(2)], {"race", "value"}),
    "waits for the next rank only": (
        *("peer = (rank + i) % R\n        patience", "peer = (rank + 1) % R\n        patience"),
        *(3, 1, [one_step(1)], {"race", "value"}),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    right, wrong, ranks, blocks, calls, kinds = FAULTS[fault]
    found = interleavings.explore(programs_that(ranks, blocks, calls, faults=[(right, wrong)]))
    assert set(found.wrong) == kinds


def test_what_the_order_of_a_stream_is_for():
    assert interleavings.explore(programs_that(2, 2, SIZES, in_order=False), until={"race"}).wrong
