"""Ops: functions that become machine code with an address, and the numbers that they share."""

import inspect
import logging
import threading

import numpy as np
from numba import cfunc, njit, types

from flashcomm.kernels.cpu import simd

_log = logging.getLogger("flashcomm.kernels")

BF16, FP16, FP32 = 0, 1, 2
# fp32 in scratch memory, of 32 values those at even places and then those at odd places, sixteen each.
PAIRS = 3

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
inline = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
# A part that several places of an op call.
part = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@inline
def clean(v):
    """Make every NaN of sixteen fp32 the one quiet NaN."""
    bits = simd.as_words(v)
    nan = simd.splat_words(NAN)
    return simd.as_lanes(simd.words_where_less(simd.splat_words(0x7F800000), bits & MAGNITUDE, nan, bits))


@inline
def move(src, n, dst):
    """Copy n bytes."""
    full = n & ~63
    for i in range(0, full, 64):
        simd.store_octets(dst + i, simd.load_octets(src + i))
    for i in range(full, n):
        simd.store_byte(dst + i, simd.load_byte(src + i))


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
    """Call `compile(cache)` so that numba keeps the result on disk, or in this process if the disk does not serve.

    No folder may be writable; the disk may be full, or the user's share of it; what lies there may be broken.
    """
    try:
        made = compile(True)
    # Whatever it is: if it was not the disk, it is raised again.
    except Exception as error:
        made = compile(False)
        _say_once(error)
        return made
    if hasattr(made, "overloads"):
        # Compiled when it is first called.
        made._cache = _Forgiving(made._cache)
    return made


class _Forgiving:
    """The cache of a function on disk, as numba uses it; errors are a reason to compile, and to keep nothing."""

    def __init__(self, cache):
        self._cache = cache

    def __getattr__(self, name):
        return getattr(self._cache, name)

    def load_overload(self, sig, target_context):
        try:
            return self._cache.load_overload(sig, target_context)
        except Exception as error:
            return _say_once(error)

    def save_overload(self, sig, data):
        try:
            self._cache.save_overload(sig, data)
        except Exception as error:
            _say_once(error)


_said: set[str] = set()


def _say_once(error):
    if not _said:
        _said.add(str(error))
        _log.warning(
            "compiled CPU kernels cannot be kept on disk, so every process compiles them anew (two to four seconds): "
            "%s: %s. Set NUMBA_CACHE_DIR to a folder with room",
            type(error).__name__,
            error,
        )
