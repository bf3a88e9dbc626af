"""Small floats and their scales: `codecs.blocks`."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, MAGNITUDE, NAN, TINY, Op, f32, inline

# 2.0**127: a block whose element times scale might not be finite.
_TOO_LARGE = 0x7F000000


@Op
def scales_e8m0(amax, count, limit_bits, inverse, flag, meta):
    """Largest magnitudes -> reciprocals of the scales, NaN as in `affine_scales`, and the scales' bytes."""
    none, nan = simd.splat_words(0), simd.splat_words(NAN)
    offset = 0x7FFFFF + (127 << 23) - limit_bits
    all_bad = none
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        all_bad = all_bad | bad
        code = simd.word_max(simd.word_max(largest + offset, none) >> 23, simd.splat_words(1))
        recip = (simd.splat_words(254) - code) << 23
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, recip))
        simd.store_words_u8(meta + j, simd.words_where_equal(bad, nan, simd.splat_words(255), code))
    simd.store_word(flag, simd.words_max(all_bad))


@Op
def scales_e5m0(amax, count, limit_bits, inverse, flag, codes, row):
    """Like `scales_e8m0` with five-bit codes, a byte each, and one byte per row."""
    none, nan = simd.splat_words(0), simd.splat_words(NAN)
    offset = 0x7FFFFF + (127 << 23) - limit_bits
    all_bad, tops = none, simd.splat_words(1)
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        code = simd.word_max(simd.word_max(largest + offset, none) >> 23, simd.splat_words(1))
        # 0 marks a NaN group until the row's largest is known.
        code = simd.words_where_equal(bad, nan, none, code)
        simd.store_words(inverse + j * 4, code)
        all_bad = all_bad | bad
        tops = simd.word_max(tops, code)
    top = simd.words_max(tops)
    simd.store_byte(row, top)
    tops = simd.splat_words(top)
    for j in range(0, count, 16):
        code = simd.load_words(inverse + j * 4)
        below = simd.word_min(tops - code, simd.splat_words(30))
        simd.store_words_u8(codes + j, simd.words_where_equal(code, none, simd.splat_words(31), below))
        recip = (simd.splat_words(254) - simd.word_max(tops - below, simd.splat_words(1))) << 23
        simd.store_words(inverse + j * 4, simd.words_where_equal(code, none, nan, recip))
    simd.store_word(flag, simd.words_max(all_bad))


@Op
def scales_fp32(amax, count, limit_bits, inverse, flag, meta):
    """Like `scales_e8m0` with fp32 scales."""
    none, nan = simd.splat_words(0), simd.splat_words(NAN)
    limits, tiny, one = simd.splat(simd.from_bits(limit_bits)), simd.splat(TINY), simd.splat(f32(1))
    all_bad = none
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        all_bad = all_bad | bad
        scale = simd.lane_max(simd.as_lanes(largest) / limits, tiny)
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(one / scale)))
        simd.store_words(meta + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(scale)))
    simd.store_word(flag, simd.words_max(all_bad))


@Op
def scales_e4m3(amax, count, limit_bits, inverse, flag, meta, row):
    """Like `scales_e8m0` with one FP8 byte per group and an fp32 per row."""
    none, nan = simd.splat_words(0), simd.splat_words(NAN)
    limit = simd.from_bits(limit_bits)
    limits, one = simd.splat(limit), simd.splat(f32(1))
    all_bad = tops = none
    for j in range(0, count, 16):
        largest = simd.load_words(amax + j * 4)
        bad = simd.words_where_less(largest, simd.splat_words(_TOO_LARGE), none, nan)
        largest = simd.words_where_equal(bad, nan, simd.splat_words(-1), largest)
        simd.store_words(inverse + j * 4, largest)
        all_bad = all_bad | bad
        tops = simd.word_max(tops, largest)
    # The smallest E4M3 is 2**-9, and its product with the row's scale must not fall below 2**-126.
    row_scale = max(simd.from_bits(simd.words_max(tops)) / (limit * f32(448)), f32(2.0**-117))
    simd.store_word(row, simd.bits_of(row_scale))
    rows, smallest = simd.splat(row_scale), simd.splat(f32(2.0**-6))
    for j in range(0, count, 16):
        largest = simd.load_words(inverse + j * 4)
        ratio = simd.as_lanes(largest) / limits / rows
        # Rounded up to three bits behind the leading one; below 2**-6, up to a multiple of 2**-9.
        normal = ((simd.as_words(ratio) + 0xFFFFF) >> 20) - (120 << 3)
        scaled = ratio * f32(512)
        floor = simd.to_words(scaled)
        tiny = floor + simd.where_less_words(simd.to_lanes(floor), scaled, simd.splat_words(1), none)
        code = simd.where_less_words(ratio, smallest, tiny, normal)
        code = simd.word_max(simd.word_min(code, simd.splat_words(126)), simd.splat_words(1))
        simd.store_words_u8(meta + j, simd.words_where_less(largest, none, simd.splat_words(127), code))
        value = simd.as_lanes((code << 20) + (120 << 23))
        recip = one / (simd.lane_min(value, (value + value) - smallest) * rows)
        simd.store_words(inverse + j * 4, simd.words_where_less(largest, none, nan, simd.as_words(recip)))
    simd.store_word(flag, simd.words_max(all_bad))


