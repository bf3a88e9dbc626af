"""Entropy-coded rows: `codecs.entropy`.

    plan_row    the step, the table and the codes of a row: rate control in passes of integers
    write_row   header, planes and streams
    read_row    the streams of a row, two codes to a look-up, two or four streams at a time
    read_codes  codes times the step

`shape` and `book` are addresses of int64 that `huffman` makes: what is known of the row's length, and where the tables
are. `state` is what an op tells the next one of the row.
"""

from flashcomm.codecs.entropy import BISECTIONS, FLOOR, GUESS, GUESSES, LADDER, LARGEST, OCTAVES, PEEK, RAW, TOP
from flashcomm.codecs.entropy import NAN as NAN_STEP
from flashcomm.codecs.entropy_tables import MANTISSAS
from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import BF16, MAGNITUDE, NAN, ROUND, Op, f32, inline, part
from flashcomm.kernels.cpu.simd import field, long_max, long_min

_ROUND_BITS = 0x4B400000
_ONE = MANTISSAS[0]
_LAST_EDGE = 4 * RAW + TOP
_WINDOW = (1 << PEEK) - 1

# Fields of `shape`, in int64.
COLS, SIZE, HEADER, RUN, STREAMS, BUDGET, CAP, ROOM, PLANES = range(9)
SHAPE_FIELDS = PLANES + RAW + 1

# Fields of `book`: addresses of tables.
STEPS, INVERSES, MANTISSA, EDGE, FACTS, RISES, LOW_FIRST, HIGH_FIRST, READ_FORWARD, READ_BACK, RAW_BITS = range(11)
BOOK_FIELDS = 11

# Facts of a table, in int64: codes without an escape, bits of an escape, bits of the code 0 and of the last code,
# number of places where the bits rise by one.
LIMIT, ESCAPE, FIRST, LAST, NUM_RISES = range(5)
FACT_FIELDS = 8
RISE_FIELDS = 16
WORD_FIELDS = 65

# Fields of `state`.
STEP, TABLE, WIDTH, ESCAPES, SHARED, BEHIND, ALONE = range(7)
"""The step's number; the row's table; bits of a record; number of escapes; all codes, joined by or; the first record's
bit; whether the row has no codes, as its values are zeros or NaN."""


@inline
def _code(value, inverse):
    """One fp32 times `inverse`, rounded half to even."""
    return (simd.bits_of(value * inverse + ROUND) & 0xFFFFFFFF) - _ROUND_BITS


@inline
def _on_grid(row, n, inverse, step):
    """-1 if some value is not a multiple of the step, otherwise how often 2 divides all multiples."""
    some = simd.splat_words(0)
    for start in range(0, n, 256):
        other = simd.splat_words(0)
        for i in range(start, long_min(n, start + 256), 16):
            x = simd.load_fp32(row + i * 4)
            q = simd.as_words(x * inverse + ROUND) - _ROUND_BITS
            other = other | ((simd.as_words(simd.to_lanes(q) * step) ^ simd.as_words(x)) & MAGNITUDE)
            some = some | q
        if simd.words_or(other):
            return -1
    bits = simd.words_or(some)
    return simd.lowest_bit(bits) if bits else 0


