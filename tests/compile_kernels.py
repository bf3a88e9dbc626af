"""Compile all CPU kernels into numba's cache: python tests/compile_kernels.py PROCESSES.

On an empty cache the ranks of a test would all compile the kernels that they need, each for itself and at once.
"""

import multiprocessing
import sys

from numba import types

from flashcomm.kernels.cpu import ops, run
from flashcomm.kernels.cpu.ops.base import Op
from flashcomm.transports import rows
from flashcomm.transports.shared import loops

_OPS = [op for op in vars(ops).values() if isinstance(op, Op)]
_LOOPS = [loops.two_step, loops.sum_stripes, loops.gather]
_TABLE, _NUMBER = types.int64[:, ::1], types.int64
_ROWS = (_TABLE, *[_NUMBER] * 4, _TABLE, _NUMBER, _NUMBER, types.uint8[::1], _NUMBER, _NUMBER)


def compile_share(number: int):
    """Compile one op, or what the ops run in."""
    if number:
        assert _OPS[number - 1].address
        return
    run.run_rows.compile(_ROWS)
    for loop in _LOOPS:
        loop.compile(loops.SIGNATURE)
    rows.load()


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(int(sys.argv[1])) as pool:
        pool.map(compile_share, range(len(_OPS) + 1), chunksize=1)
