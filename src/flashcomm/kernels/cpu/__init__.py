"""The codecs on the CPU, compiled by numba.

    ops       functions that work on one row, sixteen lanes at a time (`simd`)
    program   tables of ops and their operands
    steps     those that several formats share
    formats   each wire format as steps of a program
    run       the loop over rows, its threads, and the verbs

A later layer imports earlier ones only.
"""

from flashcomm.kernels.cpu.formats import supports
from flashcomm.kernels.cpu.ops import compiled
from flashcomm.kernels.cpu.program import KINDS, STEP_FIELDS
from flashcomm.kernels.cpu.run import (
    Run,
    decode_sum,
    decode_sum_encode,
    decoder,
    encode,
    encoder,
    pool,
    reducer,
    run_rows,
)

__all__ = [
    "KINDS", "STEP_FIELDS", "Run", "compiled", "decode_sum", "decode_sum_encode", "decoder", "encode", "encoder",
    "pool", "reducer", "run_rows", "supports",
]  # fmt: skip
