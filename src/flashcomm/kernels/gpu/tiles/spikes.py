"""Tiles of `codecs.spike`. Places are packed like codes, two per group, so a tile has at least 64 groups."""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.base import (
    bits_of,
    from_bits,
    from_key,
    key_of,
    load_number,
    round_even,
    store_number,
    to_bf16,
    within,
)
from flashcomm.kernels.gpu.tiles.planes import code_bytes, load_codes, store_codes

_HIGH_HALF = tl.constexpr(-0x10000)
_SMALLEST = tl.constexpr(-0x80000000)
_LARGEST = tl.constexpr(0x7FFFFFFF)
_TOO_LARGE = tl.constexpr(0x7EA00000)  # 1.25 * 2**126
_NAN = tl.constexpr(0x7FC00000)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def _lowest_binade(low, high):
    """The exponent field at which the scales' bytes start."""
    return tl.maximum((bits_of(tl.maximum(tl.abs(low), tl.abs(high))) >> 23) - 30, 1)


@triton.jit
def _anchor(low, high):
    return tl.where(low > 0, low, tl.where(high < 0, high, 0.0))


@triton.jit
def _scale_and_zero(low, high, scale_code, centre_code, F: tl.constexpr):
    scale = from_bits((8 * _lowest_binade(low, high) + scale_code - 1) << 20)
    scale = tl.where(scale_code > 0, scale, 0.0)
    if F.symmetric:
        return scale, -(F.last / 2) * scale
    else:
        centre = _anchor(low, high) + (centre_code - 128).to(tl.float32) * (scale * 2.0 ** (F.bits - 6))
        return scale, centre - F.last / 2 * scale


@triton.jit
def _sections(ptr, cols, F: tl.constexpr):
    """Addresses of the spikes, scales, centres and places of a row, and its number of groups."""
    count = (cols + F.group - 1) // F.group
    spikes = ptr + code_bytes(cols, F.bits)
    scales = spikes + 4 * count
    centres = scales + count
    places = centres if F.symmetric else centres + count
    return spikes, scales, centres, places, count


