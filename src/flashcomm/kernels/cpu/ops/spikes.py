"""Spike reserving, the smallest and the largest value of each group kept: `codecs.spike`."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, MAGNITUDE, NAN, ROUND, TINY, Op, f32, inline

# 1.25 * 2.0**126.
_TOO_LARGE = 0x7EA00000
_DOWN, _FAR_UP, _FAR_DOWN = -0x10000, 0x7FFFFFFF, -0x80000000


@inline
def _signed(bits):
    """Patterns of fp32 -> integers that order like the numbers: magnitudes, negative ones below 0."""
    sign = simd.splat_words(0) - (bits >> 31)
    return ((bits & MAGNITUDE) ^ sign) - sign


@inline
def _unsigned(key):
    """Inverse of `_signed`."""
    sign = simd.splat_words(0) - (key >> 31)
    return simd.as_lanes(((key ^ sign) - sign) | sign & 0x80000000)


@inline
def _up(key):
    """Round keys of fp32 up to keys of bf16."""
    return (simd.word_min(key, simd.splat_words(0x7FFF0000)) + 0xFFFF) & _DOWN


@Op
def shrink_spikes(src, n, group, smallest, second, largest, before):
    """Four candidates for the two smallest, and four for the two largest, of each group of fp32.

    Groups are multiples of 16. Candidates are keys with the place in the lower half, so that among equals the first
    wins; see `codecs.spike`.
    """
    count = n // group
    far_up, far_down, last = simd.splat_words(_FAR_UP), simd.splat_words(_FAR_DOWN), simd.splat_words(0xFFFF)
    for j in range(0, count, 4):
        at0, stride0 = src + j * group * 4, group * 4
        least_a = least_b = second_a = second_b = far_up
        most_a = most_b = before_a = before_b = far_down
        for k in range(0, 4, 2):
            at = at0 + (simd.long_min(j + k, count - 1) - j) * stride0
            next_at = at0 + (simd.long_min(j + k + 1, count - 1) - j) * stride0
            least0 = least1 = second0 = second1 = far_up
            most0 = most1 = before0 = before1 = far_down
            for i in range(0, group, 16):
                place = simd.places() + i
                key0, key1 = _signed(simd.load_words(at + i * 4)), _signed(simd.load_words(next_at + i * 4))
                down0, down1 = key0 & _DOWN | place, key1 & _DOWN | place
                up0, up1 = _up(key0) | last - place, _up(key1) | last - place
                second0 = simd.word_min(second0, simd.word_max(least0, down0))
                second1 = simd.word_min(second1, simd.word_max(least1, down1))
                least0, least1 = simd.word_min(least0, down0), simd.word_min(least1, down1)
                before0 = simd.word_max(before0, simd.word_min(most0, up0))
                before1 = simd.word_max(before1, simd.word_min(most1, up1))
                most0, most1 = simd.word_max(most0, up0), simd.word_max(most1, up1)
            if k == 0:
                second_a = simd.second16_min(least0, least1, second0, second1)
                least_a = simd.words_fold16_min(least0, least1)
                before_a = simd.second16_max(most0, most1, before0, before1)
                most_a = simd.words_fold16_max(most0, most1)
            else:
                second_b = simd.second16_min(least0, least1, second0, second1)
                least_b = simd.words_fold16_min(least0, least1)
                before_b = simd.second16_max(most0, most1, before0, before1)
                most_b = simd.words_fold16_max(most0, most1)
        simd.store_words(second + j * 16, simd.second8_min(least_a, least_b, second_a, second_b))
        simd.store_words(smallest + j * 16, simd.words_fold8_min(least_a, least_b))
        simd.store_words(before + j * 16, simd.second8_max(most_a, most_b, before_a, before_b))
        simd.store_words(largest + j * 16, simd.words_fold8_max(most_a, most_b))


@Op
def two_smallest(smallest, second, count):
    """Candidates of `shrink_spikes` -> the smallest and the second smallest of each group, in place."""
    for j in range(0, count, 16):
        at, other = smallest + j * 16, second + j * 16
        a, b = simd.load_words(at), simd.load_words(at + 64)
        c, d = simd.load_words(at + 128), simd.load_words(at + 192)
        second_ab = simd.second4_min(a, b, simd.load_words(other), simd.load_words(other + 64))
        second_cd = simd.second4_min(c, d, simd.load_words(other + 128), simd.load_words(other + 192))
        ab, cd = simd.words_fold4_min(a, b), simd.words_fold4_min(c, d)
        simd.store_words(second + j * 4, simd.second2_min(ab, cd, second_ab, second_cd))
        simd.store_words(smallest + j * 4, simd.words_fold2_min(ab, cd))


@Op
def two_largest(largest, before, count):
    """Candidates of `shrink_spikes` -> the largest and the second largest of each group, in place."""
    for j in range(0, count, 16):
        at, other = largest + j * 16, before + j * 16
        a, b = simd.load_words(at), simd.load_words(at + 64)
        c, d = simd.load_words(at + 128), simd.load_words(at + 192)
        before_ab = simd.second4_max(a, b, simd.load_words(other), simd.load_words(other + 64))
        before_cd = simd.second4_max(c, d, simd.load_words(other + 128), simd.load_words(other + 192))
        ab, cd = simd.words_fold4_max(a, b), simd.words_fold4_max(c, d)
        simd.store_words(before + j * 4, simd.second2_max(ab, cd, before_ab, before_cd))
        simd.store_words(largest + j * 4, simd.words_fold2_max(ab, cd))


@Op
def find_spikes(src, n, group, places, low, high, a, b):
    """Find the places (two bytes per group) and the values of the smallest and the largest of each group.

    Before, low[], a[], high[] and b[] hold the keys of the smallest, the second smallest, the largest and the second
    largest of each group that `shrink_spikes` has seen; for the others they are found here. Afterwards low[] and high[]
    are fp32.
    """
    done = n // group if group % 16 == 0 else 0
    for j in range((n + group - 1) // group):
        start = j * group
        at, size = src + start * 4, simd.long_min(group, n - start)
        known = j < done
        if known:
            first, last = simd.load_word(low + j * 4) & 0xFFFF, 0xFFFF - (simd.load_word(high + j * 4) & 0xFFFF)
            # Between two bf16, the largest may be the second smallest, or the other way round.
            second, before = simd.load_word(a + j * 4) & 0xFFFF, 0xFFFF - (simd.load_word(b + j * 4) & 0xFFFF)
            known = second != last and before != first
        else:
            lowest, highest = _FAR_UP, _FAR_DOWN
            for i in range(size):
                pattern = simd.load_word(at + i * 4)
                key = -(pattern & MAGNITUDE) if pattern < 0 else pattern
                lowest = simd.long_min(lowest, key & _DOWN | i)
                highest = simd.long_max(highest, (simd.long_min(key, 0x7FFF0000) + 0xFFFF) & _DOWN | 0xFFFF - i)
            first, last = lowest & 0xFFFF, 0xFFFF - (highest & 0xFFFF)
        if not known:
            lowest, highest = _FAR_UP, _FAR_DOWN
            for i in range(size):
                if i != first and i != last:
                    pattern = simd.load_word(at + i * 4)
                    key = -(pattern & MAGNITUDE) if pattern < 0 else pattern
                    lowest = simd.long_min(lowest, key & _DOWN)
                    highest = simd.long_max(highest, (simd.long_min(key, 0x7FFF0000) + 0xFFFF) & _DOWN)
            simd.store_word(a + j * 4, lowest)
            simd.store_word(b + j * 4, highest)
        smallest, largest = simd.load_word(at + first * 4), simd.load_word(at + last * 4)
        if simd.long_max(smallest & MAGNITUDE, largest & MAGNITUDE) > _TOO_LARGE:
            # The payload of a NaN group must not depend on which NaN it held.
            smallest = largest = NAN
            first = last = 0
        simd.store_byte(places + 2 * j, first)
        simd.store_byte(places + 2 * j + 1, last)
        simd.store_word(low + j * 4, smallest)
        simd.store_word(high + j * 4, largest)


@inline
def _first_and_others(at, group, smallest, largest):
    """Find two values in a group of bf16: their places, and the smallest and the largest of all others in 32 lanes."""
    lowest = -(smallest & 0x7FFF) if smallest < 0 else smallest
    highest = -(largest & 0x7FFF) if largest < 0 else largest
    first = last = -1
    least = most = simd.halves_signed(simd.load_halves(at))
    for i in range(0, group, 32):
        v = simd.halves_signed(simd.load_halves(at + i * 2))
        lows, highs, spikes = simd.halves_equal(v, lowest), simd.halves_equal(v, highest), 0
        if first < 0 and lows:
            first, spikes = i + simd.lowest_bit(lows), lows & -lows
        if last < 0 and highs:
            last, spikes = i + simd.lowest_bit(highs), spikes | highs & -highs
        without_low, without_high = simd.halves_replace(v, spikes, 0x7FFF), simd.halves_replace(v, spikes, -0x8000)
        least = simd.half_min(without_low, least) if i else without_low
        most = simd.half_max(without_high, most) if i else without_high
    return first, last, least, most


@Op
def find_spikes_bf16(src, n, group, places, low, high, least, most):
    """Find the places of the smallest and the largest of each group of bf16, whose values low[] and high[] hold.

    least[] and most[] become eight candidates, as in `shrink_bf16`, for the smallest and the largest of all others.
    Groups are multiples of 32, none is short.
    """
    count = n // group
    for j in range(0, count, 2):
        least0 = least1 = most0 = most1 = simd.load_halves(src + j * group * 2)
        for k in range(j, simd.long_min(j + 2, count)):
            at = src + k * group * 2
            # Fetch the next row here: the ops before and after this one leave less time for it.
            for i in range(0, group * 2, 64):
                simd.prefetch(at + i + n * 2)
            smallest, largest = simd.load_word(low + k * 4) >> 16, simd.load_word(high + k * 4) >> 16
            first, last, others_low, others_high = _first_and_others(at, group, smallest, largest)
            smallest, largest = simd.load_half(at + first * 2) << 16, simd.load_half(at + last * 2) << 16
            if simd.long_max(smallest & MAGNITUDE, largest & MAGNITUDE) > _TOO_LARGE:
                smallest = largest = NAN
                first = last = 0
            simd.store_byte(places + 2 * k, first)
            simd.store_byte(places + 2 * k + 1, last)
            simd.store_word(low + k * 4, smallest)
            simd.store_word(high + k * 4, largest)
            if k == j:
                least0, most0 = others_low, others_high
            else:
                least1, most1 = others_low, others_high
        # Eight candidates of two groups, stored twice; those of the next two groups overwrite the second half.
        least0, most0 = simd.fold32_min(least0, least1), simd.fold32_max(most0, most1)
        simd.store_halves(least + j * 16, simd.fold16_min(least0, least0))
        simd.store_halves(most + j * 16, simd.fold16_max(most0, most0))


@inline
def _to_bf16(v):
    bits = simd.as_words(v)
    return simd.as_lanes((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000)


@inline
def _lowest_binade(low, high):
    """The exponent field at which the scales' bytes start, times 8."""
    largest = simd.word_max(simd.as_words(low) & MAGNITUDE, simd.as_words(high) & MAGNITUDE) >> 23
    return simd.word_max(largest - 30, simd.splat_words(1)) << 3


