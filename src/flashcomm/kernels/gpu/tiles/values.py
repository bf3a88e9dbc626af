"""Tiles of values: rows of bf16, fp16 or fp32 to fp32 and back. Pointers are to integers as wide as the values."""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.base import bits_of, from_bits, to_bf16, within


@triton.jit
def numbers_at(ptr, F: tl.constexpr):
    """Pointer to a payload of values, a multiple of 16, as a pointer to integers as wide as the values."""
    # Through an integer, as Triton's interpreter refuses to cast a pointer to another pointer.
    if F.dtype == "fp32":
        return tl.multiple_of(ptr.to(tl.int64).to(tl.pointer_type(tl.int32)), 16)
    else:
        return tl.multiple_of(ptr.to(tl.int64).to(tl.pointer_type(tl.int16)), 16)


@triton.jit
def widen(pattern, F: tl.constexpr):
    """The patterns of values -> fp32."""
    if F.dtype == "bf16":
        return from_bits(pattern.to(tl.int32) << 16)
    elif F.dtype == "fp16":
        return pattern.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return from_bits(pattern)


@triton.jit
def narrow(x, F: tl.constexpr):
    """fp32 -> the patterns of values, rounded half to even; every NaN becomes the quiet one."""
    if F.dtype == "bf16":
        return to_bf16(x).to(tl.int16)
    elif F.dtype == "fp16":
        half = x.to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(x != x, 0x7E00, half.to(tl.int32)).to(tl.int16)
    else:
        return tl.where(x != x, 0x7FC00000, bits_of(x))


@triton.jit
def read_values(ptr, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Load [V] fp32; 0 beyond the end of the row."""
    column = start + tl.arange(0, V)
    return widen(tl.load(ptr + column, mask=within(column, cols, EDGE), other=0), F)


@triton.jit
def write_values(ptr, x, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Write x [V] fp32, rounded half to even."""
    column = start + tl.arange(0, V)
    tl.store(ptr + column, narrow(x, F), mask=within(column, cols, EDGE))
