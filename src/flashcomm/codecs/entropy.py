"""Entropy-coded rows of exactly B bits per value: ``ec8`` to ``ec3``, and every eighth of a bit in between.

One uniform step per row, codes q = round(x / step), and a Huffman code for q from fifteen static tables. The step is
the smallest of a ladder, sixteen to an octave, with which the row fits its slot. So an outlier costs some ten bits
once, where a group with a shared range gives up bits of all its values. Every row has the same size, and depends on
nothing but its own values.

All decisions follow from integers, and the only rounded operation is the product x * (1 / step), whose reciprocals are
exact to 2**-36. So every backend writes the same bytes.

A row that lies on the grid of a step already, such as one that was decoded before, is sent without loss. An all-reduce
to which one rank alone contributes rounds once, not twice.

    row      header, planes, first pair, second pair (rows of at least 1,024 values only)
    header   3 bytes: step 12 bits (0: zeros, 4095: NaN), table 6 bits, width of a record 5 bits; then the size of the
             first pair in bytes, if there are two
    planes   the lowest bits of q, one to seven planes as `bits` packs single bits, where the mean code is above 6
    pair     one stream from the front, the records of the row behind it (first pair), one stream from the back

A stream has the codes of a quarter or a half of the row. Streams from both ends need no offsets, and several are
decoded at a time. A record is the excess of a code that is beyond its table, which holds an escape for it.

Hazard: a NaN or Inf, or a value beyond 1.875 * 2**126, makes its row NaN, as there are no groups.

Source: entropy-coded scalar quantisation (Gish and Pierce, 1968); rate control by bisection, streams from both ends and
grids that survive are our own.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.entropy_tables import EDGES, ESCAPES, LENGTHS, MANTISSAS
from flashcomm.codecs.groups import bits_of, from_bits

FEWEST, MOST = 20, 80
"""Eighths of a bit per value that are allowed."""

LEAST_BYTES = 16
"""Size of the shortest payload."""

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


class _Constants(NamedTuple):
    steps: torch.Tensor
    inverses: torch.Tensor
    edges: torch.Tensor
    lengths: torch.Tensor
    words: torch.Tensor
    place: torch.Tensor
    limits: torch.Tensor
    escapes: torch.Tensor


@lru_cache(maxsize=64)
def _constants(device: torch.device) -> _Constants:
    """The tables on a device: copied once, since a copy from the host cannot be part of a CUDA graph."""
    whole = lambda numbers, dtype=torch.int64: torch.tensor(numbers, dtype=dtype, device=device)  # noqa: E731
    tables = [canonical(table) for table in range(TOP + 1)]
    steps = whole([0, *(step_pattern(k) for k in range(1, BEYOND + 1))], torch.int32).view(torch.float32)
    inverses = torch.zeros_like(steps)
    inverses[1 : LADDER + 1] = groups.like(steps[1 : LADDER + 1], 1.0) / steps[1 : LADDER + 1]
    return _Constants(
        steps,
        inverses,
        whole(EDGES_ALL),
        whole([t.lengths for t in tables]),
        whole([t.words for t in tables]),
        whole([t.place for t in tables]),
        whole([t.limit for t in tables]),
        whole(ESCAPES),
    )


@dataclass(frozen=True, slots=True)
class Entropy(Codec):
    """``ecB``: B bits per value, `eighths` / 8 of them.

    Rows shorter than about 128 / B values take 16 bytes.

    >>> codec = Entropy(34)
    >>> str(codec), codec.payload_bytes(4096), codec.bits_per_value(4096)
    ('ec4.25', 2176, 4.25)
    >>> x = torch.tensor([[0.5, -1.0, 3.0, 1000.0]])
    >>> codec.decode(codec.encode(x), 4, torch.float32).tolist()  # on the grid of 1/2, so without loss
    [[0.5, -1.0, 3.0, 1000.0]]

    Args:
        eighths: 20 to 80.

    Raises:
        ValueError: fewer or more bits.
    """

    eighths: int

    def __post_init__(self):
        if not FEWEST <= self.eighths <= MOST:
            raise ValueError(
                f"entropy-coded rows have {FEWEST / 8:g} to {MOST / 8:g} bits per value, in eighths, such as ec4.25 or "
                f"ec6, not {self.eighths / 8:g}"
            )

    def __str__(self) -> str:
        return f"ec{self.eighths / 8:g}"

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return max(self.eighths * cols // 64, LEAST_BYTES) if cols else 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        size = self.payload_bytes(x.shape[1])
        if x.numel() == 0:
            return torch.empty(x.shape[0], size, dtype=torch.uint8, device=x.device)
        return torch.cat([_encode(part.float(), size) for part in x.split(_rows_at_once(x.shape[1]))])

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        if payload.numel() == 0:
            return torch.empty(payload.shape[0], cols, dtype=dtype, device=payload.device)
        parts = [_decode(part, cols) for part in payload.split(_rows_at_once(cols))]
        return canonical_nan(torch.cat(parts).to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x.float()
        size = self.payload_bytes(x.shape[1])
        return torch.cat([_spacing(part.float(), size) for part in x.split(_rows_at_once(x.shape[1]))])


def _rows_at_once(cols: int) -> int:
    """Rows for which the specification's tables of bits fit into some hundred megabytes."""
    return max(1, (1 << 20) // cols)


class _Coded(NamedTuple):
    """A row's codes with one step: all [T] but the codes, [T, H]."""

    q: torch.Tensor
    table: torch.Tensor
    width: torch.Tensor
    bits: torch.Tensor


def _quantise(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """fp32 [T, H] and steps [T] -> the codes, int64."""
    return torch.round(x * _constants(x.device).inverses[k][:, None]).to(torch.int64)


def _raw(table: torch.Tensor) -> torch.Tensor:
    return torch.div(table - TOP + 3, 4, rounding_mode="floor").clamp_min(0)


def _split(q: torch.Tensor, raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes -> their upper parts as 0, -1, 1, ... counted from 0, and their lowest bits."""
    half = (1 << raw[:, None]) >> 1
    z = q + half >> raw[:, None]
    return z << 1 ^ z >> 63, q + half - (z << raw[:, None])


def _measure(q: torch.Tensor, size: int) -> _Coded:
    """Choose the table of a row of codes, and count its bits."""
    c, cols = _constants(q.device), q.shape[1]
    shape = layout(cols, size)
    magnitude = q.abs()
    mean = torch.div(256 * magnitude.clamp_max(shape.cap).sum(1), cols, rounding_mode="floor")
    table = (mean[:, None] >= c.edges).sum(1)
    raw = _raw(table)
    base = table - 4 * raw
    number, _ = _split(q, raw)
    limit = c.limits[base]
    words = c.lengths[base].gather(1, number.clamp_max(64)).sum(1)
    # The width follows from the largest magnitude, whatever its sign.
    excess = _split(magnitude.amax(1, keepdim=True), raw)[0][:, 0] - limit
    width = torch.where(excess >= 0, _bit_length(excess.clamp_min(1)), 0)
    escapes = (number >= limit[:, None]).sum(1)
    return _Coded(q, table, width, words + escapes * width + _plane_bits(cols, q.device)[raw])


@lru_cache(maxsize=256)
def _plane_bits(cols: int, device: torch.device) -> torch.Tensor:
    sizes = [8 * raw * planes.code_bytes(cols, 1) for raw in range(RAW + 1)]
    return torch.tensor(sizes, dtype=torch.int64, device=device)


def _bit_length(n: torch.Tensor) -> torch.Tensor:
    """Bits of integers from 1 to 2**24."""
    return (bits_of(n.float()) >> 23).long() - 126


class _Reach(NamedTuple):
    """Limits of each row's step, from its largest magnitude and its mean exponent, all [T]."""

    bad: torch.Tensor
    zero: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    guess: torch.Tensor


def _reach(x: torch.Tensor, size: int) -> _Reach:
    """The steps that a row may have: `first` to `last`, of which `last` makes all codes 0, and a guess."""
    pattern = bits_of(x) & 0x7FFFFFFF
    most = pattern.amax(1)
    bad = most > LARGEST
    most = most.masked_fill(bad, 0)
    # The ladder's first step that is not below twice the largest magnitude.
    twice = bits_of(2 * from_bits(most))
    mantissas = [pattern - MANTISSAS[0] for pattern in MANTISSAS]
    above = sum((twice & 0x7FFFFF > mantissa).long() for mantissa in mantissas)
    last = (16 * ((twice >> 23) - 1).long() + 1 + above).clamp_min(1)
    first = (last - 16 * OCTAVES).clamp_min(1)
    # From the mean exponent, which no outlier moves far.
    exponent = (pattern >> 23).long()
    exponent = torch.maximum(exponent, exponent.amax(1, keepdim=True) - 24)
    mean = torch.div(16 * exponent.sum(1), x.shape[1], rounding_mode="floor")
    room = min(128 * size // x.shape[1], 384)
    return _Reach(bad, most == 0, first, last, torch.minimum(torch.maximum(mean - room + GUESS, first), last))


def _rate(x: torch.Tensor, reach: _Reach, size: int) -> torch.Tensor:
    """The rate control: a step with which each row fits its slot, while it does not with the next smaller one."""
    cols, budget = x.shape[1], layout(x.shape[1], size).budget
    # Beyond the ladder only the last step serves, which makes everything 0.
    below, fits, k = reach.first - 1, reach.last.clamp_max(LADDER + 1), reach.guess
    for probe in range(GUESSES + BISECTIONS):
        # The number of probes is fixed where asking for their outcome would wait for a device.
        if x.device.type == "cpu" and not (fits - below > 1).any():
            break
        k = torch.minimum(torch.maximum(k, below + 1), torch.maximum(fits - 1, below + 1))
        over = _measure(_quantise(x, k), size).bits - budget
        fits = torch.where((over <= 0) & (k < fits), k, fits)
        below = torch.where((over > 0) & (k > below) & (k < fits), k, below)
        secant = k + torch.div(16 * over, cols, rounding_mode="floor")
        secant = torch.where(over > 0, torch.maximum(secant, k + 1), secant)
        k = secant if probe < GUESSES - 1 else torch.div(below + fits, 2, rounding_mode="floor")
    return torch.where(fits > LADDER, reach.last, fits)


def _own_grid(x: torch.Tensor, reach: _Reach, k: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The coarsest step on whose grid each row lies without error, and whether there is one with which it fits.

    Steps a whole number of octaves apart have nested grids, so there are sixteen families. The smallest magnitude tells
    which of them may serve, from their finest steps on; at most two are tried.
    """
    c = _constants(x.device)
    pattern = bits_of(x) & 0x7FFFFFFF
    least = from_bits(pattern.masked_fill(pattern == 0, 0x7F000000).amin(1))
    start = torch.maximum(torch.maximum(reach.first - 16, k - FLOOR), torch.ones_like(k))
    family = torch.minimum(
        start[:, None] + torch.arange(16, dtype=torch.int64, device=x.device), torch.full_like(start, LADDER)[:, None]
    )
    codes = torch.round(least[:, None] * c.inverses[family])
    may = (codes >= 1) & (codes * c.steps[family] == least[:, None])
    found, best = torch.zeros_like(k, dtype=torch.bool), k
    for _ in range(2):
        place = may.long().argmax(1)
        finest = (start + place).clamp_max(LADDER)
        q = _quantise(x, finest)
        on_grid = may.any(1) & ~found & (q.float() * c.steps[finest][:, None] == x).all(1)
        best = torch.where(on_grid, finest + 16 * _common_octaves(q, finest), best)
        found = found | on_grid
        may.scatter_(1, place[:, None], False)
    fits = _measure(_quantise(x, best), size).bits <= layout(x.shape[1], size).budget
    return best, found & fits


def _common_octaves(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[T, H] codes of step k -> [T]: how often 2 divides all codes of a row, as far as the ladder goes; 0 for zeros."""
    odd = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
    shared = torch.ones_like(odd, dtype=torch.bool)
    for octave in range(OCTAVES + 3):
        shared = shared & (q & (2 << octave) - 1 == 0).all(1)
        odd = odd + shared
    odd = torch.minimum(odd, torch.div((LADDER - k).clamp_min(0), 16, rounding_mode="floor"))
    return odd.masked_fill((q == 0).all(1), 0)


def _choose(x: torch.Tensor, size: int) -> tuple[torch.Tensor, _Coded, _Reach]:
    """The step of each row, 0 for zeros alone and NAN for a bad row, its codes and its reach; `x` is clean."""
    reach = _reach(x, size)
    x = x.masked_fill(reach.bad[:, None], 0.0)
    k = _rate(x, reach, size)
    own, found = _own_grid(x, reach, k, size)
    k = torch.where(found, own, k)
    # The same row on its coarsest grid, so that encoding what was decoded finds it.
    q = _quantise(x, k)
    octaves = _common_octaves(q, k).masked_fill(found, 0)
    fewer = _measure(q >> octaves[:, None], size)
    octaves = octaves.masked_fill(fewer.bits > layout(x.shape[1], size).budget, 0)
    coded = _measure(q >> octaves[:, None], size)
    return k + 16 * octaves, coded, reach


def _spacing(x: torch.Tensor, size: int) -> torch.Tensor:
    k, _, reach = _choose(x, size)
    step = _constants(x.device).steps[k].masked_fill(reach.zero, 0.0).masked_fill(reach.bad, float("nan"))
    return step[:, None].expand(x.shape)


def _runs(cols: int, shape: Layout) -> list[tuple[int, int]]:
    """First and last value of each stream."""
    count = 4 if cols >= SECOND_PAIR else 2
    return [(min(i * shape.run, cols), min((i + 1) * shape.run, cols)) for i in range(count)]


def _encode(x: torch.Tensor, size: int) -> torch.Tensor:
    rows, cols = x.shape
    c, shape = _constants(x.device), layout(cols, size)
    k, coded, reach = _choose(x, size)
    raw = _raw(coded.table)
    number, lowest = _split(coded.q, raw)
    base = coded.table - 4 * raw
    limit = c.limits[base][:, None]
    lengths, words = (t[base].gather(1, number.clamp_max(64)) for t in (c.lengths, c.words))
    escapes = number >= limit
    # One place more, for what is not there.
    end = 8 * size
    bit = torch.zeros(rows, end + 1, dtype=torch.uint8, device=x.device)

    def put(first, direction, n, value, high_first):
        """Write the n lowest bits of each value, one after the other from `first` on."""
        for i in range(PEEK if high_first else 24):
            here = value >> ((n - 1 - i).clamp_min(0) if high_first else i) & 1
            at = torch.where(i < n, first + direction * i, end)
            bit.scatter_(1, at, here.to(torch.uint8))

    plane_bytes = (_plane_bits(cols, x.device)[raw] >> 3)[:, None]
    front = 8 * (shape.header + plane_bytes)
    runs = _runs(cols, shape)
    total = [lengths[:, a:b].sum(1, keepdim=True) for a, b in runs]
    records = escapes.sum(1, keepdim=True) * coded.width[:, None]
    middle = front + (total[0] + total[1] + records + 7 >> 3 << 3) if len(runs) > 2 else torch.full_like(front, end)
    for i, (a, b) in enumerate(runs):
        offset = lengths[:, a:b].cumsum(1) - lengths[:, a:b]
        start = (front, middle - 1, middle, torch.full_like(front, end - 1))[i]
        direction = 1 - 2 * (i % 2)
        put(start + direction * offset, direction, lengths[:, a:b], words[:, a:b], True)
    order = escapes.cumsum(1) - 1
    width = torch.where(escapes, coded.width[:, None], 0)
    put(front + total[0] + order * width, 1, width, number - limit, False)
    payload = (
        bit[:, :end].unflatten(1, (size, 8)).to(torch.int32) << torch.arange(8, dtype=torch.int32, device=x.device)
    ).sum(2)
    zero = (coded.q == 0).all(1)
    head = k | coded.table << 12 | coded.width << 18
    payload[:, :3] = groups.to_bytes(head[:, None], 3)
    if len(runs) > 2:
        payload[:, 3 : shape.header] = groups.to_bytes(middle - front >> 3, shape.header - 3)
    length = planes.code_bytes(cols, 1)
    for n in range(RAW):
        packed = planes.pack(lowest >> n & 1, 1)
        part = payload[:, shape.header + n * length :][:, :length]
        part.copy_(torch.where((raw > n)[:, None], packed[:, : part.shape[1]].to(part.dtype), part))
    payload = payload.masked_fill(zero[:, None] | reach.bad[:, None], 0)
    payload[:, :2] = torch.where(
        reach.bad[:, None], groups.to_bytes(torch.full_like(k, NAN)[:, None], 2), payload[:, :2]
    )
    return payload.to(torch.uint8)


def _decode(payload: torch.Tensor, cols: int) -> torch.Tensor:
    _rows, size = payload.shape
    c, shape = _constants(payload.device), layout(cols, size)
    head = groups.from_bytes(payload[:, :3], 3)[:, 0].long()
    k, table, width = head & 0xFFF, (head >> 12 & 0x3F).clamp_max(len(EDGES_ALL)), head >> 18 & 0x1F
    raw = _raw(table)
    base = table - 4 * raw
    plane_bytes = _plane_bits(cols, payload.device)[raw] >> 3
    front = (shape.header + plane_bytes).clamp_max(size)
    runs = _runs(cols, shape)
    bit = (payload[:, :, None].int() >> torch.arange(8, dtype=torch.int32, device=payload.device) & 1).flatten(1)
    middle = torch.full_like(front, size)
    if len(runs) > 2:
        pair = groups.from_bytes(payload[:, 3 : shape.header], shape.header - 3)[:, 0].long() & 0xFFFFFFFF
        middle = torch.minimum(front + pair, middle)
    number, behind = [], front
    for i, (a, b) in enumerate(runs):
        start = (front, middle, middle, torch.full_like(front, size))[i] * 8
        got, after = _stream(bit, start, i % 2 == 1, b - a, base)
        number.append(got)
        behind = after if i == 0 else behind
    number = torch.cat(number, 1)
    escapes = number == 64
    place = behind[:, None] + (escapes.cumsum(1) - 1) * width[:, None]
    excess = torch.zeros_like(number)
    bit = torch.nn.functional.pad(bit, (0, 1))
    for i in range(24):
        at = torch.where((i < width)[:, None] & (place + i < 8 * size), place + i, 8 * size)
        excess = excess | bit.gather(1, at.clamp(0, 8 * size)).long() << i
    number = torch.where(escapes, excess + c.limits[base][:, None], number)
    z = number >> 1 ^ -(number & 1)
    lowest = torch.zeros_like(z)
    length = planes.code_bytes(cols, 1)
    for n in range(RAW):
        packed = torch.nn.functional.pad(payload[:, shape.header + n * length :][:, :length], (0, length))[:, :length]
        lowest |= torch.where((raw > n)[:, None], planes.unpack(packed, cols, 1).long() << n, 0)
    q = (z << raw[:, None]) + lowest - ((1 << raw[:, None]) >> 1)
    value = q.float() * c.steps[k.clamp_max(LADDER)][:, None]
    value = value.masked_fill((k == 0)[:, None], 0.0)
    return value.masked_fill((k > LADDER)[:, None], float("nan"))


def _stream(
    bit: torch.Tensor, start: torch.Tensor, back: bool, count: int, base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` codes of a stream from bit `start` of each row on, and the bit behind them.

    All places of a row are read at once: where the next code starts is known of each, so by doubling, after n rounds
    the first 2**n codes are.
    """
    c, (rows, end) = _constants(bit.device), bit.shape
    place = torch.arange(end, dtype=torch.int64, device=bit.device)
    window = torch.zeros(rows, end, dtype=torch.int64, device=bit.device)
    if back:
        bit, start = bit.flip(1), end - start
    padded = torch.nn.functional.pad(bit, (0, PEEK))
    for i in range(PEEK):
        window |= padded[:, i : i + end].long() << PEEK - 1 - i
    code = c.place[base].gather(1, window)
    following = (place + c.lengths[base].gather(1, code)).clamp_max(end - 1)
    at = start.clamp(0, end - 1)[:, None]
    while at.shape[1] < count:
        at = torch.cat([at, following.gather(1, at)], 1)
        following = following.gather(1, following)
    at = at[:, :count]
    got = code.gather(1, at) if count else at
    after = at[:, -1] + c.lengths[base].gather(1, got[:, -1:])[:, 0] if count else start
    return got, after
