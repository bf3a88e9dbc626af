"""Formats that other projects put on the wire, so that `flashcomm accuracy` shows what they cost a model.

q4_0, q8_0            llama.cpp: groups of 32, an fp16 scale
qr_int4, _int6, _int8 QuickReduce (vLLM, SGLang, AITER): all arithmetic in fp16, groups of 32 and an fp16 scale
e4m3                  RCCLX: each value cast to E4M3 without a scale, saturating at 448
fp8g256               vLLM's and FlashInfer's two-shot all-reduce: E4M3, an fp32 scale; a `blocks` format like others

With n = 2**(bits - 1) codes on a side and m the value of largest magnitude in the group, sign included:

    q4_0, qr_*  scale = m / -n, so m itself is code -n; the codes end at n - 1, beyond which values are clipped
    q8_0        scale = |m| / 127

Rounding is theirs. Sums are ours, in fp32; QuickReduce adds in fp16. Bytes are arranged as in our formats, and groups
end with their row. They run on the specification alone: no kernels.

Hazard: a value beyond what an fp16 scale holds (65,504 * n; QuickReduce: 65,504) has no bound, as there. A NaN or Inf
makes its group NaN, where the originals may hide it.

Source: ggml-quants.c of llama.cpp; quick_all_reduce.cuh of vLLM; torchcomms. Written from their description.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs import groups
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.elements import ELEMENTS
from flashcomm.codecs.groups import like

GROUP = 32
HALF_MOST = 65504.0
EPSILON = 2.0**-24
"""QuickReduce adds the smallest fp16 number to a scale before it takes the reciprocal."""


def _half(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 to the nearest fp16 number; beyond the largest one, to that."""
    return x.clamp(-HALF_MOST, HALF_MOST).half().float()


