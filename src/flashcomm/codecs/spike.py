"""Spike reserving: ``+spike`` sends the smallest and the largest value of each group as bf16.

The other values span a shorter range, which makes 2 bits usable. Per group, all in fp32:

    low, high   the first smallest and the first largest value, compared by their bf16 rounded down and up; sent as bf16
    a, b        the smallest of the other values rounded down to bf16, the largest rounded up
    anchor      of [low, high], the number nearest to 0
    middle      (a / 2 + b / 2) - anchor
    scale       the larger of (b - a) / (63/64 * 2**bits) and |middle| / (127/64 * 2**bits), rounded up to three bits
                behind the leading one
    centre      middle in units of 2**bits * scale / 64, half to even: -127 to 127
    zero        (anchor + centre * unit) - last / 2 * scale
    code        as in `affine`, clamped to 0 and last, as it may lie half a spacing outside

A symmetric base has the anchor and the centre 0 and the scale 2 * max(|a|, |b|) / (last + 1).

The scale is sent as one byte: 0 for a scale of 0 (all other values equal the anchor), else 1 + its eighths of a binade
above 2**-30 of the larger spike's binade. The centre is one byte, offset by 128. A place takes ceil(log2(group)) bits.
So ``int2g32+spike`` has 2 + (2 * 16 + 8 + 8 + 2 * 5) / 32 = 3.8125 bits. After the codes of a row come low and high of
each group, then all scales, all centres, and the places (low's, high's), packed like codes.

A group with a NaN, an Inf or a magnitude above 1.25 * 2**126 has a NaN as `low` and decodes to NaN.

Source: FlashCommunication V2 (arXiv 2508.03760) for the spikes and for integer metadata. The coding of the metadata is
our own, and so are the levels: the middles of equal parts of the range, whose ends need no level, as the spikes lie
beyond them.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.cast import spacing
from flashcomm.codecs.groups import TINY, bits_of, from_bits, like

MAX_GROUP = 256
_HIGH_HALF = ~0xFFFF
_SMALLEST, _LARGEST = -(1 << 31), (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Spike(Codec):
    """``{base}+spike`` on any affine base with groups of at most 256: see the module's docstring.

    By hand: the smallest is -100 and the largest 64; the others, -63 to 63, need a scale of 126 / (63/64 * 4) = 32
    around the centre 0, so their values are -48, -16, 16 and 48.

    >>> codec = Spike(Affine(bits=2, symmetric=False, group=8))
    >>> codec.decode(codec.encode(torch.tensor([[-100.0, -63.0, -20.0, 20.0, 63.0, 64.0]])), 6, torch.float32).tolist()
    [[-100.0, -48.0, -16.0, 16.0, 48.0, 64.0]]
    """

    base: Affine

    def __post_init__(self):
        if not isinstance(self.base, Affine) or self.base.group > MAX_GROUP:
            raise ValueError(
                f"spikes are kept on an affine format with groups of at most {MAX_GROUP}, such as "
                f"int2g32+spike, not on {self.base}"
            )

    def __str__(self) -> str:
        return f"{self.base}+spike"

    @property
    def group(self) -> int:
        """Values in a group."""
        return self.base.group

    @property
    def place_bits(self) -> int:
        """Bits of a spike's place in its group."""
        return max(1, (self.group - 1).bit_length())

    def sections(self, cols: int) -> list[int]:
        """Bytes of the codes, the spikes, the scales, the centres and the places."""
        count = groups.count(cols, self.group)
        centres = 0 if self.base.symmetric else count
        places = planes.code_bytes(2 * count, self.place_bits)
        return [planes.code_bytes(cols, self.base.bits), 4 * count, count, centres, places]

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return sum(self.sections(cols))

    def segment(self, cols: int) -> int:
        return self.base.segment(cols)

    def _describe(self, x: torch.Tensor) -> "_Groups":
        """fp32 rows [T, H] -> the extremes of each group, and their places."""
        cols = x.shape[1]
        x = groups.by_group(x, self.group)
        index = torch.arange(x.shape[2], dtype=torch.int32, device=x.device)
        real = torch.arange(x.shape[1] * x.shape[2], dtype=torch.int64, device=x.device).view(x.shape[1:]) < cols
        key = _key(x)
        down = (key & _HIGH_HALF | index).masked_fill(~real, _LARGEST)
        up = (key.clamp_max(0x7FFF0000) + 0xFFFF & _HIGH_HALF | 0xFFFF - index).masked_fill(~real, _SMALLEST)
        first, last = down.amin(-1, keepdim=True), up.amax(-1, keepdim=True)
        places = torch.cat([first & 0xFFFF, 0xFFFF - (last & 0xFFFF)], -1)
        low, high = x.gather(-1, places.long()).bfloat16().float().unbind(-1)
        spike = (index == places[..., :1]) | (index == places[..., 1:])
        a = down.masked_fill(spike, _LARGEST).amin(-1)
        b = up.masked_fill(spike, _SMALLEST).amax(-1)
        alone = a == _LARGEST
        a, b = (_from_key((k & _HIGH_HALF).masked_fill(alone, 0)) for k in (a, b))
        bad = ~(x.abs().amax(-1) <= 1.25 * 2.0**126)
        places = places.masked_fill(bad[..., None], 0)
        low, high, a, b = (t.masked_fill(bad, 0.0) for t in (low, high, a, b))
        return _Groups(low, high, a, b, places.flatten(1), spike, bad, alone)

    def _scale(self, g: "_Groups") -> torch.Tensor:
        """The scales' bytes [T, G], int32."""
        bits = self.base.bits
        if self.base.symmetric:
            needed = 2 * torch.maximum(g.a.abs(), g.b.abs()) / like(g.a, self.base.last + 1)
        else:
            middle = g.a * 0.5 + g.b * 0.5 - self._anchor(g.low, g.high)
            span = (g.b - g.a) / like(g.a, 63 * 2.0 ** (bits - 6))
            needed = torch.maximum(span, middle.abs() / like(g.a, 127 * 2.0 ** (bits - 6)))
        needed = needed.masked_fill(g.alone | g.bad, 0.0)
        eighths = (bits_of(needed.clamp_min(TINY)) + 0xFFFFF >> 20) - 8 * _lowest_binade(g.low, g.high)
        return torch.where(needed > 0, eighths.clamp_min(0) + 1, 0)

    def _anchor(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return torch.where(low > 0, low, torch.where(high < 0, high, 0.0))

    def _scale_and_zero(self, low, high, scale_code, centre_code) -> tuple[torch.Tensor, torch.Tensor]:
        scale = from_bits(8 * _lowest_binade(low, high) + scale_code - 1 << 20)
        scale = torch.where(scale_code > 0, scale, 0.0)
        if self.base.symmetric:
            return scale, -self.base.last / 2 * scale
        centre = self._anchor(low, high) + (centre_code - 128).float() * (scale * 2.0 ** (self.base.bits - 6))
        return scale, centre - self.base.last / 2 * scale

    def _centre(self, g: "_Groups", scale_code: torch.Tensor) -> torch.Tensor:
        """The centres' bytes [T, G], int32."""
        middle = g.a * 0.5 + g.b * 0.5 - self._anchor(g.low, g.high)
        unit = from_bits(8 * _lowest_binade(g.low, g.high) + scale_code - 1 << 20) * 2.0 ** (self.base.bits - 6)
        centre = torch.round(middle / unit).clamp(-127, 127)
        return torch.where(scale_code > 0, centre.to(torch.int32) + 128, 128)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        cols = x.shape[1]
        if cols == 0:
            return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
        x = x.float()
        g = self._describe(x)
        scale_code = self._scale(g)
        centre_code = self._centre(g, scale_code)
        scale, zero = self._scale_and_zero(g.low, g.high, scale_code, centre_code)
        inverse = torch.where(scale > 0, like(scale, 1.0) / scale, 0.0)
        spread = [groups.by_value(t, self.group, cols) for t in (zero, inverse, g.bad)]
        code = torch.round((x - spread[0]) * spread[1]).clamp(0, self.base.last).masked_fill(spread[2], 0)
        spikes = torch.stack([bits_of(g.low.masked_fill(g.bad, float("nan"))), bits_of(g.high)], -1).flatten(1) >> 16
        return torch.cat(
            [
                planes.pack(code.to(torch.int32), self.base.bits),
                groups.to_bytes(spikes, 2),
                scale_code.to(torch.uint8),
                centre_code.to(torch.uint8)[:, : 0 if self.base.symmetric else None],
                planes.pack(g.places, self.place_bits),
            ],
            1,
        )

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        if cols == 0:
            return torch.empty(payload.shape[0], 0, dtype=dtype, device=payload.device)
        count = groups.count(cols, self.group)
        code, spikes, scale_code, centre_code, places = payload.split(self.sections(cols), 1)
        low, high = from_bits(groups.from_bytes(spikes, 2) << 16).unflatten(1, (count, 2)).unbind(-1)
        scale, zero = self._scale_and_zero(low, high, scale_code.to(torch.int32), centre_code.to(torch.int32))
        zero = zero.masked_fill(low.isnan(), float("nan"))
        value = planes.unpack(code, cols, self.base.bits).float() * groups.by_value(scale, self.group, cols)
        value = value + groups.by_value(zero, self.group, cols)
        places = planes.unpack(places, 2 * count, self.place_bits).unflatten(1, (count, 2))
        start = min(self.group, cols) * torch.arange(count, dtype=torch.int32, device=payload.device)
        # A place beyond the group can only come from a broken payload; it must not reach another group.
        places = torch.minimum(places, (cols - 1 - start).clamp_max(self.group - 1)[:, None])
        # A group of one value has two equal spikes at one place, so either may be written last.
        value.scatter_(1, (start + places[..., 0]).long(), low)
        value.scatter_(1, (start + places[..., 1]).long(), torch.where(low.isnan(), low, high))
        return canonical_nan(value.to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        cols = x.shape[1]
        if cols == 0:
            return x.float()
        g = self._describe(x.float())
        scale_code = self._scale(g)
        scale, _ = self._scale_and_zero(g.low, g.high, scale_code, torch.full_like(scale_code, 128))
        scale = groups.by_value(scale.masked_fill(g.bad, float("nan")), self.group, cols)
        spike = g.spike.flatten(1)[:, :cols]
        return torch.where(spike & ~scale.isnan(), spacing(x), scale)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Extremes of each group, [T, G]; `places` is [T, 2G], `spike` [T, G, S], true for the two spikes."""

    low: torch.Tensor
    high: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    places: torch.Tensor
    spike: torch.Tensor
    bad: torch.Tensor
    alone: torch.Tensor
    """Whether the group has no values but its spikes."""


def _key(x: torch.Tensor) -> torch.Tensor:
    """int32 that order like the fp32 numbers: patterns of the magnitudes, negated for negative numbers."""
    pattern = bits_of(x)
    return torch.where(pattern < 0, -(pattern & 0x7FFFFFFF), pattern)


def _from_key(key: torch.Tensor) -> torch.Tensor:
    value = from_bits(key.abs())
    return torch.where(key < 0, -value, value)


def _lowest_binade(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The exponent field, int32, at which the scales' bytes start."""
    largest = torch.maximum(low.abs(), high.abs())
    return ((bits_of(largest) >> 23) - 30).clamp_min(1)
