"""Tables of the entropy-coded formats as the ops read them: words to write, and look-ups of two codes to read.

Source: the codes are those of `codecs.entropy`; tables of several codes to a look-up as in zstd's Huffman decoder.
"""

from functools import cache

import numpy as np

from flashcomm.codecs import bits as planes
from flashcomm.codecs.entropy_layout import (
    BEYOND,
    EDGES_ALL,
    LADDER,
    PEEK,
    RAW,
    SECOND_PAIR,
    TOP,
    canonical,
    layout,
    raw_bits,
    step_pattern,
)
from flashcomm.codecs.entropy_tables import ESCAPES, LENGTHS, MANTISSAS
from flashcomm.kernels.cpu.ops import entropy as ops

_ESCAPE = 128


def shape(cols: int, payload_bytes: int) -> np.ndarray:
    """The sizes in rows of `cols` values, for the ops: int64 [SHAPE_FIELDS]."""
    form = layout(cols, payload_bytes)
    fields = np.zeros(ops.SHAPE_FIELDS, np.int64)
    fields[ops.COLS], fields[ops.SIZE], fields[ops.HEADER], fields[ops.RUN] = cols, payload_bytes, form.header, form.run
    fields[ops.STREAMS] = 4 if cols >= SECOND_PAIR else 2
    fields[ops.BUDGET], fields[ops.CAP] = form.budget, form.cap
    fields[ops.ROOM] = min(128 * payload_bytes // cols, 384)
    for raw in range(1, RAW + 1):
        fields[ops.PLANES + raw] = 8 * raw * planes.code_bytes(cols, 1)
    return fields


@cache
def book() -> int:
    """Address of the addresses of all tables, which live as long as the process."""
    tables = _tables()
    addresses = np.zeros(ops.BOOK_FIELDS, np.int64)
    for field, table in tables.items():
        addresses[field] = table.ctypes.data
    _kept.extend([addresses, *tables.values()])
    return addresses.ctypes.data


_kept: list[np.ndarray] = []


def _tables() -> dict[int, np.ndarray]:
    count = TOP + 1
    steps = np.zeros(4096, np.float32)
    steps[1 : BEYOND + 1] = np.array([step_pattern(k) for k in range(1, BEYOND + 1)], np.int32).view(np.float32)
    inverses = np.zeros(4096, np.float32)
    inverses[1 : LADDER + 1] = np.float32(1) / steps[1 : LADDER + 1]
    facts = np.zeros((count, ops.FACT_FIELDS), np.int64)
    rises = np.zeros((count, ops.RISE_FIELDS), np.uint8)
    low_first, high_first = (np.zeros((count, ops.WORD_FIELDS), np.int32) for _ in range(2))
    forward, back = (np.zeros((count, 1 << PEEK), np.uint32) for _ in range(2))
    reverse = np.array([_reversed(window, PEEK) for window in range(1 << PEEK)])
    for table, (lengths, escape) in enumerate(zip(LENGTHS, ESCAPES, strict=True)):
        code = canonical(table)
        places = [i for i in range(1, len(lengths)) for _ in range(lengths[i] - lengths[i - 1])]
        facts[table, : ops.NUM_RISES + 1] = len(lengths), escape, lengths[0], lengths[-1], len(places)
        rises[table, : len(places)] = places
        numbers = [min(number, code.limit) for number in range(ops.WORD_FIELDS)]
        words, bits = (np.array([values[number] for number in numbers]) for values in (code.words, code.lengths))
        high_first[table] = words | bits << 16
        low_first[table] = [_reversed(word, n) | n << 16 for word, n in zip(words.tolist(), bits.tolist(), strict=True)]
        back[table] = _pairs(code)
        forward[table] = back[table][reverse]
    return {
        ops.STEPS: steps,
        ops.INVERSES: inverses,
        ops.MANTISSA: np.array(MANTISSAS, np.int32),
        ops.EDGE: np.array(EDGES_ALL, np.int64),
        ops.FACTS: facts,
        ops.RISES: rises,
        ops.LOW_FIRST: low_first,
        ops.HIGH_FIRST: high_first,
        ops.READ_FORWARD: forward,
        ops.READ_BACK: back,
        ops.RAW_BITS: np.array([raw_bits(table) for table in range(len(EDGES_ALL) + 1)], np.int64),
    }


def _pairs(code) -> np.ndarray:
    """Entries of all windows, first bit highest: one or two codes as int8, their bits, number, the first's bits."""
    number = np.array(code.place)
    length = np.array(code.lengths)[number]
    value = np.where(number == 64, _ESCAPE, (number >> 1 ^ -(number & 1)) & 0xFF)
    behind = np.arange(1 << PEEK) << length & (1 << PEEK) - 1
    both = length + length[behind]
    two = both <= PEEK
    total, count = np.where(two, both, length), np.where(two, 2, 1)
    return (value | value[behind] << 8 | total << 16 | count << 24 | length << 28).astype(np.uint32)


def _reversed(word: int, bits: int) -> int:
    return int(f"{word:0{bits}b}"[::-1], 2)
