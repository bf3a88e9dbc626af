"""The smallest and the largest value of each group, or the largest magnitude."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import MAGNITUDE, Op


@Op
def shrink_bf16(src, n, group, least, most):
    """Eight candidates for the smallest and eight for the largest value of each group of bf16.

    A group has 8, 16 or a multiple of 32 values. Candidates are integer keys, which order like the numbers; they cannot
    lose a NaN, whose key lies beyond the infinities. Four groups go into one vector, so least[] and most[] need room
    for three groups more than there are.
    """
    count = n // group
    if group == 8:
        for j in range(0, n, 32):
            v = simd.halves_key(simd.load_halves(src + j * 2))
            simd.store_halves(least + j * 2, v)
            simd.store_halves(most + j * 2, v)
        return
    if group == 16:
        for j in range(0, n, 64):
            a = simd.halves_key(simd.load_halves(src + j * 2))
            b = simd.halves_key(simd.load_halves(src + j * 2 + (64 if j + 32 < n else 0)))
            simd.store_halves(least + j, simd.fold16_min(a, b))
            simd.store_halves(most + j, simd.fold16_max(a, b))
        return
    for j in range(0, count, 4):
        at0 = src + j * group * 2
        # If fewer than four are left, take the last one several times.
        at1 = at0 + (group * 2 if j + 1 < count else 0)
        at2 = at1 + (group * 2 if j + 2 < count else 0)
        at3 = at2 + (group * 2 if j + 3 < count else 0)
        least0 = most0 = simd.halves_key(simd.load_halves(at0))
        least1 = most1 = simd.halves_key(simd.load_halves(at1))
        least2 = most2 = simd.halves_key(simd.load_halves(at2))
        least3 = most3 = simd.halves_key(simd.load_halves(at3))
        for i in range(64, group * 2, 64):
            v0, v1 = simd.halves_key(simd.load_halves(at0 + i)), simd.halves_key(simd.load_halves(at1 + i))
            v2, v3 = simd.halves_key(simd.load_halves(at2 + i)), simd.halves_key(simd.load_halves(at3 + i))
            least0, least1 = simd.half_min(v0, least0), simd.half_min(v1, least1)
            least2, least3 = simd.half_min(v2, least2), simd.half_min(v3, least3)
            most0, most1 = simd.half_max(v0, most0), simd.half_max(v1, most1)
            most2, most3 = simd.half_max(v2, most2), simd.half_max(v3, most3)
        least0 = simd.fold16_min(simd.fold32_min(least0, least1), simd.fold32_min(least2, least3))
        most0 = simd.fold16_max(simd.fold32_max(most0, most1), simd.fold32_max(most2, most3))
        simd.store_halves(least + j * 16, least0)
        simd.store_halves(most + j * 16, most0)


@Op
def shrink_magnitudes(src, n, group, most):
    """Like `shrink_bf16`, for the largest magnitude alone."""
    count = n // group
    if group == 8:
        for j in range(0, n, 32):
            simd.store_halves(most + j * 2, simd.halves_magnitude(simd.load_halves(src + j * 2)))
        return
    if group == 16:
        for j in range(0, n, 64):
            a = simd.halves_magnitude(simd.load_halves(src + j * 2))
            b = simd.halves_magnitude(simd.load_halves(src + j * 2 + (64 if j + 32 < n else 0)))
            simd.store_halves(most + j, simd.fold16_max(a, b))
        return
    for j in range(0, count, 4):
        at0 = src + j * group * 2
        at1 = at0 + (group * 2 if j + 1 < count else 0)
        at2 = at1 + (group * 2 if j + 2 < count else 0)
        at3 = at2 + (group * 2 if j + 3 < count else 0)
        most0, most1 = simd.halves_magnitude(simd.load_halves(at0)), simd.halves_magnitude(simd.load_halves(at1))
        most2, most3 = simd.halves_magnitude(simd.load_halves(at2)), simd.halves_magnitude(simd.load_halves(at3))
        for i in range(64, group * 2, 64):
            most0 = simd.half_max(simd.halves_magnitude(simd.load_halves(at0 + i)), most0)
            most1 = simd.half_max(simd.halves_magnitude(simd.load_halves(at1 + i)), most1)
            most2 = simd.half_max(simd.halves_magnitude(simd.load_halves(at2 + i)), most2)
            most3 = simd.half_max(simd.halves_magnitude(simd.load_halves(at3 + i)), most3)
        simd.store_halves(most + j * 16, simd.fold16_max(simd.fold32_max(most0, most1), simd.fold32_max(most2, most3)))


@Op
def magnitudes_bf16(most, count, amax):
    """Candidates of `shrink_magnitudes` -> the fp32 bits of the largest magnitude of each group."""
    for j in range(0, count, 32):
        at = most + j * 16
        a = simd.fold8_max(simd.load_halves(at), simd.load_halves(at + 64))
        b = simd.fold8_max(simd.load_halves(at + 128), simd.load_halves(at + 192))
        c = simd.fold8_max(simd.load_halves(at + 256), simd.load_halves(at + 320))
        d = simd.fold8_max(simd.load_halves(at + 384), simd.load_halves(at + 448))
        simd.store_halves_wide(amax + j * 4, simd.fold2_max(simd.fold4_max(a, b), simd.fold4_max(c, d)))
    simd.store_words(amax + count * 4, simd.splat_words(0))


@Op
def magnitudes_fp32(src, n, group, amax):
    """The bits of the largest magnitude of each group of fp32. Groups have any size; the last may be short."""
    full = n // group
    if group % 16 == 0:
        for j in range(full):
            at = src + j * group * 4
            most = simd.load_words(at) & MAGNITUDE
            for i in range(64, group * 4, 64):
                most = simd.word_max(simd.load_words(at + i) & MAGNITUDE, most)
            simd.store_word(amax + j * 4, simd.words_max(most))
        done = full
    else:
        done = 0
    for start in range(done * group, n, group):
        largest = 0
        for i in range(start, min(start + group, n)):
            largest = max(largest, simd.load_word(src + i * 4) & MAGNITUDE)
        simd.store_word(amax + done * 4, largest)
        done += 1
    simd.store_words(amax + done * 4, simd.splat_words(0))


@Op
def ranges_bf16(least, most, count, keys, low, high):
    """Candidates of `shrink_bf16` -> the smallest and the largest of each group: as keys if `keys`, else as fp32."""
    for j in range(0, count, 32):
        at = least + j * 16
        a = simd.fold8_min(simd.load_halves(at), simd.load_halves(at + 64))
        b = simd.fold8_min(simd.load_halves(at + 128), simd.load_halves(at + 192))
        c = simd.fold8_min(simd.load_halves(at + 256), simd.load_halves(at + 320))
        d = simd.fold8_min(simd.load_halves(at + 384), simd.load_halves(at + 448))
        least_of_all = simd.fold2_min(simd.fold4_min(a, b), simd.fold4_min(c, d))
        simd.store_halves_wide(low + j * 4, least_of_all if keys else simd.halves_key(least_of_all))
        at = most + j * 16
        a = simd.fold8_max(simd.load_halves(at), simd.load_halves(at + 64))
        b = simd.fold8_max(simd.load_halves(at + 128), simd.load_halves(at + 192))
        c = simd.fold8_max(simd.load_halves(at + 256), simd.load_halves(at + 320))
        d = simd.fold8_max(simd.load_halves(at + 384), simd.load_halves(at + 448))
        most_of_all = simd.fold2_max(simd.fold4_max(a, b), simd.fold4_max(c, d))
        simd.store_halves_wide(high + j * 4, most_of_all if keys else simd.halves_key(most_of_all))
    # Scales are made sixteen at a time, also where fewer groups are left.
    simd.store_words(low + count * 4, simd.splat_words(0))
    simd.store_words(high + count * 4, simd.splat_words(0))


@Op
def shrink_fp32(src, n, group, least, most):
    """Like `shrink_bf16` for fp32 in groups of a multiple of 16, with four candidates of each kind."""
    count = n // group
    for j in range(0, count, 4):
        at0 = src + j * group * 4
        at1 = at0 + (group * 4 if j + 1 < count else 0)
        at2 = at1 + (group * 4 if j + 2 < count else 0)
        at3 = at2 + (group * 4 if j + 3 < count else 0)
        least0 = most0 = simd.words_key(simd.load_words(at0))
        least1 = most1 = simd.words_key(simd.load_words(at1))
        least2 = most2 = simd.words_key(simd.load_words(at2))
        least3 = most3 = simd.words_key(simd.load_words(at3))
        for i in range(64, group * 4, 64):
            v0, v1 = simd.words_key(simd.load_words(at0 + i)), simd.words_key(simd.load_words(at1 + i))
            v2, v3 = simd.words_key(simd.load_words(at2 + i)), simd.words_key(simd.load_words(at3 + i))
            least0, least1 = simd.word_min(v0, least0), simd.word_min(v1, least1)
            least2, least3 = simd.word_min(v2, least2), simd.word_min(v3, least3)
            most0, most1 = simd.word_max(v0, most0), simd.word_max(v1, most1)
            most2, most3 = simd.word_max(v2, most2), simd.word_max(v3, most3)
        least0, least2 = simd.words_fold16_min(least0, least1), simd.words_fold16_min(least2, least3)
        most0, most2 = simd.words_fold16_max(most0, most1), simd.words_fold16_max(most2, most3)
        simd.store_words(least + j * 16, simd.words_fold8_min(least0, least2))
        simd.store_words(most + j * 16, simd.words_fold8_max(most0, most2))


@Op
def ranges_fp32(least, most, src, n, group, low, high):
    """Candidates of `shrink_fp32` -> the smallest and the largest of each group.

    Groups that it did not see are read here: the short last one, or all if their size is no multiple of 16.
    """
    done = n // group if group % 16 == 0 else 0
    for j in range(0, done, 16):
        at = least + j * 16
        a = simd.words_fold4_min(simd.load_words(at), simd.load_words(at + 64))
        b = simd.words_fold4_min(simd.load_words(at + 128), simd.load_words(at + 192))
        simd.store_words(low + j * 4, simd.words_key(simd.words_fold2_min(a, b)))
        at = most + j * 16
        a = simd.words_fold4_max(simd.load_words(at), simd.load_words(at + 64))
        b = simd.words_fold4_max(simd.load_words(at + 128), simd.load_words(at + 192))
        simd.store_words(high + j * 4, simd.words_key(simd.words_fold2_max(a, b)))
    for start in range(done * group, n, group):
        lowest, highest = 0x7FFFFFFF, -0x80000000
        for i in range(start, min(start + group, n)):
            pattern = simd.load_word(src + i * 4)
            key = pattern ^ (pattern >> 63 & MAGNITUDE)
            lowest, highest = min(lowest, key), max(highest, key)
        simd.store_word(low + done * 4, lowest ^ (lowest >> 63 & MAGNITUDE))
        simd.store_word(high + done * 4, highest ^ (highest >> 63 & MAGNITUDE))
        done += 1
    simd.store_words(low + done * 4, simd.splat_words(0))
    simd.store_words(high + done * 4, simd.splat_words(0))
