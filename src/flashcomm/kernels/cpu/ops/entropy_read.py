"""The payload of an entropy-coded row as codes, and as values. See `entropy`."""

from flashcomm.codecs.entropy_layout import LADDER, PEEK
from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, NAN, Op, f32, inline, move, part
from flashcomm.kernels.cpu.ops.entropy import (
    ALONE,
    BEHIND,
    COLS,
    FACT_FIELDS,
    FACTS,
    HEADER,
    LAST_EDGE,
    LIMIT,
    PLANES,
    RAW_BITS,
    READ_BACK,
    READ_FORWARD,
    RUN,
    SIZE,
    STEP,
    STEPS,
    STREAMS,
    TABLE,
    WIDTH,
    WINDOW,
)
from flashcomm.kernels.cpu.simd import field, long_min


@inline
def _unpack(src, n, raw, lowest):
    """Unpack planes of one bit, as `entropy_write` packs them, to a byte for each code."""
    full, rest = n & ~127, n & 127
    m = (rest + 7) >> 3
    for i in range(0, n, 16):
        simd.store_words_u8(lowest + i, simd.splat_words(0))
    for bit in range(raw):
        for i in range(0, full, 128):
            simd.unpack1_more(src, bit, lowest + i)
            src += 16
        for i in range(m):
            byte = simd.load_byte(src + i)
            for j in range(full + i, n, m):
                simd.store_byte(lowest + j, simd.load_byte(lowest + j) | (byte >> (j - full) // m & 1) << bit)
        src += m


@inline
def _two(window, table, out):
    """Decode the one or two codes at the lowest bits of a window; returns the entry."""
    entry = simd.load_word(table + 4 * (window & WINDOW))
    simd.store_half(out, entry)
    return entry


@inline
def _four_forward(at, bit, table, out):
    """Decode four entries of a stream that runs forward; returns the next bit and the next place for codes."""
    window = simd.load_long(at + (bit >> 3)) >> (bit & 7)
    for _ in range(4):
        entry = _two(window, table, out)
        length = entry >> 16 & 63
        window >>= length
        bit += length
        out += entry >> 24 & 3
    return bit, out


@inline
def _four_back(at, bit, table, out):
    """Decode four entries of a stream that runs back from before `bit`."""
    window = simd.load_long(at + ((bit + 7) >> 3) - 8) << (-bit & 7)
    for _ in range(4):
        entry = _two(window >> 64 - PEEK, table, out)
        length = entry >> 16 & 63
        window <<= length
        bit -= length
        out += entry >> 24 & 3
    return bit, out


@part
def _finish_forward(at, bit, table, out, end):
    """Decode what is left of a stream, and nothing beyond it; returns the bit behind it."""
    while out < end:
        entry = simd.load_word(table + 4 * (simd.load_long(at + (bit >> 3)) >> (bit & 7) & WINDOW))
        simd.store_byte(out, entry)
        bit += entry >> 28 & 15
        out += 1
    return bit


@part
def _finish_back(at, bit, table, out, end):
    """Decode what is left of a stream that runs back."""
    while out < end:
        window = simd.load_long(at + ((bit + 7) >> 3) - 8) << (-bit & 7) >> 64 - PEEK
        entry = simd.load_word(table + 4 * (window & WINDOW))
        simd.store_byte(out, entry)
        bit -= entry >> 28 & 15
        out += 1


@Op
def read_row(src, shape, book, copy, numbers, lowest, state):
    """Read the streams of a payload: upper parts of codes, int8, -128 for an escape; `lowest` bits, a byte each."""
    n, size, header, run = field(shape, COLS), field(shape, SIZE), field(shape, HEADER), field(shape, RUN)
    head = (simd.load_byte(src) & 255) | (simd.load_byte(src + 1) & 255) << 8 | (simd.load_byte(src + 2) & 255) << 16
    k, table, width = head & 0xFFF, long_min(head >> 12 & 0x3F, LAST_EDGE), head >> 18 & 0x1F
    raw = field(field(book, RAW_BITS), table)
    base = table - 4 * raw
    alone = k == 0 or k > LADDER
    simd.store_long(state + 8 * STEP, k)
    simd.store_long(state + 8 * TABLE, table)
    simd.store_long(state + 8 * WIDTH, width)
    simd.store_long(state + 8 * ALONE, 1 if alone else 0)
    if alone:
        return
    # Broken payloads may lead a stream up to 11 bits per code out of the row: the copy has room on both sides.
    payload = copy + n + 64
    move(src, size, payload)
    front = long_min(header + (field(shape, PLANES + raw) >> 3), size)
    if raw:
        _unpack(payload + header, n, raw, lowest)
    forward = field(book, READ_FORWARD) + base * 4 * (WINDOW + 1)
    back = field(book, READ_BACK) + base * 4 * (WINDOW + 1)
    a = numbers
    b = numbers + long_min(n, run)
    c = numbers + long_min(n, 2 * run)
    if field(shape, STREAMS) == 2:
        first, second, p = 8 * front, 8 * size, b
        while a < b - 7 and p < c - 7:
            first, a = _four_forward(payload, first, forward, a)
            second, p = _four_back(payload, second, back, p)
        behind = _finish_forward(payload, first, forward, a, b)
        _finish_back(payload, second, back, p, c)
    else:
        pair = 0
        for i in range(3, header):
            pair |= (simd.load_byte(src + i) & 255) << 8 * (i - 3)
        middle = long_min(front + pair, size)
        d, e = numbers + long_min(n, 3 * run), numbers + n
        first, second, third, fourth = 8 * front, 8 * middle, 8 * middle, 8 * size
        p, q, r = b, c, d
        while a < b - 7 and p < c - 7 and q < d - 7 and r < e - 7:
            first, a = _four_forward(payload, first, forward, a)
            second, p = _four_back(payload, second, back, p)
            third, q = _four_forward(payload, third, forward, q)
            fourth, r = _four_back(payload, fourth, back, r)
        behind = _finish_forward(payload, first, forward, a, b)
        _finish_back(payload, second, back, p, c)
        _finish_forward(payload, third, forward, q, d)
        _finish_back(payload, fourth, back, r, e)
    simd.store_long(state + 8 * BEHIND, behind)


@Op
def read_codes(shape, book, copy, numbers, lowest, state, escapes, add, dst, kind):
    """Write codes times the row's step, plus the fp32 at `add` unless it is 0, as fp32 or as bf16."""
    n, k, table = field(shape, COLS), field(state, STEP), field(state, TABLE)
    raw = field(field(book, RAW_BITS), table)
    half = 1 << raw >> 1
    step = simd.from_bits(NAN) if k > LADDER else simd.load1_fp32(field(book, STEPS) + 4 * k)
    found = 0
    if field(state, ALONE):
        raw = 0
        for i in range(0, n, 64):
            simd.store_words(numbers + i, simd.splat_words(0))
    else:
        found = _read_records(shape, book, copy, numbers, lowest, state, escapes, add, step)
    for i in range(0, n, 32 if kind == BF16 else 16):
        v = _values(numbers, lowest, i, raw, half, step)
        if add:
            v = simd.load_fp32(add + i * 4) + v
        if kind == BF16:
            w = _values(numbers, lowest, i + 16, raw, half, step)
            if add:
                w = simd.load_fp32(add + i * 4 + 64) + w
            simd.store_bf16_twice(dst + i * 2, v, w)
        else:
            simd.store_fp32(dst + i * 4, v)
    for j in range(found):
        place = simd.load_word(escapes + 8 * j)
        value = simd.load1_fp32(escapes + 8 * j + 4)
        if kind == BF16:
            simd.store1_bf16(dst + place * 2, value)
        else:
            simd.store1_fp32(dst + place * 4, value)


@inline
def _values(numbers, lowest, i, raw, half, step):
    """Sixteen codes times the step."""
    q = (simd.load_words_u8(numbers + i) ^ 128) - 128
    if raw:
        q = (q << raw) + simd.load_words_u8(lowest + i) - half
    return simd.to_lanes(q) * step


@inline
def _read_records(shape, book, copy, numbers, lowest, state, escapes, add, step):
    """Place and value, plus what `add` has there, of each code that escapes; returns how many there are."""
    n, table, width, bit = field(shape, COLS), field(state, TABLE), field(state, WIDTH), field(state, BEHIND)
    raw = field(field(book, RAW_BITS), table)
    limit = field(field(book, FACTS) + (table - 4 * raw) * 8 * FACT_FIELDS, LIMIT)
    payload, found = copy + n + 64, 0
    for start in range(0, n, 64):
        mask = simd.bytes_equal(numbers + start, 128)
        while mask:
            place = start + simd.lowest_bit(mask)
            mask &= mask - 1
            if place < n:
                # Bits beyond the payload can only be meant by a broken one.
                at = long_min(bit >> 3, field(shape, SIZE))
                number = (simd.load_long(payload + at) >> (bit & 7) & (1 << width) - 1) + limit
                bit += width
                q = number >> 1 ^ -(number & 1)
                if raw:
                    q = (q << raw) + (simd.load_byte(lowest + place) & 255) - (1 << raw >> 1)
                value = f32(q) * step
                if add:
                    value = simd.load1_fp32(add + place * 4) + value
                simd.store_word(escapes + 8 * found, place)
                simd.store1_fp32(escapes + 8 * found + 4, value)
                found += 1
    return found
