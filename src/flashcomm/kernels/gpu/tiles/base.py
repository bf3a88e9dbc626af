"""Parts that the tiles of all formats share: a format's constants, patterns, keys and exact roundings."""

from typing import NamedTuple

import triton
import triton.language as tl


class Format(NamedTuple):
    """Constants of one format, in rows of one length class, that a kernel is compiled for.

    Shape legend of this folder: V values of a tile, G groups of a tile, S values of a group.
    """

    kind: str
    """``values``, ``cast`` (values in a payload), ``affine``, ``block`` or ``spike``."""
    group: int = 1
    """S, a power of two; may be longer than the row if the row has one group."""
    bits: int = 0
    """Bits of a code."""
    dtype: str = ""
    """Type of values or casts: bf16, fp16 or fp32."""
    symmetric: bool = False
    last: float = 0.0
    """Largest code of ``affine`` and ``spike``, as `codecs.Affine.last`."""
    exponent: int = 0
    mantissa: int = 0
    last_element: int = 0
    """Largest code; `exponent`, `mantissa` and this are those of a `codecs.elements.Element`."""
    top: float = 0.0
    """Largest element."""
    limit: float = 0.0
    """Largest magnitude that a group may have, in units of its scale."""
    scale: str = ""
    """Kind of scale, as in `codecs.scales.SCALES`."""
    place_bits: int = 0
    """Bits of a spike's place in its group."""


@triton.jit
def bits_of(x):
    """The int32 patterns of fp32 numbers."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(pattern):
    """fp32 numbers from their int32 patterns."""
    return pattern.to(tl.float32, bitcast=True)


@triton.jit
def key_of(x):
    """int32 that order like the fp32 numbers; a NaN lies beyond the infinities."""
    pattern = bits_of(x)
    return tl.where(pattern < 0, -(pattern & 0x7FFFFFFF), pattern)


@triton.jit
def from_key(key):
    """Inverse of `key_of`."""
    value = from_bits(tl.abs(key))
    return tl.where(key < 0, -value, value)


@triton.jit
def round_even(x):
    """fp32 of at most 2**22 -> int32, half to even: the sum with 1.5 * 2**23 has no room for a fraction.

    A code needs only the lowest bits of the sum's pattern, so it may skip the subtraction.
    """
    return bits_of(x + 12582912.0) - 0x4B400000


@triton.jit
def _less(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _more(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smallest(x):
    """[G, S] -> [G]; NaN where there is one."""
    return tl.reduce(x, 1, _less)


@triton.jit
def largest(x):
    """[G, S] -> [G]; NaN where there is one."""
    return tl.reduce(x, 1, _more)


@triton.jit
def is_finite(x):
    """Whether each fp32 number is neither NaN nor infinite."""
    return (bits_of(x) & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def within(place, end, EDGE: tl.constexpr):
    """place < end; always true where tiles end with the row (`EDGE` is "none")."""
    if EDGE == "none":
        return tl.full(place.shape, True, tl.int1)
    else:
        return place < end


@triton.jit
def to_bf16(x):
    """fp32 -> the patterns of bf16, half to even, in int32; every NaN becomes 0x7fc0."""
    pattern = bits_of(x)
    pattern = (pattern + 0x7FFF + ((pattern >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, pattern & 0xFFFF)


@triton.jit
def up_to_bf16(x, away_from_zero):
    """fp32 -> the patterns of bf16 in int32, rounded away from zero where the mask says so, else toward zero."""
    return ((bits_of(x) + tl.where(away_from_zero, 0xFFFF, 0)) >> 16) & 0xFFFF


@triton.jit
def load_number(ptr, mask, WIDTH: tl.constexpr):
    """Load `WIDTH` bytes at each address as int32, low byte first; payloads are not aligned."""
    number = tl.load(ptr, mask=mask, other=0).to(tl.int32)
    for i in tl.static_range(1, WIDTH):
        number |= tl.load(ptr + i, mask=mask, other=0).to(tl.int32) << (8 * i)
    return number


@triton.jit
def store_number(ptr, number, mask, WIDTH: tl.constexpr):
    """Inverse of `load_number`."""
    for i in tl.static_range(WIDTH):
        tl.store(ptr + i, ((number >> (8 * i)) & 0xFF).to(tl.uint8), mask=mask)