@part
def _probe(row, shape, book, k, largest, codes, numbers, state):
    """Quantise a row with step k, choose the table of its codes and count its bits."""
    n, inverse = field(shape, COLS), simd.load1_fp32(field(book, INVERSES) + 4 * k)
    total, some, zeros, caps = 0, simd.splat_words(0), simd.splat_words(0), simd.splat_words(field(shape, CAP))
    for start in range(0, n, 65536):
        sums = zeros
        for i in range(start, long_min(n, start + 65536), 16):
            q = simd.as_words(simd.load_fp32(row + i * 4) * inverse + ROUND) - _ROUND_BITS
            simd.store_words(codes + i * 4, q)
            some = some | q
            sums = sums + simd.word_min(simd.word_max(q, zeros - q), caps)
        total += simd.words_sum(sums)
    mean = 256 * total // n
    table, edges = 0, field(book, EDGE)
    while table < _LAST_EDGE and mean >= field(edges, table):
        table += 1
    raw = field(field(book, RAW_BITS), table)
    base, half = table - 4 * raw, 1 << raw >> 1
    facts, rises = field(book, FACTS) + base * 8 * FACT_FIELDS, field(book, RISES) + base * RISE_FIELDS
    limit = field(facts, LIMIT)
    # The upper parts as 0, -1, 1, ... counted from 0, at most 127, a byte each.
    top = simd.splat_words(127)
    for i in range(0, n, 16):
        z = simd.load_words(codes + i * 4)
        if raw:
            z = simd.words_signed_shift(z + half, raw)
        simd.store_words_u8(numbers + i, simd.word_min((z << 1) ^ simd.words_signed_shift(z, 31), top))
    for i in range((n + 15) & ~15, (n + 63) & ~63, 16):
        simd.store_words_u8(numbers + i, zeros)
    # Bits rise with the number, so they are counted by the numbers at which they rise.
    bits = n * field(facts, FIRST) + field(shape, PLANES + raw)
    excess, width, escapes = 2 * (_code(largest, inverse) + half >> raw) - limit, 0, 0
    rising = field(facts, NUM_RISES)
    for j in range(rising + 1 if excess >= 0 else rising):
        edge, found = simd.load_byte(rises + j) if j < rising else limit, n & 0
        for i in range(0, n, 64):
            found += simd.count_at_least(numbers + i, edge)
        if j < rising:
            bits += found
        else:
            escapes, width = found, 1
            while excess >> width:
                width += 1
            bits += escapes * (field(facts, ESCAPE) - field(facts, LAST) + width)
    simd.store_long(state + 8 * TABLE, table)
    simd.store_long(state + 8 * WIDTH, width)
    simd.store_long(state + 8 * ESCAPES, escapes)
    simd.store_long(state + 8 * SHARED, simd.words_or(some))
    return bits