@Op
def meta_e8m0(meta, count, scale):
    """The bytes of `scales_e8m0` -> scales, NaN for a group that decodes to NaN."""
    for j in range(0, count, 16):
        code = simd.load_words_u8(meta + j)
        bits = simd.words_where_equal(code, simd.splat_words(255), simd.splat_words(NAN), code << 23)
        simd.store_words(scale + j * 4, bits)


@Op
def meta_e5m0(codes, row, count, scale):
    """The codes and the byte of `scales_e5m0` -> scales."""
    tops = simd.splat_words(simd.load_byte(row) & 255)
    for j in range(0, count, 16):
        below = simd.load_words_u8(codes + j)
        bits = simd.word_max(tops - below, simd.splat_words(1)) << 23
        bits = simd.words_where_equal(below, simd.splat_words(31), simd.splat_words(NAN), bits)
        simd.store_words(scale + j * 4, bits)


@Op
def meta_e4m3(meta, row, count, scale):
    """The bytes of `scales_e4m3` -> scales."""
    rows, smallest = simd.splat(simd.load1_fp32(row)), simd.splat(f32(2.0**-6))
    for j in range(0, count, 16):
        code = simd.load_words_u8(meta + j)
        value = simd.as_lanes((code << 20) + (120 << 23))
        value = simd.lane_min(value, (value + value) - smallest) * rows
        bits = simd.words_where_equal(code, simd.splat_words(127), simd.splat_words(NAN), simd.as_words(value))
        simd.store_words(scale + j * 4, bits)


@inline
def _round_float(x, inverses, form):
    """Sixteen fp32 -> one code per lane."""
    drop, up, lowest, offset, lasts, sign_shift, sign_bit = form
    word = simd.as_words(x * inverses)
    # The power of two at which x's binade starts, and `grid`, whose last bit is worth one spacing of that binade:
    # grid + |x| is rounded half to even to a whole number of spacings, which is in its lowest bits.
    binade = simd.word_max(word & 0x7F800000, lowest)
    grid = binade + up
    steps = simd.as_words(simd.as_lanes(word & MAGNITUDE) + simd.as_lanes(grid)) - grid
    code = simd.word_min(steps + ((binade >> drop) - offset), lasts)
    return code | word >> sign_shift & sign_bit


@Op
def round_floats(src, kind, n, unit, inverse, bits, mantissa, lowest, last, codes):
    """Round x * inverse to the nearest small float, one byte each: see `codecs.elements`."""
    drop = 23 - mantissa
    binade = lowest + 127 << 23
    form = (
        drop, drop << 23, simd.splat_words(binade), binade >> drop, simd.splat_words(last), 32 - bits, 1 << bits - 1,
    )  # fmt: skip
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(src + n * 2 + i * 2)
            if unit == 32:
                inverses = simd.splat(simd.load1_fp32(inverse + i // 8))
            else:
                inverses = simd.load_fp32(inverse + i * 2)
            pair = simd.load_words(src + i * 2)
            even = _round_float(simd.as_lanes(pair << 16), inverses, form)
            odd = _round_float(simd.as_lanes(pair & 0xFFFF0000), inverses, form)
            simd.store_words_u16(codes + i, even | odd << 8)
        return
    for i in range(0, n, 16):
        inverses = simd.splat(simd.load1_fp32(inverse + i // 4)) if unit == 16 else simd.load_fp32(inverse + i * 4)
        simd.store_words_u8(codes + i, _round_float(simd.load_fp32(src + i * 4), inverses, form))


@inline
def _read_float(code, scales, form):
    """The fp32 of one code per lane."""
    magnitude, up, binade, smallest, sign_shift = form
    # Read as if the exponent field 0 were a binade like the others. For that field the right value is twice the value
    # minus the smallest normal number; for all others this is larger, so the minimum of both is right.
    value = simd.as_lanes(((code & magnitude) << up) + binade)
    value = simd.lane_min(value, simd.twice_minus(value, smallest))
    return simd.as_lanes(simd.as_words(value) | code << sign_shift & 0x80000000) * scales


@Op
def read_floats(codes, n, unit, scale, bits, mantissa, lowest, add, dst, kind):
    """Element * scale as bf16 or fp32; as fp32, added to the values at `dst` if `add` is not 0."""
    smallest = simd.splat(simd.from_bits(lowest + 127 << 23))
    form = ((1 << bits - 1) - 1, 23 - mantissa, lowest + 126 << 23, smallest, 32 - bits)
    if kind == BF16:
        for i in range(0, n, 32):
            simd.prefetch(codes + n + i)
            scales = simd.splat(simd.load1_fp32(scale + i // 8)) if unit == 32 else simd.load_fp32(scale + i * 2)
            pair = simd.load_words_u16(codes + i)
            even, odd = _read_float(pair & 255, scales, form), _read_float(pair >> 8, scales, form)
            simd.store_bf16_pairs(dst + i * 2, even, odd)
        return
    for i in range(0, n, 16):
        scales = simd.splat(simd.load1_fp32(scale + i // 4)) if unit == 16 else simd.load_fp32(scale + i * 4)
        v = _read_float(simd.load_words_u8(codes + i), scales, form)
        if add:
            v = simd.load_fp32(dst + i * 4) + v
        simd.store_fp32(dst + i * 4, v)
