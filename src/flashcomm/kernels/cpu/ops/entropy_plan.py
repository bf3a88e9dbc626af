"""The plan of an entropy-coded row: its step, its table and its codes. See `entropy`."""

from flashcomm.codecs.entropy_layout import BISECTIONS, FLOOR, GUESS, GUESSES, LADDER, LARGEST, OCTAVES
from flashcomm.codecs.entropy_layout import NAN as NAN_STEP
from flashcomm.codecs.entropy_tables import MANTISSAS
from flashcomm.kernels.cpu import simd
from flashcomm.kernels.cpu.ops.base import MAGNITUDE, ROUND, Op, f32, inline, part
from flashcomm.kernels.cpu.ops.entropy import (
    ALONE,
    BUDGET,
    CAP,
    COLS,
    EDGE,
    ESCAPE,
    ESCAPES,
    FACT_FIELDS,
    FACTS,
    FIRST,
    INVERSES,
    LAST,
    LAST_EDGE,
    LIMIT,
    MANTISSA,
    NUM_RISES,
    PLANES,
    RAW_BITS,
    RISE_FIELDS,
    RISES,
    ROOM,
    SHARED,
    STEP,
    STEPS,
    TABLE,
    WIDTH,
)
from flashcomm.kernels.cpu.simd import field, long_max, long_min

_ROUND_BITS = 0x4B400000
_ONE = MANTISSAS[0]


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
    while table < LAST_EDGE and mean >= field(edges, table):
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