@Op
def plan_row(row, shape, book, codes, numbers, state):
    """Choose the step and the table of a row of fp32, followed by zeros, and its codes, int32."""
    n = field(shape, COLS)
    zeros, lots = simd.splat_words(0), simd.splat_words(MAGNITUDE)
    most, least = zeros, lots
    for i in range(0, n, 16):
        pattern = simd.load_words(row + i * 4) & MAGNITUDE
        most = simd.word_max(most, pattern)
        least = simd.word_min(least, simd.words_where_equal(pattern, zeros, lots, pattern))
    amax, amin = simd.words_max(most), MAGNITUDE - simd.words_max(lots - least)
    simd.store_long(state + 8 * ALONE, 1)
    if amax == 0 or amax > LARGEST:
        simd.store_long(state + 8 * STEP, NAN_STEP if amax else 0)
        return
    largest = simd.from_bits(amax)
    twice = simd.bits_of(largest + largest) & MAGNITUDE
    last = 16 * ((twice >> 23) - 1) + 1
    for j in range(16):
        last += (twice & 0x7FFFFF) > simd.load_word(field(book, MANTISSA) + 4 * j) - _ONE
    last = long_max(last, 1)
    first = long_max(last - 16 * OCTAVES, 1)
    floor = long_max((amax >> 23) - 24, 0)
    total, floors = 0, simd.splat_words(floor)
    for start in range(0, n, 65536):
        sums = zeros
        for i in range(start, long_min(n, start + 65536), 16):
            sums = sums + simd.word_max((simd.load_words(row + i * 4) & MAGNITUDE) >> 23, floors)
        total += simd.words_sum(sums)
    total -= floor * (((n + 15) & ~15) - n)
    budget = field(shape, BUDGET)
    k = long_min(long_max(16 * total // n - field(shape, ROOM) + GUESS, first), last)
    # Beyond the ladder only the last step serves, which makes everything 0.
    below, fits, probe = first - 1, long_min(last, LADDER + 1), 0
    chosen = -1
    while probe < GUESSES + BISECTIONS and fits - below > 1:
        k = long_min(long_max(k, below + 1), long_max(fits - 1, below + 1))
        over = _probe(row, shape, book, k, largest, codes, numbers, state) - budget
        secant = k + 16 * over // n
        if over <= 0:
            fits = k
        else:
            below = k
            secant = long_max(secant, k + 1)
        chosen = k
        k = secant if probe < GUESSES - 1 else (below + fits) >> 1
        probe += 1
    k = last if fits > LADDER else fits
    start, tries, octaves, own = long_max(long_max(first - 16, k - FLOOR), 1), 0, -1, k
    smallest = simd.from_bits(amin)
    for family in range(16):
        finest = long_min(start + family, LADDER)
        inverse, step = (
            simd.load1_fp32(field(book, INVERSES) + 4 * finest),
            simd.load1_fp32(field(book, STEPS) + 4 * finest),
        )
        code = _code(smallest, inverse)
        if octaves < 0 and tries < 2 and code >= 1 and simd.bits_of(f32(code) * step) == simd.bits_of(smallest):
            tries += 1
            octaves = long_min(_on_grid(row, n, inverse, step), (LADDER - finest) >> 4)
            own = finest + 16 * octaves
    if octaves >= 0 and _probe(row, shape, book, own, largest, codes, numbers, state) <= budget:
        k = own
    else:
        if chosen != k or octaves >= 0:
            _probe(row, shape, book, k, largest, codes, numbers, state)
        shared = field(state, SHARED)
        octaves = long_min(simd.lowest_bit(shared), long_max(LADDER - k, 0) >> 4) if shared else 0
        if octaves:
            # Multiples of 2 stay what they are, with half the code.
            if _probe(row, shape, book, k + 16 * octaves, largest, codes, numbers, state) <= budget:
                k += 16 * octaves
            else:
                _probe(row, shape, book, k, largest, codes, numbers, state)
    alone = _code(largest, simd.load1_fp32(field(book, INVERSES) + 4 * k)) == 0
    simd.store_long(state + 8 * STEP, 0 if alone else k)
    simd.store_long(state + 8 * ALONE, 1 if alone else 0)


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


@inline
def _copy(src, n, dst):
    full = n & ~63
    for i in range(0, full, 64):
        simd.store_words(dst + i, simd.load_words(src + i))
    for i in range(full, n):
        simd.store_byte(dst + i, simd.load_byte(src + i))


@part
def _merge(one, forward, two, back, dst, size):
    """Put `forward` bits from `one` on and `back` bits before `two` into `size` bytes, zeros between them."""
    ahead, behind = (forward + 7) >> 3, (back + 7) >> 3
    shared = long_max(0, ahead + behind - size)
    _copy(one, ahead, dst)
    for i in range(ahead, size - behind):
        simd.store_byte(dst + i, 0)
    if shared:
        simd.store_byte(dst + ahead - 1, simd.load_byte(one + ahead - 1) | simd.load_byte(two - behind))
    _copy(two - behind + shared, behind - shared, dst + size - behind + shared)


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


@inline
def _unpack(src, n, raw, lowest):
    """Inverse of `_pack`."""
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


@inline
def _two(window, table, out):
    """Decode the one or two codes at the lowest bits of a window; returns the entry."""
    entry = simd.load_word(table + 4 * (window & _WINDOW))
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
        entry = simd.load_word(table + 4 * (simd.load_long(at + (bit >> 3)) >> (bit & 7) & _WINDOW))
        simd.store_byte(out, entry)
        bit += entry >> 28 & 15
        out += 1
    return bit


@part
def _finish_back(at, bit, table, out, end):
    """Decode what is left of a stream that runs back."""
    while out < end:
        window = simd.load_long(at + ((bit + 7) >> 3) - 8) << (-bit & 7) >> 64 - PEEK
        entry = simd.load_word(table + 4 * (window & _WINDOW))
        simd.store_byte(out, entry)
        bit -= entry >> 28 & 15
        out += 1


@Op
def read_row(src, shape, book, copy, numbers, lowest, state):
    """Read the streams of a payload: upper parts of codes, int8, -128 for an escape; `lowest` bits, a byte each."""
    n, size, header, run = field(shape, COLS), field(shape, SIZE), field(shape, HEADER), field(shape, RUN)
    head = (simd.load_byte(src) & 255) | (simd.load_byte(src + 1) & 255) << 8 | (simd.load_byte(src + 2) & 255) << 16
    k, table, width = head & 0xFFF, long_min(head >> 12 & 0x3F, _LAST_EDGE), head >> 18 & 0x1F
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
    _copy(src, size, payload)
    front = long_min(header + (field(shape, PLANES + raw) >> 3), size)
    if raw:
        _unpack(payload + header, n, raw, lowest)
    forward = field(book, READ_FORWARD) + base * 4 * (_WINDOW + 1)
    back = field(book, READ_BACK) + base * 4 * (_WINDOW + 1)
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