@dataclass(frozen=True, slots=True)
class Grouped(Codec):
    """A format with groups of 32 and an fp16 scale: ``q4_0``, ``q8_0``, ``qr_int4``, ``qr_int6`` or ``qr_int8``.

    By hand: the value of largest magnitude is -4, so the scale is 0.5 and the codes are 2, -4 and -8, plus 8.

    >>> codec = Grouped("q4_0")
    >>> codec.decode(codec.encode(torch.tensor([[1.0, -2.0, -4.0]])), 3, torch.float32).tolist()
    [[1.0, -2.0, -4.0]]
    """

    name: str

    def __post_init__(self):
        if self.name not in _BITS:
            raise ValueError(f"no format {self.name!r}. Allowed: {', '.join(_BITS)}")

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return _BITS[self.name]

    @property
    def in_half(self) -> bool:
        """Whether all arithmetic is in fp16, and even and odd neighbours are groups of their own."""
        return self.name.startswith("qr_")

    def _count(self, cols: int) -> int:
        return 2 * groups.count(cols, 2 * GROUP) if self.in_half else groups.count(cols, GROUP)

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return planes.code_bytes(cols, self.bits) + 2 * self._count(cols)

    def segment(self, cols: int) -> int:
        width = 2 * GROUP if self.in_half else GROUP
        return width if cols % width == 0 else cols

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, G, 32], filled with zeros."""
        width = 2 * GROUP if self.in_half else GROUP
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % width)).unflatten(1, (-1, width))
        return x.unflatten(2, (GROUP, 2)).transpose(2, 3).flatten(1, 2) if self.in_half else x

    def _join(self, x: torch.Tensor, cols: int) -> torch.Tensor:
        """Inverse of `_split`."""
        if self.in_half:
            x = x.unflatten(1, (-1, 2)).transpose(2, 3)
        return x.flatten(1)[:, :cols]

    def _scales(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 groups [T, G, 32] -> scales before they are stored, [T, G, 1]; NaN for a group with a NaN or Inf."""
        value = x.gather(-1, x.abs().argmax(-1, keepdim=True))
        scale = (
            value.abs() / like(value, 127.0) if self.name == "q8_0" else value / like(value, -(2.0 ** (self.bits - 1)))
        )
        if self.in_half:
            scale = _half(scale)
        return scale.masked_fill(~x.isfinite().all(-1, keepdim=True), float("nan"))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        cols, most = x.shape[1], 2 ** (self.bits - 1)
        if cols == 0:
            return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
        x = self._split(x.float())
        scale = self._scales(x)
        if self.in_half:
            x = _half(x)
            inverse = _half(like(scale, 1.0) / _half(scale + EPSILON))
            code = torch.round(_half(x * inverse))
        else:
            inverse = torch.where(scale == 0, 0.0, like(scale, 1.0) / scale)
            ratio = x * inverse
            away = torch.where(ratio < 0, -0.5, 0.5)
            code = torch.trunc(ratio + away) if self.name == "q8_0" else torch.floor(ratio + 0.5)
        code = code.nan_to_num(0.0).clamp(-most, most - 1).to(torch.int32) + most
        stored = scale[..., 0].half().view(torch.int16).to(torch.int32)
        return torch.cat([planes.pack(self._join(code, cols), self.bits), groups.to_bytes(stored, 2)], 1)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        end = planes.code_bytes(cols, self.bits)
        code = planes.unpack(payload[:, :end], cols, self.bits) - 2 ** (self.bits - 1)
        if cols == 0:
            return code.to(dtype)
        scale = groups.from_bytes(payload[:, end:], 2).to(torch.int16).view(torch.float16).float()
        value = self._join(self._split(code.float()) * scale[..., None], cols)
        return canonical_nan((_half(value) if self.in_half else value).to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        cols, most = x.shape[1], 2 ** (self.bits - 1)
        if cols == 0:
            return x.float()
        x = self._split(x.float())
        scale = self._scales(x)
        stored = scale.half().float()
        # Values that are clipped are the last code.
        clipped = (x / scale - (most - 1)).clamp_min(0).nan_to_num(0.0)
        if self.in_half:
            # Four roundings to fp16 and the epsilon before the code, one behind it.
            half = scale.abs() * (0.5 + clipped) + x.abs() * (2.0**-8 + EPSILON / scale.abs()) + EPSILON
            # The reciprocal of a smaller scale is beyond fp16.
            half = torch.where(scale.abs() < 2.0**-15, x.abs() + most * scale.abs() + EPSILON, half)
            beyond = x.abs().amax(-1, keepdim=True) > HALF_MOST
        else:
            half = scale.abs() * (0.5 + clipped) + most * (scale - stored).abs()
            # A scale below fp16 is stored as 0.
            half = torch.where(stored == 0, x.abs(), half)
            beyond = stored.isinf()
        half = half.masked_fill(beyond | scale.isnan(), float("nan"))
        return 2 * self._join(half, cols)


@dataclass(frozen=True, slots=True)
class BareE4M3(Codec):
    """``e4m3``: the nearest E4M3 number, half to even, at most 448; NaN for NaN or Inf, of that value alone.

    >>> BareE4M3().decode(BareE4M3().encode(torch.tensor([[1.1, 1000.0]])), 2, torch.float32).tolist()
    [[1.125, 448.0]]
    """

    def __str__(self) -> str:
        return "e4m3"

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return cols

    def segment(self, cols: int) -> int:
        return 1 if cols else 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        code = ELEMENTS["fp8_e4m3"].encode(x.masked_fill(~x.isfinite(), 0.0))
        return code.masked_fill(~x.isfinite(), 0x7F).to(torch.uint8)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        code = payload.to(torch.int32)
        value = ELEMENTS["fp8_e4m3"].decode(code).masked_fill(code & 0x7F == 0x7F, float("nan"))
        return canonical_nan(value.to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        element, x = ELEMENTS["fp8_e4m3"], x.float()
        bad = ~x.isfinite()
        step = element.spacing(x.masked_fill(bad, 0.0))
        return torch.maximum(step, 2 * (x.abs() - element.top)).masked_fill(bad, float("nan"))


_BITS = {"q4_0": 4, "q8_0": 8, "qr_int4": 4, "qr_int6": 6, "qr_int8": 8}
PEERS = {**{name: Grouped(name) for name in _BITS}, "e4m3": BareE4M3()}
"""Codecs by their spelling."""
USERS = {
    **dict.fromkeys(["q4_0", "q8_0"], "llama.cpp"),
    **dict.fromkeys(["qr_int4", "qr_int6", "qr_int8"], "QuickReduce"),
    "e4m3": "RCCLX",
    "fp8g256": "FlashInfer",
}
"""Projects that send a format, by its spelling."""
