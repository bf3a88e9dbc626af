"""Tiles of `codecs.blocks`: small floats, and the four kinds of scales.

Two kinds of scales share something over a row; their writer needs the row's largest magnitude, which
`largest_magnitude` finds tile by tile.
"""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.base import bits_of, from_bits, load_number, store_number, within
from flashcomm.kernels.gpu.tiles.planes import code_bytes, load_codes, store_codes

_TOO_LARGE = tl.constexpr(0x7F000000)
_NAN = tl.constexpr(0x7FC00000)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def encode_element(
    x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, LAST: tl.constexpr, TOP: tl.constexpr, UP: tl.constexpr
):
    """fp32 -> int32 codes of an element without their sign, rounded half to even or `UP`, at most the largest."""
    LOWEST: tl.constexpr = 2 - 2 ** (EXPONENT - 1) + 127
    BINADES: tl.constexpr = (LAST >> MANTISSA) if (LAST >> MANTISSA) > 1 else 1
    x = tl.minimum(tl.abs(x), 2 * TOP)
    exponent = tl.minimum(tl.maximum(bits_of(x) >> 23, LOWEST), LOWEST + BINADES - 1)
    if UP:
        count = tl.ceil(x * from_bits((254 + MANTISSA - exponent) << 23)).to(tl.int32)
    else:
        # The last place of `magic` is worth one spacing of the element, so a sum with it is rounded to that spacing.
        magic = ((exponent - MANTISSA + 23) << 23) | 0x400000
        count = bits_of(x + from_bits(magic)) - magic
    return tl.minimum(((exponent - LOWEST) << MANTISSA) + count, LAST)


@triton.jit
def decode_element(code, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """int32 codes -> fp32: placed as the fields of an fp32 number, then multiplied by a power of two for the bias."""
    magnitude = (code & ((1 << (EXPONENT + MANTISSA)) - 1)) << (23 - MANTISSA)
    value = from_bits(magnitude) * 2.0 ** (128 - 2 ** (EXPONENT - 1))
    return from_bits(bits_of(value) | ((code >> (EXPONENT + MANTISSA)) << 31))


@triton.jit
def _magnitudes(x, inside):
    """[G, S] -> [G]: the pattern of each group's largest magnitude, 0 if it is too large, and whether it is."""
    largest = tl.max(tl.where(inside, bits_of(x) & 0x7FFFFFFF, 0), axis=1)
    bad = largest >= _TOO_LARGE
    return tl.where(bad, 0, largest), bad


@triton.jit
def largest_magnitude(x, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """x [V] -> the pattern of the largest magnitude of all groups, less those that are too large."""
    G: tl.constexpr = V // F.group
    column = start + tl.arange(0, G)[:, None] * F.group + tl.arange(0, F.group)[None, :]
    largest, _ = _magnitudes(tl.reshape(x, [G, F.group]), within(column, cols, EDGE))
    return tl.max(largest, axis=0)


@triton.jit
def _exponents(magnitude, F: tl.constexpr):
    """Patterns of magnitudes -> the e8m0 codes of their scales."""
    limit = bits_of(tl.full(magnitude.shape, F.limit, tl.float32))
    return tl.maximum(((magnitude - limit + 0x7FFFFF) >> 23) + 127, 1)


@triton.jit
def write_block(ptr, x, start, cols, largest, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Encode x [V] fp32, the columns from `start` on of a row of `cols`, into the row's payload at `ptr`.

    `largest` is the largest result of `largest_magnitude` over the row, for scales that share something over it.
    """
    G: tl.constexpr = V // F.group
    x = tl.reshape(x, [G, F.group])
    column = start + tl.arange(0, G)[:, None] * F.group + tl.arange(0, F.group)[None, :]
    magnitude, bad = _magnitudes(x, within(column, cols, EDGE))
    ordinal = start // F.group + tl.arange(0, G)
    count = (cols + F.group - 1) // F.group
    used = within(ordinal, count, EDGE)
    meta = ptr + code_bytes(cols, F.bits)
    if F.scale == "e8m0":
        code = tl.where(bad, 255, _exponents(magnitude, F))
        tl.store(meta + ordinal, code.to(tl.uint8), mask=used)
        scale = from_bits(code << 23)
    elif F.scale == "fp32":
        limit = tl.full(magnitude.shape, F.limit, tl.float32)
        scale = tl.maximum(tl.div_rn(from_bits(magnitude), limit), _TINY)
        store_number(meta + ordinal * 4, tl.where(bad, _NAN, bits_of(scale)), used, 4)
    elif F.scale == "e5m0":
        top = _exponents(largest, F)
        below = tl.minimum(top - _exponents(magnitude, F), 30)
        store_codes(meta, tl.where(bad, 31, below), start // F.group, count, 5, G, "codes")
        tl.store(meta + code_bytes(count, 5), top.to(tl.uint8))
        scale = from_bits(tl.maximum(top - below, 1) << 23)
    else:
        row_limit: tl.constexpr = F.limit * 448.0
        row = tl.maximum(tl.div_rn(from_bits(largest), row_limit), 2.0**-117)
        limit = tl.full(magnitude.shape, F.limit, tl.float32)
        ratio = tl.div_rn(tl.div_rn(from_bits(magnitude), limit), row + tl.zeros(magnitude.shape, tl.float32))
        code = tl.maximum(encode_element(ratio, 4, 3, 0x7E, 448.0, True), 1)
        tl.store(meta + ordinal, tl.where(bad, 127, code).to(tl.uint8), mask=used)
        store_number(meta + count, bits_of(row), True, 4)
        scale = decode_element(code, 4, 3) * row
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    x = tl.where(bad[:, None], 0.0, x * inverse[:, None])
    code = encode_element(x, F.exponent, F.mantissa, F.last_element, F.top, False)
    code |= ((bits_of(x) >> 31) & 1) << (F.bits - 1)
    store_codes(ptr, tl.reshape(code, [V]), start, cols, F.bits, V, EDGE)


@triton.jit
def read_block(ptr, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Inverse of `write_block`: [V] fp32."""
    G: tl.constexpr = V // F.group
    value = decode_element(load_codes(ptr, start, cols, F.bits, V, EDGE), F.exponent, F.mantissa)
    ordinal = start // F.group + tl.arange(0, G)
    count = (cols + F.group - 1) // F.group
    used = within(ordinal, count, EDGE)
    meta = ptr + code_bytes(cols, F.bits)
    if F.scale == "e8m0":
        code = tl.load(meta + ordinal, mask=used, other=1).to(tl.int32)
        scale = from_bits(tl.where(code == 255, _NAN, code << 23))
    elif F.scale == "fp32":
        scale = from_bits(load_number(meta + ordinal * 4, used, 4))
    elif F.scale == "e5m0":
        below = load_codes(meta, start // F.group, count, 5, G, "codes")
        top = tl.load(meta + code_bytes(count, 5)).to(tl.int32)
        scale = from_bits(tl.where(below == 31, _NAN, tl.maximum(top - below, 1) << 23))
    else:
        code = tl.load(meta + ordinal, mask=used, other=1).to(tl.int32)
        row = from_bits(load_number(meta + count, True, 4))
        scale = tl.where(code == 127, float("nan"), decode_element(code, 4, 3) * row)
    return tl.reshape(tl.reshape(value, [G, F.group]) * scale[:, None], [V])
