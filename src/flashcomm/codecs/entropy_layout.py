"""The parts of an entropy-coded row: its ladder of steps, its tables of codes, and where its planes and streams lie.

Apart from `entropy` because the rate control, the streams and the CPU kernels all need it.

Source: our own; canonical codes by Schwartz and Kallick (1964).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.entropy_tables import EDGES, ESCAPES, LENGTHS, MANTISSAS

SECOND_PAIR = 1024
"""Values of a row from which on it has four streams."""

LARGEST = 0x7EF00000
"""Pattern of the largest magnitude, 1.875 * 2**126: twice that is still below a step that fp32 holds."""

LADDER, BEYOND = 4032, 4064
"""Number of steps, of which the smallest is 2**-126. Larger ones only bound what became zero."""

NAN = 4095
OCTAVES = 19
"""The smallest step that is tried for a row is so many octaves below twice its largest magnitude."""

GUESSES, BISECTIONS = 6, 9
"""Probes of the rate control: secant steps, then halvings of what is left of OCTAVES."""

PEEK = 11
"""Longest code in bits."""

RAW = 7
"""Most lowest bits of a code that are sent as planes."""

TOP = len(LENGTHS) - 1
EDGES_ALL = (*EDGES, *(edge << octave for octave in range(1, RAW + 1) for edge in EDGES[-4:]))
"""`EDGES`, and those of the last four tables with one to seven raw bits."""

GUESS = 43
"""Sixteenths of an octave from the mean exponent to the step, beside the bits: measured on Gaussian rows."""

FLOOR = 32
"""Steps below the one that the rate control found from which on a row's own grid is looked for."""


class Canonical(NamedTuple):
    """Codes of one table in the order of their words.

    Args:
        lengths: bits of the code 0, -1, 1, -2, ..., then of the escape for all that follow: 65 numbers.
        words: the codes' words, first bit highest.
        place: number of the code of each window of PEEK bits; the escape's is 64.
        limit: number of codes that do not escape.
    """

    lengths: tuple[int, ...]
    words: tuple[int, ...]
    place: tuple[int, ...]
    limit: int


@lru_cache(maxsize=32)
def canonical(table: int) -> Canonical:
    """The canonical Huffman code of one table (Schwartz and Kallick, 1964)."""
    lengths, escape = LENGTHS[table], ESCAPES[table]
    order = sorted([(length, number) for number, length in enumerate(lengths)] + [(escape, 64)])
    word, words, place, before = 0, {}, [], order[0][0]
    for length, number in order:
        word <<= length - before
        before, words[number] = length, word
        place += [number] * (1 << PEEK - length)
        word += 1
    assert len(place) == 1 << PEEK, "the code is not complete"
    behind = 65 - len(lengths)
    return Canonical(
        (*lengths, *[escape] * behind),
        (*(words[number] for number in range(len(lengths))), *[words[64]] * behind),
        tuple(place),
        len(lengths),
    )


def step_pattern(k: int) -> int:
    """The pattern of step k, 1 to 4,064, a finite fp32."""
    return MANTISSAS[(k - 1) % 16] + ((k - 1) // 16 - 126 << 23)


def raw_bits(table: int) -> int:
    """Lowest bits of a code that are sent as planes, of a row's table 0 to 42."""
    return max(0, (table - TOP + 3) // 4)


class Layout(NamedTuple):
    """Where the parts of a row of `cols` values lie.

    Args:
        header: bytes before the planes.
        run: values of a stream; the last ones may have fewer.
        budget: bits of planes, words and records that always fit.
        cap: magnitude at which a code counts for the mean, so that outliers do not choose the table.
    """

    header: int
    run: int
    budget: int
    cap: int


def layout(cols: int, payload_bytes: int) -> Layout:
    """Where the parts of a row lie."""
    pairs = 2 if cols >= SECOND_PAIR else 1
    header = 3 + (0 if pairs == 1 else 2 if payload_bytes < 1 << 16 else 4)
    run = -(-cols // (32 * pairs)) * 16
    room = 8 * (payload_bytes - header)
    return Layout(header, run, room - 7 * (pairs - 1), 2 << min(room // max(cols, 1), 12))


class Constants(NamedTuple):
    steps: torch.Tensor
    inverses: torch.Tensor
    edges: torch.Tensor
    lengths: torch.Tensor
    words: torch.Tensor
    place: torch.Tensor
    limits: torch.Tensor
    escapes: torch.Tensor


@lru_cache(maxsize=64)
def constants(device: torch.device) -> Constants:
    """The tables on a device: copied once, since a copy from the host cannot be part of a CUDA graph."""
    whole = lambda numbers, dtype=torch.int64: torch.tensor(numbers, dtype=dtype, device=device)  # noqa: E731
    tables = [canonical(table) for table in range(TOP + 1)]
    steps = whole([0, *(step_pattern(k) for k in range(1, BEYOND + 1))], torch.int32).view(torch.float32)
    inverses = torch.zeros_like(steps)
    inverses[1 : LADDER + 1] = groups.like(steps[1 : LADDER + 1], 1.0) / steps[1 : LADDER + 1]
    return Constants(
        steps,
        inverses,
        whole(EDGES_ALL),
        whole([t.lengths for t in tables]),
        whole([t.words for t in tables]),
        whole([t.place for t in tables]),
        whole([t.limit for t in tables]),
        whole(ESCAPES),
    )


@lru_cache(maxsize=256)
def plane_bits(cols: int, device: torch.device) -> torch.Tensor:
    """Bits of no plane to RAW planes of a row, int64 [RAW + 1]."""
    sizes = [8 * raw * planes.code_bytes(cols, 1) for raw in range(RAW + 1)]
    return torch.tensor(sizes, dtype=torch.int64, device=device)


def raw_of(table: torch.Tensor) -> torch.Tensor:
    """`raw_bits` of each row's table."""
    return torch.div(table - TOP + 3, 4, rounding_mode="floor").clamp_min(0)


def split(q: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -> their upper parts as 0, -1, 1, ... counted from 0, and their lowest bits."""
    half = (1 << raw[:, None]) >> 1
    z = q + half >> raw[:, None]
    return z << 1 ^ z >> 63, q + half - (z << raw[:, None])


def runs_of(cols: int, shape: Layout) -> list[tuple[int, int]]:
    """First and last value of each stream."""
    count = 4 if cols >= SECOND_PAIR else 2
    return [(min(i * shape.run, cols), min((i + 1) * shape.run, cols)) for i in range(count)]