@inline
def _anchor(low, high):
    nothing = simd.splat(f32(0))
    return simd.where_less(nothing, low, low, simd.where_less(high, nothing, high, nothing))


@Op
def spike_scales(low, high, a, b, count, bits, symmetric, zero, inverse, flag, spikes, meta):
    """Results of `find_spikes` -> zero points, reciprocals and bytes: spikes[], then in meta[] scales and centres."""
    nothing, one, half = simd.splat(f32(0)), simd.splat(f32(1)), simd.splat(f32(0.5))
    none, nan, tiny = simd.splat_words(0), simd.splat_words(NAN), simd.splat(TINY)
    part = simd.from_bits(bits - 6 + 127 << 23)
    last = f32((1 << bits) - 2 if symmetric and bits > 1 else (1 << bits) - 1)
    all_bad = none
    for j in range(0, count, 16):
        lows, highs = _to_bf16(simd.load_fp32(low + j * 4)), _to_bf16(simd.load_fp32(high + j * 4))
        low_bits, high_bits = simd.load_words(low + j * 4), simd.load_words(high + j * 4)
        largest = simd.word_max(low_bits & MAGNITUDE, high_bits & MAGNITUDE)
        bad = simd.words_where_less(simd.splat_words(_TOO_LARGE), largest, nan, none)
        all_bad = all_bad | bad
        alone = simd.words_where_equal(simd.load_words(a + j * 4), simd.splat_words(_FAR_UP), nan, none) | bad
        lows = simd.as_lanes(simd.words_where_equal(bad, nan, none, simd.as_words(lows)))
        highs = simd.as_lanes(simd.words_where_equal(bad, nan, none, simd.as_words(highs)))
        least = _unsigned(simd.words_where_equal(alone, nan, none, simd.load_words(a + j * 4) & _DOWN))
        most = _unsigned(simd.words_where_equal(alone, nan, none, simd.load_words(b + j * 4) & _DOWN))
        anchors = nothing if symmetric else _anchor(lows, highs)
        middle = least * half + most * half - anchors
        if symmetric:
            least = simd.as_lanes(simd.as_words(least) & MAGNITUDE)
            most = simd.as_lanes(simd.as_words(most) & MAGNITUDE)
            needed = simd.lane_max(least, most) * f32(2) / (last + f32(1))
        else:
            away = simd.as_lanes(simd.as_words(middle) & MAGNITUDE) / (part * f32(127))
            needed = simd.lane_max((most - least) / (part * f32(63)), away)
        needed = simd.as_lanes(simd.words_where_equal(alone, nan, none, simd.as_words(needed)))
        lowest = _lowest_binade(lows, highs)
        code = simd.word_max((simd.as_words(simd.lane_max(needed, tiny)) + 0xFFFFF >> 20) - lowest, none) + 1
        code = simd.where_less_words(nothing, needed, code, none)
        scale = simd.as_lanes(simd.words_where_equal(code, none, none, lowest + code - 1 << 20))
        recip = simd.words_where_equal(code, none, none, simd.as_words(one / scale))
        # A scale of 0 makes this NaN, and then the second operand is taken.
        steps = simd.lane_min(simd.lane_max(middle / (scale * part), simd.splat(f32(-127))), simd.splat(f32(127)))
        steps = simd.words_where_equal(code, none, none, simd.as_words(steps + simd.splat(ROUND)) - 0x4B400000)
        zeros = anchors + simd.to_lanes(steps) * (scale * part) - scale * (last * f32(0.5))
        if symmetric:
            zeros = scale * (last * f32(-0.5))
        simd.store_fp32(zero + j * 4, zeros)
        simd.store_words(inverse + j * 4, simd.words_where_equal(bad, nan, nan, recip))
        low_bits = simd.words_where_equal(bad, nan, nan, simd.as_words(lows))
        simd.store_words(spikes + j * 4, low_bits >> 16 | simd.as_words(highs) & 0xFFFF0000)
        simd.store_words_u8(meta + j, code)
        simd.store_words_u8(meta + count + 16 + j, steps + 128)
    simd.store_word(flag, simd.words_max(all_bad))


