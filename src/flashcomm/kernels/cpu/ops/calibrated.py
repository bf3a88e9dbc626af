"""Kept features and static scales: `codecs.calibrated`."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, MAGNITUDE, NAN, Op, inline


@inline
def _copy_run(src, n, size, dst):
    """Copy n values of `size` bytes each, and nothing beyond them."""
    step = 64 // size
    if n >= step:
        for i in range(0, n - step + 1, step):
            simd.store_words(dst + i * size, simd.load_words(src + i * size))
        # The last vector overlaps the one before it.
        simd.store_words(dst + (n - step) * size, simd.load_words(src + (n - step) * size))
    else:
        for i in range(0, n * size, 2):
            simd.store_half(dst + i, simd.load_half(src + i))


@Op
def take_out(src, kind, n, features, kept, rest, sent):
    """Split a row: the values at the sorted places features[] as bf16 to sent[], all others, closed up, to rest[]."""
    size = 2 if kind == BF16 else 4
    start = 0
    for k in range(kept + 1):
        stop = simd.load_long(features + k * 8) if k < kept else n
        _copy_run(src + start * size, stop - start, size, rest + (start - k) * size)
        if k < kept:
            bits = simd.load_half(src + stop * 2) << 16 if kind == BF16 else simd.load_word(src + stop * 4)
            bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if bits & MAGNITUDE <= 0x7F800000 else 0x7FC0
            simd.store_half(sent + k * 2, bits)
        start = stop + 1


@Op
def put_back(rest, sent, features, kept, n, dst, kind):
    """Inverse of `take_out`."""
    size = 2 if kind == BF16 else 4
    start = 0
    for k in range(kept + 1):
        stop = simd.load_long(features + k * 8) if k < kept else n
        _copy_run(rest + (start - k) * size, stop - start, size, dst + start * size)
        start = stop + 1
    for k in range(kept):
        place, bits = simd.load_long(features + k * 8), simd.load_half(sent + k * 2)
        if kind == BF16:
            simd.store_half(dst + place * 2, bits)
        else:
            simd.store_word(dst + place * 4, bits << 16)


@Op
def lengthen(row, n, upto):
    """Fill a row of bf16 up to `upto` values with copies of its last one, which change no range."""
    for i in range(n, upto):
        simd.store_half(row + i * 2, simd.load_half(row + n * 2 - 2))


@Op
def mark_nan(src, n, code, codes):
    """Set the code of each NaN and Inf to `code`."""
    inf, marks = simd.splat_words(0x7F800000), simd.splat_words(code)
    for i in range(0, n, 16):
        bits, old = simd.load_words(src + i * 4) & MAGNITUDE, simd.load_words_u8(codes + i)
        simd.store_words_u8(codes + i, simd.words_where_less(bits, inf, old, marks))


@Op
def unmark_nan(codes, n, code, row):
    """Set the value of each `code` to NaN."""
    for i in range(0, n, 16):
        is_code, bits = simd.load_words_u8(codes + i), simd.load_words(row + i * 4)
        simd.store_words(
            row + i * 4, simd.words_where_equal(is_code, simd.splat_words(code), simd.splat_words(NAN), bits)
        )


@Op
def pick_table(number, tables, count, table_bytes, factor_bits, n, scale, zero):
    """Copy the scales of one of `count` tables, by its number in a byte, and multiply them for the zero points."""
    table = tables + simd.long_min(simd.load_byte(number) & 255, count - 1) * table_bytes
    factor = simd.from_bits(factor_bits)
    for i in range(0, n, 16):
        v = simd.load_fp32(table + i * 4)
        simd.store_fp32(scale + i * 4, v)
        simd.store_fp32(zero + i * 4, v * factor)
