"""Programs of `ops`: what the compiled loop of `run` executes on every row of a message.

A program is a table of steps. A step is an op, by its address, and its operands. An operand is a number, or an offset
from one of six registers, which the loop sets for each row: see `SOURCE` and those that follow it.

Python writes a program once per codec, row length and type, and keeps it. So a format costs no compilation of its own,
and a wrapper such as Hadamard is a few steps before those of its base.

Hazard: nothing here checks its arguments; `flashcomm.kernels.verbs` does.

Source: our own.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops import BF16, FP16, FP32, Op

KINDS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}

STEP_FIELDS = 2 + 2 * simd.MAX_OPERANDS
"""int64 of a step in a table: the op's address, the number of operands, the operands' registers, their offsets."""

NUMBER, SOURCE, TARGET, SCRATCH, ADD, NEXT = range(6)
"""Registers: 0, so that the offset is the operand; the row to read; the row to write; the thread's scratch memory; the
sums so far, or 0 for the first rank, when there is nothing to add to; the next rank's row to read."""

ROOM = 256
"""Values that a scratch array has room for beyond a row."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A number, or an offset from a register."""

    register: int
    offset: int = 0

    def __add__(self, more: int) -> "Operand":
        return Operand(self.register, self.offset + more)


IN, OUT, ADDING, SUMS, NEXT_IN = (Operand(register) for register in (SOURCE, TARGET, ADD, SCRATCH, NEXT))


@dataclass(frozen=True, slots=True)
class Row:
    """A row of values.

    Args:
        at: the address of the first value.
        kind: one of `KINDS`, or `ops.PAIRS` in scratch memory.
        roomy: whether whole vectors may reach beyond the row's end.
        plus: the address of fp32 to add to what is written here; 0 for none.
        ranges: the smallest and the largest value of each group of a format, in fp32, where a step has found them.
        ahead: the address to prefetch while `ops.PAIRS` are read, half a byte per value.
    """

    at: Operand
    kind: int
    roomy: bool
    plus: Operand | int = 0
    ranges: tuple[Operand, Operand] | None = None
    ahead: Operand | int = 0


class Program:
    """Steps for one row of `cols` values. The first scratch array holds sums over ranks and outlives the program."""

    def __init__(self, cols: int):
        self.cols = cols
        self._array_bytes = 4 * (cols + ROOM)
        self._arrays = 1
        self._steps: list[tuple[Op, list[Operand]]] = []
        self.constants: list[np.ndarray] = []

    def array(self) -> Operand:
        """Reserve scratch memory for one fp32 per value, with room for whole vectors beyond it."""
        self._arrays += 1
        return Operand(SCRATCH, (self._arrays - 1) * self._array_bytes)

    def row(self) -> Row:
        """Reserve a row of fp32 in scratch memory."""
        return Row(self.array(), FP32, True)

    def constant(self, array: np.ndarray) -> int:
        """Keep an array as long as the program lives; returns its address."""
        self.constants.append(np.ascontiguousarray(array))
        return self.constants[-1].ctypes.data

    @contextmanager
    def shortened(self, by: int):
        """Let steps that are added in this block see a row that is `by` values shorter."""
        self.cols -= by
        yield
        self.cols += by

    def add(self, op: Op, *operands: "Operand | int"):
        """Append a step."""
        assert len(operands) == op.operands, (op, operands)
        self._steps.append((op, [o if isinstance(o, Operand) else Operand(NUMBER, int(o)) for o in operands]))

    def table(self) -> np.ndarray:
        """[steps, STEP_FIELDS] int64."""
        table = np.zeros((len(self._steps), STEP_FIELDS), np.int64)
        for step, (op, operands) in zip(table, self._steps, strict=True):
            step[:2] = op.address, len(operands)
            step[2 : 2 + len(operands)] = [o.register for o in operands]
            step[2 + simd.MAX_OPERANDS :][: len(operands)] = [o.offset for o in operands]
        return table

    @property
    def scratch_bytes(self) -> int:
        """Bytes of all scratch arrays."""
        return self._arrays * self._array_bytes
