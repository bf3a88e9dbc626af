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
from flashcomm.codecs.base import Codec, canonical_nan

_TINY = 2.0**-126
_NAN_BF16 = 0x7FC0


def _bf16_bits(x: torch.Tensor, *, away_from_zero: torch.Tensor) -> torch.Tensor:
    """int32 with the bf16 pattern of fp32 `x`, rounded away from zero where the mask says so, else toward zero."""
    pattern = x.view(torch.int32)
    return ((pattern + away_from_zero.to(torch.int32) * 0xFFFF) >> 16) & 0xFFFF


def _from_bf16_bits(pattern: torch.Tensor) -> torch.Tensor:
    return (pattern << 16).view(torch.float32)


def _like(x: torch.Tensor, value: float) -> torch.Tensor:
    # A tensor, since torch divides a CUDA tensor by a Python number with a rounded reciprocal.
    return torch.full_like(x, value)


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
        if not 1 <= self.group <= 1 << 20:
            raise ValueError(f"a group has 1 to {1 << 20} values, not {self.group}")

    def __str__(self) -> str:
        return f"int{self.bits}{'s' * self.symmetric}g{self.group}"

    @property
    def _last(self) -> float:
        return float(2**self.bits - 2 if self.symmetric and self.bits > 1 else 2**self.bits - 1)

    @property
    def _meta_bytes(self) -> int:
        return 2 if self.symmetric else 4

    def _runs(self, cols: int) -> list[tuple[int, int]]:
        """(number of groups, values in each): the full groups, then the short one where there is one."""
        full, rest = divmod(cols, self.group)
        return [run for run in ((full, self.group), (int(rest > 0), rest)) if run[0]]

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return sum(count * (planes.code_bytes(n, self.bits) + self._meta_bytes) for count, n in self._runs(cols))

    def segment(self, cols: int) -> int:
        return self.group if cols % self.group == 0 else cols

    def _scale_and_zero(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """fp32 groups [..., n] -> fp32 scale and zero [..., 1], and whether the group is NaN."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if self.symmetric:
            zero = _like(low, 0.0)
            span, steps = torch.maximum(-low, high), self._last / 2
        else:
            zero = _from_bf16_bits(_bf16_bits(low, away_from_zero=low < 0)) + 0.0
            span, steps = high - zero, self._last
        scale = torch.maximum(span / _like(span, steps), _like(span, _TINY))
        scale_bits = torch.where(span > 0, _bf16_bits(scale, away_from_zero=scale > 0), 0)
        scale = _from_bf16_bits(scale_bits)
        if self.symmetric:
            zero = -steps * scale
        top = self._last * scale
        finite = low.isfinite() & high.isfinite() & top.isfinite() & (top + zero).isfinite() & zero.isfinite()
        return scale, zero, ~finite

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        codes, meta = [], []
        for part in self._split(x.float()):
            scale, zero, bad = self._scale_and_zero(part)
            inverse = torch.where(scale > 0, _like(scale, 1.0) / scale, 0.0)
            code = torch.round((part - zero) * inverse).masked_fill(bad, 0).to(torch.int32)
            codes.append(planes.pack(code, self.bits).flatten(1))
            fields = [scale] if self.symmetric else [scale, zero]
            halves = [(f.view(torch.int32) >> 16 & 0xFFFF).masked_fill(bad, _NAN_BF16) for f in fields]
            meta.append(
                torch.cat([b & 0xFF if low else b >> 8 for b in halves for low in (True, False)], -1).flatten(1)
            )
        if not codes:
            return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
        return torch.cat([*codes, *(m.to(torch.uint8) for m in meta)], 1)

    def _split(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[T, H] -> one [T, groups, n] per run of equally long groups."""
        parts, start = [], 0
        for count, n in self._runs(x.shape[1]):
            parts.append(x[:, start : start + count * n].unflatten(1, (count, n)))
            start += count * n
        return parts

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(payload.shape[0], cols, dtype=torch.float32, device=payload.device)
        code_at, meta_at = 0, sum(count * planes.code_bytes(n, self.bits) for count, n in self._runs(cols))
        for (count, n), part in zip(self._runs(cols), self._split(out), strict=True):
            code_end = code_at + count * planes.code_bytes(n, self.bits)
            meta_end = meta_at + count * self._meta_bytes
            code = planes.unpack(payload[:, code_at:code_end].unflatten(1, (count, -1)), n, self.bits)
            meta = payload[:, meta_at:meta_end].unflatten(1, (count, -1, 2)).to(torch.int32)
            fields = _from_bf16_bits(meta[..., 0] | meta[..., 1] << 8)
            scale = fields[..., :1]
            zero = -self._last / 2 * scale if self.symmetric else fields[..., 1:2]
            part.copy_(code.float() * scale + zero)
            code_at, meta_at = code_end, meta_end
        return canonical_nan(out.to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        parts = []
        for part in self._split(x.float()):
            scale, _, bad = self._scale_and_zero(part)
            parts.append(scale.masked_fill(bad, float("nan")).expand_as(part).flatten(1))
        return torch.cat(parts, 1) if parts else x.float()
