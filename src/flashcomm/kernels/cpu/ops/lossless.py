"""Rows without loss: `codecs.lossless`.

    pack_row     a row of bf16 or fp16 as its payload
    unpack_row   the inverse

Rows are worked on 64 values at a time. Where that does not divide a row, it is copied to scratch memory first.
"""

from flashcomm.codecs.lossless import CODE_BITS, ESCAPE, HEADER_BYTES, LENGTH_BYTES, TOP_BITS
from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import AHEAD, Op, inline, move, part
from flashcomm.kernels.cpu.simd import field, long_max, long_min

_SIGN, _TOP = 0x80, (1 << TOP_BITS) - 1


@inline
def _clear(n, dst):
    full, zeros = n & ~63, simd.octets_where(0, 0)
    for i in range(0, full, 64):
        simd.store_octets(dst + i, zeros)
    for i in range(full, n):
        simd.store_byte(dst + i, 0)


@part
def _count(exponents, n, least):
    """Number of exponents that are not below `least`; those behind the row are 0."""
    if least <= 0 or least > 255:
        return n if least <= 0 else 0
    found = 0
    for i in range(0, n, 64):
        found += simd.count_at_least(exponents + i, least)
    return found


@part
def _choose(exponents, n, counts):
    """Find the base of a row: it, the number of escapes, and whether all exponents are 0."""
    median, bit = 0, 128
    while bit:
        if _count(exponents, n, median | bit) >= n - ((n - 1) >> 1):
            median |= bit
        bit >>= 1
    lowest = long_max(median - ESCAPE + 1, 0)
    for least in range(lowest, median + ESCAPE + 1):
        simd.store_long(counts + 8 * (least - lowest), _count(exponents, n, least))
    base, most = lowest, 0
    for first in range(lowest, median + 1):
        inside = field(counts, first - lowest) - field(counts, first - lowest + ESCAPE)
        if inside > most:
            base, most = first, inside
    return base, n - most, median == 0 and field(counts, 1) == 0


@inline
def _all_zero(src, n):
    some = simd.splat_words(0)
    for i in range(0, n, 64):
        some = some | simd.load_words(src + i * 2) | simd.load_words(src + i * 2 + 64)
    return simd.words_or(some) == 0


@Op
def pack_row(src, n, mantissa, size, exponents, counts, values, payload, dst):
    """Write the payload of n values with so many bits of mantissa: `size` bytes, those behind its length 0."""
    row, out = src, dst
    if n & 63:
        move(src, 2 * n, values)
        _clear(128, values + 2 * n)
        row, out = values, payload
    rest = mantissa - TOP_BITS
    for i in range(0, n, 64):
        simd.prefetch(src + i * 2 + AHEAD)
        simd.prefetch(src + i * 2 + AHEAD + 64)
        simd.store_octets(exponents + i, simd.load_octets_of_halves(row + i * 2, mantissa) & 0x7FFF >> mantissa)
        top = simd.load_octets_of_halves(row + i * 2, 8) & _SIGN | simd.load_octets_of_halves(row + i * 2, rest) & _TOP
        simd.store_octets(out + HEADER_BYTES + i, top)
    base, num_escapes, zero = _choose(exponents, n, counts)
    plane_bytes = (n + 7) >> 3
    planes = out + HEADER_BYTES + n
    escapes = planes + (CODE_BITS + rest) * plane_bytes
    length = escapes + num_escapes - out
    if zero and _all_zero(row, n):
        length = LENGTH_BYTES
        simd.store_word(dst, length)
    elif length >= size:
        length = size
        simd.store_word(dst, length)
        move(src, 2 * n, dst + LENGTH_BYTES)
    else:
        simd.store_word(out, length)
        simd.store_byte(out + LENGTH_BYTES, base)
        for i in range(0, n, 64):
            code = simd.octet_min(simd.load_octets(exponents + i) - base, ESCAPE)
            inside = -1 if n - i >= 64 else (1 << (n - i)) - 1
            escaped = inside
            for j in range(CODE_BITS + rest):
                if j < CODE_BITS:
                    bits = simd.octets_bit(code, j) & inside
                    escaped &= bits
                else:
                    bits = simd.octets_bit(simd.load_octets_of_halves(row + i * 2, 0), j - CODE_BITS) & inside
                if n - i >= 64:
                    simd.store_long(planes + j * plane_bytes + (i >> 3), bits)
                else:
                    for k in range((n - i + 7) >> 3):
                        simd.store_byte(planes + j * plane_bytes + (i >> 3) + k, bits >> 8 * k)
            while escaped:
                simd.store_byte(escapes, simd.load_byte(exponents + i + simd.lowest_bit(escaped)))
                escaped &= escaped - 1
                escapes += 1
        if n & 63:
            move(payload, length, dst)
    _clear(size - length, dst + length)


@Op
def unpack_row(src, n, mantissa, size, exponents, payload, values, dst):
    """Write the n values of a payload of up to `size` bytes."""
    length = simd.load_word(src)
    if length <= LENGTH_BYTES:
        _clear(2 * n, dst)
        return
    if length >= size:
        move(src + LENGTH_BYTES, 2 * n, dst)
        return
    row, out = src, dst
    if n & 63:
        move(src, length, payload)
        row, out = payload, values
    rest = mantissa - TOP_BITS
    plane_bytes = (n + 7) >> 3
    planes = HEADER_BYTES + n
    escapes = planes + (CODE_BITS + rest) * plane_bytes
    planes += row
    base = simd.load_byte(row + LENGTH_BYTES)
    for i in range(0, n, 64):
        simd.prefetch(src + i + AHEAD)
        at, escaped = planes + (i >> 3), -1 if n - i >= 64 else (1 << (n - i)) - 1
        exponent = simd.octets_where(-1, base)
        for j in range(CODE_BITS):
            bits = simd.load_long(at + j * plane_bytes)
            exponent = exponent + simd.octets_where(bits, 1 << j)
            escaped &= bits
        simd.store_octets(exponents + i, exponent)
        while escaped:
            # Escapes beyond the payload can only be meant by a broken one.
            simd.store_byte(
                exponents + i + simd.lowest_bit(escaped), simd.load_byte(row + long_min(escapes, length - 1))
            )
            escaped &= escaped - 1
            escapes += 1
    for i in range(0, n, 64):
        top, low = simd.load_octets(row + HEADER_BYTES + i), simd.octets_where(0, 0)
        for j in range(rest):
            bits = simd.load_long(planes + (CODE_BITS + j) * plane_bytes + (i >> 3))
            low = low | simd.octets_where(bits, 1 << j)
        exponent = simd.load_octets(exponents + i) & 0x7FFF >> mantissa
        simd.store_halves_of_octets(out + i * 2, top & _SIGN, top & _TOP, rest, exponent, mantissa, low)
    if n & 63:
        move(values, 2 * n, dst)
