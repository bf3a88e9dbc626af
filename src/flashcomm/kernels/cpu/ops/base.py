"""Ops: functions that become machine code with an address, and the numbers that they share."""

import inspect
import threading

import numpy as np
from numba import cfunc, njit, types

from flashcomm.kernels.cpu import simd

BF16, FP16, FP32 = 0, 1, 2

f32 = np.float32

# Adding 1.5 * 2^23 to a small non-negative fp32 rounds it half to even and leaves the integer in its lowest bits.
ROUND = f32(12582912.0)
TINY = f32(2.0**-126)
MAGNITUDE, NAN = 0x7FFFFFFF, 0x7FC00000
# How far ahead the input is fetched. The hardware stops at 4 KiB pages, and waiting there costs a third of the time;
# anything from 1 to 4 KiB measured the same.
AHEAD = 2048

_compiling = threading.Lock()
# A part of an op, compiled into it.
inline = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True)


@inline
def clean(v):
    """Make every NaN of sixteen fp32 the one quiet NaN."""
    bits = simd.as_words(v)
    nan = simd.splat_words(NAN)
    return simd.as_lanes(simd.words_where_less(simd.splat_words(0x7F800000), bits & MAGNITUDE, nan, bits))


class Op:
    """A function of int64 operands that becomes machine code when its address is first asked for."""

    def __init__(self, function):
        self._function = function
        self.operands = len(inspect.signature(function).parameters)
        self._compiled = None

    @property
    def address(self) -> int:
        """Address of the machine code."""
        with _compiling:
            if self._compiled is None:
                self._compiled = compiled(
                    lambda cache: cfunc(self._signature(), error_model="numpy", cache=cache)(self._function)
                )
        return self._compiled.address

    def _signature(self):
        return types.void(*[types.int64] * self.operands)


def compiled(compile):
    """Call `compile(cache)` so that numba keeps the result on disk, or in this process if no folder is writable."""
    try:
        return compile(True)
    except RuntimeError:
        return compile(False)