@Op
def spike_meta(spikes, scales, centres, count, bits, symmetric, zero, scale, low, high):
    """The bytes of `spike_scales` -> scales, zero points and spikes."""
    none, nan = simd.splat_words(0), simd.splat_words(NAN)
    nothing = simd.splat(f32(0))
    part = simd.from_bits(bits - 6 + 127 << 23)
    last = f32((1 << bits) - 2 if symmetric and bits > 1 else (1 << bits) - 1)
    for j in range(0, count, 16):
        pair = simd.load_words(spikes + j * 4)
        lows, highs = simd.as_lanes(pair << 16), simd.as_lanes(pair & 0xFFFF0000)
        code = simd.load_words_u8(scales + j)
        values = simd.as_lanes(simd.words_where_equal(code, none, none, _lowest_binade(lows, highs) + code - 1 << 20))
        if symmetric:
            zeros = values * (last * f32(-0.5))
        else:
            steps = simd.to_lanes(simd.load_words_u8(centres + j) - 128)
            zeros = _anchor(lows, highs) + steps * (values * part) - values * (last * f32(0.5))
        # low * 0 is NaN where the group is NaN.
        bad = simd.words_where_equal(simd.as_words(lows * nothing) & MAGNITUDE, none, none, nan)
        simd.store_fp32(scale + j * 4, values)
        simd.store_words(zero + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(zeros)))
        simd.store_fp32(low + j * 4, lows)
        simd.store_words(high + j * 4, simd.words_where_equal(bad, nan, nan, simd.as_words(highs)))


@Op
def put_spikes(places, low, high, n, group, dst, kind):
    """Store the spikes of each group, in bf16 or fp32, at their places; none beyond the group's last value."""
    for j in range((n + group - 1) // group):
        end = simd.long_min(group, n - j * group) - 1
        first = j * group + simd.long_min(simd.load_byte(places + 2 * j) & 255, end)
        last = j * group + simd.long_min(simd.load_byte(places + 2 * j + 1) & 255, end)
        if kind == BF16:
            simd.store_half(dst + first * 2, simd.load_word(low + j * 4) >> 16)
            simd.store_half(dst + last * 2, simd.load_word(high + j * 4) >> 16)
        else:
            simd.store_word(dst + first * 4, simd.load_word(low + j * 4))
            simd.store_word(dst + last * 4, simd.load_word(high + j * 4))
