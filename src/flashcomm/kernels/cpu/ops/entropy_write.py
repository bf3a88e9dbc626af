"""The payload of an entropy-coded row that `entropy_plan` has planned: header, planes and streams. See `entropy`."""

from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import Op, inline, move, part
from flashcomm.kernels.cpu.ops.entropy import (
    ALONE,
    COLS,
    ESCAPES,
    FACT_FIELDS,
    FACTS,
    HEADER,
    HIGH_FIRST,
    LIMIT,
    LOW_FIRST,
    PLANES,
    RAW_BITS,
    RUN,
    SIZE,
    STEP,
    STREAMS,
    TABLE,
    WIDTH,
    WORD_FIELDS,
)
from flashcomm.kernels.cpu.simd import field, long_max, long_min


@inline
def _entries(codes, i, last, raw, table):
    """Sixteen entries of a table of words: words, and their lengths from bit 16 on; 0 from code `last` on."""
    z = simd.load_words(codes + i * 4)
    if raw:
        z = simd.words_signed_shift(z + (1 << raw >> 1), raw)
    number = simd.word_min((z << 1) ^ simd.words_signed_shift(z, 31), simd.splat_words(64))
    entries = simd.gather(table, number)
    if last - i < 16:
        entries = simd.words_where_less(simd.places(), simd.splat_words(last - i), entries, simd.splat_words(0))
    return entries


@inline
def _write_forward(codes, first, last, raw, table, work, at):
    """Write the words of codes `first` to `last`, lowest bits first, from `at` on; returns the number of bits."""
    start, held, bits = at, 0, 0
    for i in range(first, last, 16):
        simd.join_low_first(_entries(codes, i, last, raw, table), work, work + 32)
        for j in range(4):
            held |= field(work, j) << bits
            bits += field(work, 4 + j)
            simd.store_long(at, held)
            at += bits >> 3
            held >>= bits & 56
            bits &= 7
    simd.store_long(at, held)
    return 8 * (at - start) + bits


@inline
def _write_back(codes, first, last, raw, table, work, at):
    """Write the words of codes `first` to `last`, highest bits first, before `at`; returns the number of bits."""
    start, held, bits = at, 0, 0
    for i in range(first, last, 16):
        simd.join_high_first(_entries(codes, i, last, raw, table), work, work + 32)
        for j in range(4):
            length = field(work, 4 + j)
            # Nothing may be shifted by 64, which no bits at all would be.
            held |= field(work, j) << (64 - bits - length & 63)
            bits += length
            simd.store_long(at - 8, held)
            at -= bits >> 3
            held <<= bits & 56
            bits &= 7
    simd.store_long(at - 8, held)
    return 8 * (start - at) + bits


@part
def _merge(one, forward, two, back, dst, size):
    """Put `forward` bits from `one` on and `back` bits before `two` into `size` bytes, zeros between them."""
    ahead, behind = (forward + 7) >> 3, (back + 7) >> 3
    shared = long_max(0, ahead + behind - size)
    move(one, ahead, dst)
    for i in range(ahead, size - behind):
        simd.store_byte(dst + i, 0)
    if shared:
        simd.store_byte(dst + ahead - 1, simd.load_byte(one + ahead - 1) | simd.load_byte(two - behind))
    move(two - behind + shared, behind - shared, dst + size - behind + shared)


@inline
def _pack(lowest, n, raw, dst):
    """Pack one bit of each code after the other as planes of one bit."""
    full, rest = n & ~127, n & 127
    m = (rest + 7) >> 3
    for bit in range(raw):
        for i in range(0, full, 128):
            simd.pack1(lowest + i, bit, dst)
            dst += 16
        for i in range(m):
            byte = 0
            for j in range(full + i, n, m):
                byte |= (simd.load_byte(lowest + j) >> bit & 1) << (j - full) // m
            simd.store_byte(dst + i, byte)
        dst += m


@Op
def write_row(shape, book, codes, state, numbers, work, one, two, dst):
    """Write the payload of a row that `plan_row` has chosen; `two` is the end of its array."""
    n, size, header, run = field(shape, COLS), field(shape, SIZE), field(shape, HEADER), field(shape, RUN)
    k, table, width = field(state, STEP), field(state, TABLE), field(state, WIDTH)
    if field(state, ALONE):
        _merge(one, n & 0, two, n & 0, dst, size)
        simd.store_half(dst, k)
        return
    raw = field(field(book, RAW_BITS), table)
    base = table - 4 * raw
    head = k | table << 12 | width << 18
    for i in range(3):
        simd.store_byte(dst + i, head >> 8 * i)
    front = header + (field(shape, PLANES + raw) >> 3)
    if raw:
        half, mask = 1 << raw >> 1, (1 << raw) - 1
        for i in range(0, n, 16):
            simd.store_words_u8(numbers + i, (simd.load_words(codes + i * 4) + half) & mask)
        _pack(numbers, n, raw, dst + header)
    low_first = field(book, LOW_FIRST) + 4 * WORD_FIELDS * base
    high_first = field(book, HIGH_FIRST) + 4 * WORD_FIELDS * base
    streams = field(shape, STREAMS)
    for stream in range(0, streams, 2):
        a, b, c = long_min(n, stream * run), long_min(n, stream * run + run), long_min(n, stream * run + 2 * run)
        forward = _write_forward(codes, a, b, raw, low_first, work, one)
        if stream == 0 and field(state, ESCAPES):
            forward = _write_records(book, codes, n, raw, base, width, one, forward)
        back = _write_back(codes, b, c, raw, high_first, work, two)
        if stream + 2 < streams:
            pair = (forward + back + 7) >> 3
            for i in range(3, header):
                simd.store_byte(dst + i, pair >> 8 * (i - 3))
        else:
            pair = size - front
        _merge(one, forward, two, back, dst + front, pair)
        front += pair


@inline
def _write_records(book, codes, n, raw, base, width, at, bits):
    """Write the excess of each code that escapes behind `bits` bits; returns the number of bits."""
    limit = field(field(book, FACTS) + base * 8 * FACT_FIELDS, LIMIT)
    half = 1 << raw >> 1
    for i in range(n):
        z = (simd.load_word(codes + i * 4) + half) >> raw
        number = z << 1 ^ z >> 63
        if number >= limit:
            place = at + (bits >> 3)
            held = simd.load_byte(place) & (1 << (bits & 7)) - 1
            simd.store_long(place, held | number - limit << (bits & 7))
            bits += width
    return bits
