"""Rounding up or down at random: `codecs.stochastic`."""

from flashcomm.codecs.stochastic import FIRST, GOLDEN, SECOND
from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import MAGNITUDE, ROUND, Op, f32, inline

_WORD = 0xFFFFFFFF


@inline
def _mix_words(v):
    v = (v ^ v >> 16) * FIRST
    v = (v ^ v >> 15) * SECOND
    return v ^ v >> 15


@inline
def _mix(v):
    v = (v ^ v >> 16) * FIRST & _WORD
    v = (v ^ v >> 15) * SECOND & _WORD
    return v ^ v >> 15


@Op
def dither(src, n, group, dst):
    """The fp32 that is added to each of n fp32, in spacings."""
    for start in range(0, n, group):
        at, to, size = src + start * 4, dst + start * 4, min(group, n - start)
        full, mixed = size & ~15, simd.splat_words(0)
        for i in range(0, full, 16):
            counter = (simd.places() + simd.splat_words(i)) * GOLDEN
            mixed = mixed + _mix_words(simd.load_words(at + i * 4) + counter)
        key = simd.words_sum(mixed)
        for i in range(full, size):
            key += _mix((simd.load_word(at + i * 4) + i * GOLDEN) & _WORD)
        keys = simd.splat_words(key)
        for i in range(0, full, 16):
            k = _mix_words(keys + (simd.places() + simd.splat_words(i)) * GOLDEN) >> 17
            simd.store_fp32(to + i * 4, simd.to_lanes(k + k + 1) * f32(2.0**-16) - simd.splat(f32(0.5)))
        for i in range(full, size):
            k = _mix((key + i * GOLDEN) & _WORD) >> 17
            simd.store1_fp32(to + i * 4, f32(2 * k + 1) * f32(2.0**-16) - f32(0.5))


@Op
def quantise_dithered(src, n, unit, zero, inverse, limit_bits, noise, codes):
    """Like `quantise` of fp32, with noise added before rounding; the limit is never 0."""
    lowest, highest = simd.splat(ROUND), simd.splat(ROUND + simd.from_bits(limit_bits))
    for i in range(0, n, 16):
        if unit == 16:
            zeros = simd.splat(simd.load1_fp32(zero + i // 4))
            inverses = simd.splat(simd.load1_fp32(inverse + i // 4))
        else:
            zeros, inverses = simd.load_fp32(zero + i * 4), simd.load_fp32(inverse + i * 4)
        v = (simd.load_fp32(src + i * 4) - zeros) * inverses + simd.load_fp32(noise + i * 4)
        v = simd.lane_max(simd.lane_min(v + simd.splat(ROUND), highest), lowest)
        simd.store_words_u8(codes + i, simd.as_words(v))


@Op
def round_floats_dithered(src, n, unit, inverse, mantissa, lowest, last, noise, codes):
    """Like `round_floats` of fp32 to eight bits, with noise added to magnitudes before rounding."""
    least, lasts = simd.splat_words(lowest + 127 << 23), simd.splat_words(last)
    for i in range(0, n, 16):
        inverses = simd.splat(simd.load1_fp32(inverse + i // 4)) if unit == 16 else simd.load_fp32(inverse + i * 4)
        word = simd.as_words(simd.load_fp32(src + i * 4) * inverses)
        # The power of two at which x's binade starts, and one over the spacing there.
        binade = simd.word_max(word & 0x7F800000, least)
        per_spacing = simd.as_lanes(simd.splat_words(254 + mantissa << 23) - binade)
        count = simd.as_lanes(word & MAGNITUDE) * per_spacing + simd.load_fp32(noise + i * 4)
        steps = simd.as_words(count + simd.splat(ROUND)) - simd.as_words(simd.splat(ROUND))
        code = simd.word_min(steps + ((binade - least) >> 23 - mantissa), lasts)
        simd.store_words_u8(codes + i, code | word >> 24 & 0x80)
