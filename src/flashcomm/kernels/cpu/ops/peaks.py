"""Rows without their largest values, and Gaussian levels: `codecs.peaks`."""

from flashcomm.codecs.peaks import LEAST, PER_CELL, TOO_LARGE
from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, MAGNITUDE, NAN, TINY, Op, f32, inline

# Magnitudes in `work`: of a peak that was found, and beyond the row.
_TAKEN, _NONE = -1, -2


@Op
def take_peaks(row, n, count, work, best, flag, peaks, places, stride):
    """Replace the `count` largest magnitudes of a row of fp32 by 0; write them as bf16, and their places, ascending.

    Byte i of a place goes to the i-th of four arrays that are `stride` bytes apart. A row with a NaN, an Inf or too
    large a magnitude becomes zeros, like its peaks and places, and sets the flag. work[] has room for the row and 128
    values more, best[] for one value of each 128.
    """
    blocks = (n + 127) >> 7
    for j in range(blocks):
        most = simd.splat_words(_NONE)
        for i in range(j * 128, j * 128 + 128, 16):
            beyond = simd.splat_words(n - i - 1)
            v = simd.load_words(row + i * 4) & MAGNITUDE
            v = simd.words_where_less(beyond, simd.places(), simd.splat_words(_NONE), v)
            simd.store_words(work + i * 4, v)
            most = simd.word_max(most, v)
        simd.store_word(best + j * 4, simd.words_max(most))
    for i in range(blocks, (blocks + 15) & ~15):
        simd.store_word(best + i * 4, _NONE)
    bad = 0
    for k in range(count):
        # The first block among equals, and the first of its values: of equal magnitudes the lower place is taken.
        most = simd.load_words(best)
        for j in range(16, blocks, 16):
            most = simd.word_max(most, simd.load_words(best + j * 4))
        largest = simd.words_max(most)
        if largest > TOO_LARGE:
            bad = 1
            break
        j = 0
        found = simd.words_equal(simd.load_words(best), largest)
        while not found:
            j += 16
            found = simd.words_equal(simd.load_words(best + j * 4), largest)
        j += simd.lowest_bit(found)
        i = j * 128
        found = simd.words_equal(simd.load_words(work + i * 4), largest)
        while not found:
            i += 16
            found = simd.words_equal(simd.load_words(work + i * 4), largest)
        simd.store_word(work + (i + simd.lowest_bit(found)) * 4, _TAKEN)
        most = simd.load_words(work + j * 512)
        for i in range(64, 512, 64):
            most = simd.word_max(most, simd.load_words(work + j * 512 + i))
        simd.store_word(best + j * 4, simd.words_max(most))
    simd.store_word(flag, bad)
    if bad:
        for i in range(0, n, 16):
            simd.store_words(row + i * 4, simd.splat_words(0))
        for k in range(count):
            simd.store_half(peaks + k * 2, 0)
            for i in range(4):
                simd.store_byte(places + i * stride + k, 0)
        return
    k = 0
    for i in range(0, n, 16):
        found = simd.words_equal(simd.load_words(work + i * 4), _TAKEN)
        while found:
            place = i + simd.lowest_bit(found)
            found &= found - 1
            bits = simd.load_word(row + place * 4)
            simd.store_word(row + place * 4, 0)
            simd.store_half(peaks + k * 2, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
            for part in range(4):
                simd.store_byte(places + part * stride + k, place >> 8 * part)
            k += 1


@inline
def _cells(z, factor):
    size = simd.as_lanes(simd.as_words(z) & MAGNITUDE)
    return simd.to_words(simd.lane_min(size * factor * f32(256), simd.splat(f32(1023))))


@Op
def level_scale(row, n, reach_bits, flag, inverse, sent):
    """Find the scale of a row: its bf16 to sent[], its reciprocal to inverse[]. Up to fifteen zeros follow the row."""
    most = simd.splat_words(0)
    for i in range(0, n, 16):
        most = simd.word_max(most, simd.load_words(row + i * 4) & MAGNITUDE)
    largest = simd.words_max(most)
    bits, reciprocal = 0, f32(0)
    if largest > 0:
        cover = simd.from_bits(largest) / simd.from_bits(reach_bits)
        if cover < TINY:
            cover = TINY
        total, factor = 0, simd.splat(f32(1) / cover)
        for start in range(0, n, 1 << 16):
            cells = simd.splat_words(0)
            for i in range(start, min(start + (1 << 16), n), 16):
                cells = cells + _cells(simd.load_fp32(row + i * 4), factor)
            total += simd.words_sum(cells)
        scale = cover * max(f32(float(2 * total + n) * PER_CELL / float(n)), f32(LEAST))
        if scale < TINY:
            scale = TINY
        bits = (simd.bits_of(scale) + 0xFFFF) >> 16
        reciprocal = f32(1) / simd.from_bits(bits << 16)
    simd.store_half(sent, NAN >> 16 if simd.load_word(flag) else bits)
    simd.store1_fp32(inverse, reciprocal)


@Op
def level_codes(row, n, inverse, table, bits, flag, codes):
    """Codes of a transformed row, a byte each; table[] has the positive codes of all cells."""
    none, all_ones = simd.splat_words(0), simd.splat_words((1 << bits) - 1)
    factor, nothing = simd.splat(simd.load1_fp32(inverse)), simd.splat(f32(0))
    if simd.load_word(flag):
        for i in range(0, n, 16):
            simd.store_words_u8(codes + i, none)
        return
    for i in range(0, n, 16):
        z = simd.load_fp32(row + i * 4)
        # The codes of negative values are those of positive ones from the other end.
        flip = simd.where_less_words(z, nothing, all_ones, none)
        simd.store_words_u8(codes + i, simd.gather(table, _cells(z, factor)) ^ flip)


@Op
def level_values(codes, n, levels, sent, row):
    """Codes -> levels[code] times the scale, in fp32."""
    scale = simd.splat(simd.from_bits(simd.load_half(sent) << 16))
    for i in range(0, n, 16):
        level = simd.as_lanes(simd.gather(levels, simd.load_words_u8(codes + i)))
        simd.store_fp32(row + i * 4, level * scale)


@Op
def put_peaks(peaks, count, places, stride, parts, n, sent, dst, kind):
    """Store peaks, in bf16 or fp32, in their places, of `parts` bytes each, unless the row's scale is a NaN."""
    if simd.load_half(sent) & 0x7FFF > 0x7F80:
        return
    for k in range(count):
        place = 0
        for part in range(parts):
            place |= (simd.load_byte(places + part * stride + k) & 255) << 8 * part
        place = min(place, n - 1)
        bits = simd.load_half(peaks + k * 2)
        if bits & 0x7FFF > 0x7F80:
            bits = NAN >> 16
        if kind == BF16:
            simd.store_half(dst + place * 2, bits)
        else:
            simd.store_word(dst + place * 4, bits << 16)
