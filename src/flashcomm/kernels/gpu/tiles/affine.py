"""Tiles of `codecs.affine`."""

import triton
import triton.language as tl

from flashcomm.kernels.gpu.tiles.base import (
    bits_of,
    from_bits,
    is_finite,
    largest,
    load_number,
    smallest,
    store_number,
    up_to_bf16,
    within,
)
from flashcomm.kernels.gpu.tiles.planes import code_bytes, load_codes, store_codes

_TINY = tl.constexpr(2.0**-126)


@triton.jit
def quantise_affine(x, inside, F: tl.constexpr):
    """[G, S] fp32, of which some are `inside` the row -> codes [G, S], bf16 patterns of scales and zero points [G]."""
    low = smallest(tl.where(inside, x, float("inf")))
    high = largest(tl.where(inside, x, float("-inf")))
    if F.symmetric:
        STEPS: tl.constexpr = F.last / 2
        span = tl.maximum(-low, high)
    else:
        STEPS: tl.constexpr = F.last
        zero = from_bits(up_to_bf16(low, low < 0) << 16) + 0.0
        span = high - zero
    scale = tl.maximum(tl.div_rn(span, tl.full(span.shape, STEPS, tl.float32)), _TINY)
    scale = from_bits(tl.where(span > 0, up_to_bf16(scale, scale > 0), 0) << 16)
    if F.symmetric:
        zero = -STEPS * scale
    top = F.last * scale
    finite = is_finite(low) & is_finite(high) & is_finite(top) & is_finite(top + zero) & is_finite(zero)
    inverse = tl.where(scale > 0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), 0.0)
    # Rounds as `round_even` does; codes of a group that is not finite become 0.
    codes = bits_of((x - zero[:, None]) * inverse[:, None] + 12582912.0) & tl.where(finite, 0xFF, 0)[:, None]
    scale_bits = tl.where(finite, up_to_bf16(scale, scale != scale), 0x7FC0)
    zero_bits = tl.where(finite, up_to_bf16(zero, zero != zero), 0x7FC0)
    return codes, scale_bits, zero_bits


@triton.jit
def write_affine(ptr, x, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Encode x [V] fp32, the columns from `start` on of a row of `cols`, into the row's payload at `ptr`."""
    G: tl.constexpr = V // F.group
    x = tl.reshape(x, [G, F.group])
    column = start + tl.arange(0, G)[:, None] * F.group + tl.arange(0, F.group)[None, :]
    codes, scale, zero = quantise_affine(x, within(column, cols, EDGE), F)
    store_codes(ptr, tl.reshape(codes, [V]), start, cols, F.bits, V, EDGE)
    first = start + tl.arange(0, G) * F.group
    used = within(first, cols, EDGE)
    meta = ptr + code_bytes(cols, F.bits) + first // F.group * (2 if F.symmetric else 4)
    store_number(meta, scale, used, 2)
    if not F.symmetric:
        store_number(meta + 2, zero, used, 2)


@triton.jit
def read_affine(ptr, start, cols, F: tl.constexpr, V: tl.constexpr, EDGE: tl.constexpr):
    """Inverse of `write_affine`: [V] fp32."""
    G: tl.constexpr = V // F.group
    codes = tl.reshape(load_codes(ptr, start, cols, F.bits, V, EDGE), [G, F.group]).to(tl.float32)
    first = start + tl.arange(0, G) * F.group
    used = within(first, cols, EDGE)
    meta = ptr + code_bytes(cols, F.bits) + first // F.group * (2 if F.symmetric else 4)
    scale = from_bits(load_number(meta, used, 2) << 16)
    if F.symmetric:
        zero = -(F.last / 2) * scale
    else:
        zero = from_bits(load_number(meta + 2, used, 2) << 16)
    return tl.reshape(codes * scale[:, None] + zero[:, None], [V])
