"""Entropy-coded rows: the numbers that their ops share. `codecs.entropy` has the format.

    entropy_plan    plan_row    the step, the table and the codes of a row: rate control in passes of integers
    entropy_write   write_row   header, planes and streams
    entropy_read    read_row    the streams of a row, two codes to a look-up, two or four streams at a time
                    read_codes  codes times the step

`shape` and `book` are addresses of int64 that `huffman` makes: what is known of the row's length, and where the tables
are. `state` is what an op tells the next one of the row.
"""

from flashcomm.codecs.entropy_layout import PEEK, RAW, TOP

LAST_EDGE = 4 * RAW + TOP
WINDOW = (1 << PEEK) - 1

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