@triton.jit
def write_spike(ptr, x, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Encode x [V] fp32, the columns from `start` on of a row of `cols`, into the row's payload at `ptr`."""
    G: tl.constexpr = V // F.group
    x = tl.reshape(x, [G, F.group])
    index = tl.arange(0, F.group)[None, :]
    inside = within(start + tl.arange(0, G)[:, None] * F.group + index, cols, EDGE)
    key = key_of(x)
    # The lower half of a key is the place, so that of equal values the first one wins.
    down = tl.where(inside, (key & _HIGH_HALF) | index, _LARGEST)
    up = tl.where(inside, ((tl.minimum(key, 0x7FFF0000) + 0xFFFF) & _HIGH_HALF) | (0xFFFF - index), _SMALLEST)
    low_place = tl.min(down, axis=1) & 0xFFFF
    high_place = 0xFFFF - (tl.max(up, axis=1) & 0xFFFF)
    at_low, at_high = index == low_place[:, None], index == high_place[:, None]
    a_key = tl.min(tl.where(at_low | at_high, _LARGEST, down), axis=1)
    b_key = tl.max(tl.where(at_low | at_high, _SMALLEST, up), axis=1)
    alone = a_key == _LARGEST
    bad = tl.max(tl.where(inside, bits_of(x) & 0x7FFFFFFF, 0), axis=1) > _TOO_LARGE
    gone = alone | bad
    a = from_key(tl.where(gone, 0, a_key & _HIGH_HALF))
    b = from_key(tl.where(gone, 0, b_key & _HIGH_HALF))
    low_bits = tl.where(bad, 0, to_bf16(from_bits(tl.sum(tl.where(at_low, bits_of(x), 0), axis=1))))
    high_bits = tl.where(bad, 0, to_bf16(from_bits(tl.sum(tl.where(at_high, bits_of(x), 0), axis=1))))
    low, high = from_bits(low_bits << 16), from_bits(high_bits << 16)
    if F.symmetric:
        levels = tl.full(a.shape, F.last + 1, tl.float32)
        needed = tl.div_rn(2 * tl.maximum(tl.abs(a), tl.abs(b)), levels)
        middle = a
    else:
        middle = a * 0.5 + b * 0.5 - _anchor(low, high)
        span = tl.div_rn(b - a, tl.full(a.shape, 63 * 2.0 ** (F.bits - 6), tl.float32))
        needed = tl.maximum(span, tl.div_rn(tl.abs(middle), tl.full(a.shape, 127 * 2.0 ** (F.bits - 6), tl.float32)))
    needed = tl.where(gone, 0.0, needed)
    binade = 8 * _lowest_binade(low, high)
    eighths = ((bits_of(tl.maximum(needed, _TINY)) + 0xFFFFF) >> 20) - binade
    scale_code = tl.where(needed > 0, tl.maximum(eighths, 0) + 1, 0)
    if F.symmetric:
        centre_code = scale_code
    else:
        unit = from_bits((binade + scale_code - 1) << 20) * 2.0 ** (F.bits - 6)
        centre = round_even(tl.minimum(tl.maximum(tl.div_rn(middle, unit), -127.0), 127.0))
        centre_code = tl.where(scale_code > 0, centre + 128, 128)
    scale, zero = _scale_and_zero(low, high, scale_code, centre_code, F)
    inverse = tl.where(scale > 0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), 0.0)
    codes = (x - zero[:, None]) * inverse[:, None]
    codes = tl.where(bad[:, None], 0, round_even(tl.minimum(tl.maximum(codes, 0.0), F.last)))
    store_codes(ptr, tl.reshape(codes, [V]), start, cols, F.bits, V, EDGE)

    spikes, scales, centres, places, count = _sections(ptr, cols, F)
    ordinal = start // F.group + tl.arange(0, G)
    used = within(ordinal, count, EDGE)
    store_number(spikes + 4 * ordinal, tl.where(bad, _NAN >> 16, low_bits), used, 2)
    store_number(spikes + 4 * ordinal + 2, high_bits, used, 2)
    tl.store(scales + ordinal, scale_code.to(tl.uint8), mask=used)
    if not F.symmetric:
        tl.store(centres + ordinal, centre_code.to(tl.uint8), mask=used)
    both = tl.reshape(tl.join(tl.where(bad, 0, low_place), tl.where(bad, 0, high_place)), [2 * G])
    store_codes(places, both, start // F.group * 2, 2 * count, F.place_bits, 2 * G, "codes")


@triton.jit
def read_spike(ptr, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Inverse of `write_spike`: [V] fp32."""
    G: tl.constexpr = V // F.group
    spikes, scales, centres, places, count = _sections(ptr, cols, F)
    ordinal = start // F.group + tl.arange(0, G)
    used = within(ordinal, count, EDGE)
    low = from_bits(load_number(spikes + 4 * ordinal, used, 2) << 16)
    high = from_bits(load_number(spikes + 4 * ordinal + 2, used, 2) << 16)
    scale_code = tl.load(scales + ordinal, mask=used, other=0).to(tl.int32)
    if F.symmetric:
        centre_code = scale_code
    else:
        centre_code = tl.load(centres + ordinal, mask=used, other=0).to(tl.int32)
    scale, zero = _scale_and_zero(low, high, scale_code, centre_code, F)
    bad = low != low
    zero = tl.where(bad, low, zero)
    codes = tl.reshape(load_codes(ptr, start, cols, F.bits, V, EDGE), [G, F.group]).to(tl.float32)
    x = codes * scale[:, None] + zero[:, None]
    both = load_codes(places, start // F.group * 2, 2 * count, F.place_bits, 2 * G, "codes")
    low_place, high_place = tl.split(tl.reshape(both, [G, 2]))
    # A place beyond the row can only come from a broken payload.
    last = tl.minimum(cols - 1 - ordinal * F.group, F.group - 1)
    index = tl.arange(0, F.group)[None, :]
    x = tl.where(index == tl.minimum(low_place, last)[:, None], low[:, None], x)
    # A group of one value has two equal spikes at one place, so either may be written last.
    x = tl.where(index == tl.minimum(high_place, last)[:, None], tl.where(bad, low, high)[:, None], x)
    return tl.reshape(x, [V])
