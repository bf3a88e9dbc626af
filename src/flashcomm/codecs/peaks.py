"""``nfB+peaks``: the largest values of a row as bf16 with their places, all others transformed, in Gaussian levels.

A row of real sums has a few huge values in places that change; without them, and transformed in blocks of 64, it looks
Gaussian. So one scale per row serves levels that are best for a Gaussian (Lloyd-Max), and no group has metadata. Per
row of H values, all in fp32:

    peaks   the max(1, floor(H / 128)) largest magnitudes, of equal ones the first; sent as bf16, with their places
    z       the row with 0 in those places, transformed as by `hadamard` in groups of 64
    cover   max|z| / reach, at least 2**-126. The reach is half a spacing beyond the last level: with this scale no
            value is further from its level than half a spacing
    cell    floor(256 * (|z| * (1 / cover))), at most 1023; 2 * sum(cells) + H is the mean |z| in 512ths of cover * H
    scale   the standard deviation of a Gaussian of that mean, but at least 3/4 of cover; rounded up to bf16, at least
            2**-126; 0 where z is 0
    cell    floor(256 * (|z| * (1 / scale))), at most 1023
    code    the number of the level that is nearest to the middle of the cell, the smaller of two; the upper half of
            the codes for z >= 0, the lower half, downward, for z < 0
    value   level * scale, an exact product, transformed back; peaks replace what stands in their places

So a |z| lies within 4/3 of the reach. What is beyond the reach gets the last level, and `step` says so.

A payload has the codes as bit planes, the scale, the peaks, and the places, ascending: ceil(log2(H)) bits each, packed
like codes eight bits at a time, lowest first. So ``nf4`` has 4 + (16 + 26 * 4) / 576 = 4.21 bits in rows of 576.

A row with a NaN, an Inf or a magnitude above 1.25 * 2**126 has a NaN as scale, zeros elsewhere, and decodes to NaN.

Source: levels by Lloyd (1982) and Max (1960) for the unit Gaussian; a rotation before them as in TurboQuant
(arXiv 2504.19874); peaks, the scale between both and the exact arithmetic are our own.

Shape legend: T rows, H columns, K peaks of a row.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.cast import spacing
from flashcomm.codecs.groups import TINY, bits_of, from_bits, like
from flashcomm.codecs.hadamard import butterflies, by_block

EVERY = 128
"""Values of a row for each of which one peak is kept."""
BLOCK = 64
"""Values that are transformed together."""
CELLS = 1024
"""Entries of the table from |z| / scale, in steps of 1 / 256, to levels."""
LEAST = 0.75
"""The least part of the scale that covers all values which is taken."""
PER_CELL = math.sqrt(math.pi / 2) / 512
"""Standard deviation of a Gaussian in units of a scale, for each 1 of the mean of 2 * cell + 1; fp64."""
TOO_LARGE = 0x7E200000
"""The pattern of the largest magnitude that is sent, 1.25 * 2**126."""
_NAN_BF16 = 0x7FC0

# The positive half of the levels of 2**B codes in 4096ths of the standard deviation: fixed points of Lloyd's iteration.
LEVELS = {
    3: (1004, 3097, 5505, 8814),
    4: (526, 1589, 2690, 3860, 5146, 6628, 8475, 11193),
    5: (270, 811, 1357, 1912, 2478, 3060, 3664, 4296, 4964, 5678, 6456, 7321, 8310, 9493, 11023, 13356),
    6: (
        *(137, 411, 685, 961, 1238, 1517, 1798, 2082, 2370, 2661, 2957, 3258, 3565, 3880, 4201, 4532),
        *(4873, 5226, 5592, 5973, 6373, 6794, 7240, 7717, 8231, 8793, 9417, 10122, 10946, 11950, 13273, 15336),
    ),
}


@cache
def levels(bits: int) -> list[float]:
    """All levels, ascending: the values of the codes.

    >>> levels(3)[:3]
    [-2.15185546875, -1.343994140625, -0.756103515625]
    """
    upper = [level / 4096 for level in LEVELS[bits]]
    return [-level for level in reversed(upper)] + upper


@cache
def table(bits: int) -> list[int]:
    """The number of the positive level for each cell.

    >>> table(3)[126:130]  # between 1004 and 3097 lies 2050.5 = 16 * 128.2; the middle of cell 128 is 2056
    [0, 0, 1, 1]
    """
    # A cell's middle is (cell + 1/2) * 16; `min` takes the first of equals.
    return [min(range(2 ** (bits - 1)), key=lambda i: abs(LEVELS[bits][i] - 16 * c - 8)) for c in range(CELLS)]


@cache
def reach(bits: int) -> float:
    """|z| / scale up to which a level is within half a spacing: half a spacing beyond the last one.

    >>> reach(3)
    2.5557861328125
    """
    before, last = LEVELS[bits][-2:]
    return (last + (last - before) / 2) / 4096


@cache
def spacings(bits: int) -> list[float]:
    """The spacing around each code in units of the scale: twice the largest distance of a value from its level.

    >>> [round(256 * spacing) for spacing in spacings(3)][4:]
    [132, 152, 208, 208]
    """
    upper = LEVELS[bits]
    gaps = [2 * upper[0], *(b - a for a, b in itertools.pairwise(upper)), upper[-1] - upper[-2]]
    # The middle of two levels may lie anywhere in its cell, whose middle decides.
    around = [max(pair) / 4096 + 2.0**-8 for pair in itertools.pairwise(gaps)]
    return around[::-1] + around


@dataclass(frozen=True, slots=True)
class Peaks(Codec):
    """``nf{bits}+peaks``: see the module's docstring.

    By hand: of [0, -8, 0, 0] the peak is -8 at place 1, and nothing is left: all codes are the lowest level of the
    upper half, 4, whose planes of two bits and of one are 0x00 and 0x0f; then come the scale 0x0000, the peak 0xc100,
    low byte first, and the place.

    >>> Peaks(bits=3).encode(torch.tensor([[0.0, -8.0, 0.0, 0.0]])).tolist()
    [[0, 15, 0, 0, 0, 193, 1]]
    """

    bits: int

    def __post_init__(self):
        if self.bits not in LEVELS:
            raise ValueError(f"Gaussian levels have {min(LEVELS)} to {max(LEVELS)} bits, not {self.bits}")

    def __str__(self) -> str:
        return f"nf{self.bits}+peaks"

    def count(self, cols: int) -> int:
        """Number of peaks of a row, K."""
        return max(1, cols // EVERY) if cols else 0

    def place_widths(self, cols: int) -> list[int]:
        """The widths of the parts of which a place is made, lowest first."""
        bits = max(1, (cols - 1).bit_length())
        return [min(8, bits - start) for start in range(0, bits, 8)]

    def sections(self, cols: int) -> list[int]:
        """Bytes of the codes, the scale, the peaks, and each part of the places."""
        count = self.count(cols)
        places = [planes.code_bytes(count, width) for width in self.place_widths(cols)]
        return [planes.code_bytes(cols, self.bits), 2, 2 * count, *places]

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return sum(self.sections(cols)) if cols else 0

    def _describe(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """fp32 [T, H] -> places [T, K] int64, z [T, H], scale [T, 1], and whether the row is NaN, [T, 1]."""
        magnitude = bits_of(x) & 0x7FFFFFFF
        bad = (magnitude > TOO_LARGE).any(1, keepdim=True)
        order = torch.sort(magnitude, dim=1, descending=True, stable=True).indices
        places = order[:, : self.count(x.shape[1])].sort(1).values.masked_fill(bad, 0)
        rest = x.scatter(1, places, 0.0).masked_fill(bad, 0.0)
        z = by_block(BLOCK, lambda block: butterflies(block * (1.0 / block.shape[-1])), rest)
        largest = z.abs().amax(1, keepdim=True)
        cover = torch.maximum(largest / like(largest, reach(self.bits)), like(largest, TINY))
        total = _cells(z, like(cover, 1.0) / cover).sum(1, keepdim=True)
        ratio = ((2 * total + z.shape[1]).double() * PER_CELL / z.shape[1]).float().clamp_min(LEAST)
        scale = torch.maximum(cover * ratio, like(cover, TINY))
        scale = from_bits(torch.where(largest > 0, bits_of(scale) + 0xFFFF >> 16 << 16, 0))
        return places, z, scale, bad

    def _codes(self, z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """[T, H] int32."""
        inverse = torch.where(scale > 0, like(scale, 1.0) / scale, 0.0)
        half = 2 ** (self.bits - 1)
        level = torch.tensor(table(self.bits), dtype=torch.int32, device=z.device)[_cells(z, inverse)]
        return torch.where(z < 0, half - 1 - level, half + level)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        cols = x.shape[1]
        if cols == 0:
            return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
        x = x.float()
        places, z, scale, bad = self._describe(x)
        peaks = x.gather(1, places).to(torch.bfloat16).masked_fill(bad, 0.0)
        codes = self._codes(z, scale).masked_fill(bad, 0)
        sent = (bits_of(scale) >> 16 & 0xFFFF).masked_fill(bad, _NAN_BF16)
        parts = [planes.pack(codes, self.bits), groups.to_bytes(sent, 2), peaks.contiguous().view(torch.uint8)]
        for i, width in enumerate(self.place_widths(cols)):
            parts.append(planes.pack(places >> 8 * i & (1 << width) - 1, width))
        return torch.cat(parts, 1)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        if cols == 0:
            return torch.empty(payload.shape[0], 0, dtype=dtype, device=payload.device)
        codes, scale, peaks, *parts = payload.split(self.sections(cols), 1)
        scale = from_bits(groups.from_bytes(scale, 2) << 16)
        known = torch.tensor(levels(self.bits), dtype=torch.float32, device=payload.device)
        z = known[planes.unpack(codes, cols, self.bits).long()] * scale
        value = by_block(BLOCK, butterflies, z)
        places = torch.zeros(payload.shape[0], self.count(cols), dtype=torch.int64, device=payload.device)
        for i, (part, width) in enumerate(zip(parts, self.place_widths(cols), strict=True)):
            places |= planes.unpack(part, self.count(cols), width).long() << 8 * i
        # A place beyond the row can only come from a broken payload.
        value.scatter_(1, places.clamp_max(cols - 1), from_bits(groups.from_bytes(peaks, 2) << 16))
        return canonical_nan(value.masked_fill(scale.isnan(), float("nan")).to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        cols = x.shape[1]
        if cols == 0:
            return x.float()
        apart, x = spacing(x, torch.bfloat16), x.float()
        places, z, scale, bad = self._describe(x)
        around = torch.tensor(spacings(self.bits), dtype=torch.float32, device=x.device)
        beyond = 2 * (z.abs() - levels(self.bits)[-1] * scale)
        step = torch.maximum(around[self._codes(z, scale).long()] * scale, beyond)
        # As in `hadamard`: the errors of a block's coefficients may add up, and sums of fp32 round.
        rest = x.scatter(1, places, 0.0).abs()
        rounding = (BLOCK.bit_length() + 4) * 2.0**-22 * (rest + z.abs() + step) + 2.0**-140
        total = lambda block: block.sum(-1, keepdim=True).expand_as(block)  # noqa: E731
        bound = by_block(BLOCK, total, step * (1 + 2.0**-13) + rounding)
        largest = by_block(BLOCK, lambda block: block.amax(-1, keepdim=True).expand_as(block), rest)
        bound = bound.masked_fill(~(largest + bound / 2 < 3e38), float("nan"))
        bound = bound.scatter(1, places, apart.gather(1, places))
        return bound.masked_fill(bad, float("nan"))


def _cells(z: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """fp32 [T, H] -> int64."""
    return (z.abs() * inverse * 256.0).clamp_max(CELLS - 1).to(torch.int64)
