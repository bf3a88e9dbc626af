"""Integer codes: `codecs.affine`."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, MAGNITUDE, NAN, ROUND, TINY, Op, clean, f32, inline


@Op
def affine_scales(low, high, count, symmetric, last_bits, zero, inverse, flag, meta):
    """Ranges -> zero points, reciprocals of the scales, and the bytes of zero points and scales.

    The reciprocal is NaN for a group that decodes to NaN.
    """
    last = simd.from_bits(last_bits)
    nothing, one, tiny = simd.splat(f32(0)), simd.splat(f32(1)), simd.splat(TINY)
    none, nan = simd.splat_words(0), simd.splat_words(NAN)
    steps = simd.splat(last * f32(0.5)) if symmetric else simd.splat(last)
    all_bad = none
    for j in range(0, count, 16):
        least = simd.load_fp32(low + j * 4)
        most = simd.load_fp32(high + j * 4)
        if symmetric:
            zeros = nothing
            span = simd.lane_max(nothing - least, most)
        else:
            # Round down to bf16; + 0 turns -0 into +0, so that the order of equal values leaves no trace in the bytes.
            up = simd.where_less_words(least, nothing, simd.splat_words(0xFFFF), none)
            zeros = simd.as_lanes((simd.as_words(least) + up) & 0xFFFF0000) + nothing
            span = most - zeros
        scale_bits = (simd.as_words(simd.lane_max(span / steps, tiny)) + 0xFFFF) & 0xFFFF0000
        scale_bits = simd.where_less_words(nothing, span, scale_bits, none)
        scale = simd.as_lanes(scale_bits)
        if symmetric:
            zeros = (nothing - steps) * scale
        top = scale * last
        # v * 0 is 0 for a finite v alone.
        wrong = least * nothing + most * nothing + top * nothing + (top + zeros) * nothing + zeros * nothing
        bad = simd.words_where_equal(simd.as_words(wrong) & MAGNITUDE, none, none, nan)
        all_bad = all_bad | bad
        recip = simd.words_where_equal(scale_bits, none, none, simd.as_words(one / scale))
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, recip))
        scale_bits = simd.words_where_equal(bad, nan, nan, scale_bits)
        zero_bits = simd.words_where_equal(bad, nan, nan, simd.as_words(zeros))
        simd.store_words(zero + j * 4, zero_bits)
        if symmetric:
            simd.store_words_u16(meta + j * 2, scale_bits >> 16)
        else:
            simd.store_words(meta + j * 4, scale_bits >> 16 | zero_bits & 0xFFFF0000)
    simd.store_word(flag, simd.words_max(all_bad))


@Op
def affine_meta(meta, count, symmetric, last_bits, zero, scale):
    """The bytes of `affine_scales` -> scales and zero points."""
    minus_half = simd.splat(simd.from_bits(last_bits) * f32(-0.5))
    for j in range(0, count, 16):
        if symmetric:
            scales = simd.as_lanes(simd.load_words_u16(meta + j * 2) << 16)
            zeros = scales * minus_half
        else:
            both = simd.load_words(meta + j * 4)
            scales, zeros = simd.as_lanes(both << 16), simd.as_lanes(both & 0xFFFF0000)
        simd.store_fp32(scale + j * 4, scales)
        simd.store_fp32(zero + j * 4, zeros)


@inline
def _quantise(x, zeros, inverses, highest, limited):
    """Sixteen codes, each in the lowest byte of its lane; the next byte is 0."""
    v = (x - zeros) * inverses + simd.splat(ROUND)
    if limited:
        v = simd.lane_max(simd.lane_min(v, highest), simd.splat(ROUND))
    return simd.as_words(v)


@Op
def quantise(src, kind, n, unit, zero, inverse, limit_bits, codes):
    """round((x - zero) * inverse), one byte each, clamped to 0 and the limit unless the limit is 0."""
    highest, limited = simd.splat(ROUND + simd.from_bits(limit_bits)), limit_bits != 0
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(src + n * 2 + i * 2)
            if unit == 32:
                zeros = simd.splat(simd.load1_fp32(zero + i // 8))
                inverses = simd.splat(simd.load1_fp32(inverse + i // 8))
            else:
                zeros, inverses = simd.load_fp32(zero + i * 2), simd.load_fp32(inverse + i * 2)
            # Two bf16 share a word, and so do their codes.
            pair = simd.load_words(src + i * 2)
            even = _quantise(simd.as_lanes(pair << 16), zeros, inverses, highest, limited)
            odd = _quantise(simd.as_lanes(pair & 0xFFFF0000), zeros, inverses, highest, limited)
            simd.store_words_u16(codes + i, even | odd << 8)
        return
    for i in range(0, n, 16):
        if unit == 16:
            zeros = simd.splat(simd.load1_fp32(zero + i // 4))
            inverses = simd.splat(simd.load1_fp32(inverse + i // 4))
        else:
            zeros, inverses = simd.load_fp32(zero + i * 4), simd.load_fp32(inverse + i * 4)
        simd.store_words_u8(codes + i, _quantise(simd.load_fp32(src + i * 4), zeros, inverses, highest, limited))


@inline
def _quantise_pairs(src, zero, inverse):
    """32 codes of one group of `PAIRS`, two in the lower half of each word; those of a NaN are 0."""
    zeros, inverses, none = simd.splat(simd.load1_fp32(zero)), simd.splat(simd.load1_fp32(inverse)), simd.splat(f32(0))
    even = _quantise(simd.load_fp32(src), zeros, inverses, none, False)
    return even | _quantise(simd.load_fp32(src + 64), zeros, inverses, none, False) << 8


@inline
def _join(mask, first, second):
    """Take bits of `first` where `mask` has ones, and of `second` elsewhere."""
    return (first & mask) | (second & (mask ^ 0xFFFFFFFF))


@Op
def quantise_pairs(src, n, group, zero, inverse, bits, ahead, dst):
    """Quantise `PAIRS` and pack the codes into bit planes; n is a multiple of 128, a group has 32, 64 or 128 values.

    NaN in a bf16 has no bits in the lower half, nor has one that arithmetic makes, so `forget` has nothing to do. The
    n / 2 bytes at `ahead` are prefetched.
    """
    step = 128 // group * 4
    second, third, fourth = step // 16 * 4, step // 8 * 4, step * 3 // 16 * 4
    for i in range(0, n, 128):
        simd.prefetch(ahead + i // 2)
        at = src + i * 4
        a = _quantise_pairs(at, zero, inverse)
        b = _quantise_pairs(at + 128, zero + second, inverse + second)
        c = _quantise_pairs(at + 256, zero + third, inverse + third)
        d = _quantise_pairs(at + 384, zero + fourth, inverse + fourth)
        zero += step
        inverse += step
        if bits == 8:
            simd.store_words_u16(dst, a)
            simd.store_words_u16(dst + 32, b)
            simd.store_words_u16(dst + 64, c)
            simd.store_words_u16(dst + 96, d)
            dst += 128
            continue
        if bits & 4:
            simd.store_words_u16(dst, _join(0x0F0F0F0F, a, c << 4))
            simd.store_words_u16(dst + 32, _join(0x0F0F0F0F, b, d << 4))
            dst += 64
            a, b, c, d = a >> 4, b >> 4, c >> 4, d >> 4
        if bits & 2:
            joined = _join(0x0F0F0F0F, _join(0x03030303, a, b << 2), _join(0x3F3F3F3F, c << 4, d << 6))
            simd.store_words_u16(dst, joined)
            dst += 32
            a, b, c, d = a >> 2, b >> 2, c >> 2, d >> 2
        if bits & 1:
            joined = (a & 0x0101) | (b & 0x0101) << 2 | (c & 0x0101) << 4 | (d & 0x0101) << 6
            simd.store_bits(dst, joined)
            dst += 16


@Op
def dequantise(codes, n, unit, scale, zero, add, dst, kind):
    """Code * scale + zero as bf16 or fp32, added to the fp32 at `add` unless `add` is 0."""
    if kind == BF16 and add:
        # Only units of 32 come here.
        for i in range(0, n, 32):
            simd.prefetch(codes + n + i)
            scales = simd.splat(simd.load1_fp32(scale + i // 8))
            zeros = simd.splat(simd.load1_fp32(zero + i // 8))
            first = simd.load_fp32(add + i * 4) + (simd.load_u8(codes + i) * scales + zeros)
            second = simd.load_fp32(add + i * 4 + 64) + (simd.load_u8(codes + i + 16) * scales + zeros)
            simd.store_bf16_twice(dst + i * 2, clean(first), clean(second))
        return
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(codes + n + i)
            if unit == 32:
                scales = simd.splat(simd.load1_fp32(scale + i // 8))
                zeros = simd.splat(simd.load1_fp32(zero + i // 8))
            else:
                scales, zeros = simd.load_fp32(scale + i * 2), simd.load_fp32(zero + i * 2)
            pair = simd.load_words_u16(codes + i)
            even = simd.to_lanes(pair & 255) * scales + zeros
            odd = simd.to_lanes(pair >> 8) * scales + zeros
            simd.store_bf16_pairs(dst + i * 2, even, odd)
        return
    for i in range(0, n, 16):
        if unit == 16:
            scales, zeros = simd.splat(simd.load1_fp32(scale + i // 4)), simd.splat(simd.load1_fp32(zero + i // 4))
        else:
            scales, zeros = simd.load_fp32(scale + i * 4), simd.load_fp32(zero + i * 4)
        v = simd.load_u8(codes + i) * scales + zeros
        if add:
            v = simd.load_fp32(add + i * 4) + v
        simd.store_fp32(dst + i * 4, v)
