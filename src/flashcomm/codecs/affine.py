"""Integer codes with one scale (and one zero point) per group: ``int4g128``, ``int8sg64``.

This file is the specification. It fixes every fp32 operation and its order, so that kernels on any device can give the
same bytes; `docs/wire-format.md` says the same in prose, with a worked example.

Per group of n values, all in fp32, no fused multiply-add, division correctly rounded, rounding half to even:

    asymmetric                                       symmetric (s)
    last  = 2**bits - 1                              last  = 2**bits - 2, or 1 for one bit
    zero  = min(x) rounded down to bf16              zero  = -last / 2 * scale
    span  = max(x) - zero, steps = last              span  = max(|x|), steps = last / 2

    scale = span / steps rounded up to bf16, at least 2**-126; 0 where span is 0
    code  = round((x - zero) * (1 / scale)), 0 to last
    value = code * scale + zero

Rounding outward means that nothing clips: the largest value lands on the last code or below. A group that holds a NaN
or an Inf, or whose zero point, range last * scale or largest value is beyond the finite numbers, decodes to NaN.

Source: Flash Communication (arXiv 2412.04964, section 3), with bf16 metadata and outward rounding our own.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.groups import TINY, bits_of, from_bits, like

_NAN_BF16 = 0x7FC0


def _bf16_bits(x: torch.Tensor, *, away_from_zero: torch.Tensor) -> torch.Tensor:
    """int32 with the bf16 pattern of fp32 `x`, rounded away from zero where the mask says so, else toward zero."""
    return ((bits_of(x) + away_from_zero.to(torch.int32) * 0xFFFF) >> 16) & 0xFFFF


@dataclass(frozen=True, slots=True)
class Affine(Codec):
    """``int{bits}[s]g{group}``: see the module's docstring.

    By hand: [0, 1, 2, 3] has the zero point 0 and the scale 1, so the codes are 0 1 2 3 and share one byte,
    0 + 1 * 4 + 2 * 16 + 3 * 64 = 0xe4; then come the scale 0x3f80 and the zero point 0x0000, low byte first.

    >>> Affine(bits=2, symmetric=False, group=4).encode(torch.tensor([[0.0, 1.0, 2.0, 3.0]])).tolist()
    [[228, 128, 63, 0, 0]]
    """

    bits: int
    symmetric: bool
    group: int

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"an integer code has 1 to 8 bits, not {self.bits}")
        groups.check(self.group)

    def __str__(self) -> str:
        return f"int{self.bits}{'s' * self.symmetric}g{self.group}"

    @property
    def last(self) -> float:
        """The largest code."""
        return float(2**self.bits - 2 if self.symmetric and self.bits > 1 else 2**self.bits - 1)

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        meta_bytes = 2 if self.symmetric else 4
        return planes.code_bytes(cols, self.bits) + groups.count(cols, self.group) * meta_bytes

    def segment(self, cols: int) -> int:
        return self.group if cols % self.group == 0 else cols

    def _scale_and_zero(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """fp32 groups [T, G, S] -> fp32 scale and zero [T, G], and whether the group is NaN."""
        low, high = x.amin(-1), x.amax(-1)
        if self.symmetric:
            zero = like(low, 0.0)
            span, steps = torch.maximum(-low, high), self.last / 2
        else:
            zero = from_bits(_bf16_bits(low, away_from_zero=low < 0) << 16) + 0.0
            span, steps = high - zero, self.last
        scale = torch.maximum(span / like(span, steps), like(span, TINY))
        scale = from_bits(torch.where(span > 0, _bf16_bits(scale, away_from_zero=scale > 0), 0) << 16)
        if self.symmetric:
            zero = -steps * scale
        top = self.last * scale
        finite = low.isfinite() & high.isfinite() & top.isfinite() & (top + zero).isfinite() & zero.isfinite()
        return scale, zero, ~finite

    def encode(self, x: torch.Tensor, dither: torch.Tensor | None = None) -> torch.Tensor:
        """Encode [T, H]; `dither` [T, H], in spacings, is added before rounding: see `stochastic`."""
        cols = x.shape[1]
        x = groups.by_group(x.float(), self.group)
        scale, zero, bad = self._scale_and_zero(x)
        inverse = torch.where(scale > 0, like(scale, 1.0) / scale, 0.0)
        code = (x - zero[..., None]) * inverse[..., None]
        if dither is not None:
            code = (code + groups.by_group(dither, self.group)).clamp(0, self.last)
        code = torch.round(code).masked_fill(bad[..., None], 0).to(torch.int32)
        fields = [scale] if self.symmetric else [scale, zero]
        meta = torch.stack([(bits_of(f) >> 16 & 0xFFFF).masked_fill(bad, _NAN_BF16) for f in fields], -1)
        return torch.cat([planes.pack(code.flatten(1)[:, :cols], self.bits), groups.to_bytes(meta.flatten(1), 2)], 1)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        code_end = planes.code_bytes(cols, self.bits)
        code = planes.unpack(payload[:, :code_end], cols, self.bits).float()
        fields = from_bits(groups.from_bytes(payload[:, code_end:], 2) << 16)
        if self.symmetric:
            scale, zero = fields, -self.last / 2 * fields
        else:
            scale, zero = fields[:, ::2], fields[:, 1::2]
        value = code * groups.by_value(scale, self.group, cols) + groups.by_value(zero, self.group, cols)
        return canonical_nan(value.to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        scale, _, bad = self._scale_and_zero(groups.by_group(x.float(), self.group))
        return groups.by_value(scale.masked_fill(bad, float("nan")), self.group, x.shape[1])
