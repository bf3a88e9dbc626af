"""Formats without codes: the tensor's own bytes (``none``), or its values as bf16 or fp32.

``none`` stands for the plain collective of `torch.distributed`. The other two serve an all-reduce of which only one
transfer is compressed (``bf16:int8g128``), and are the uncompressed baseline with fp32 accumulation.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs.base import Codec, canonical_nan


@dataclass(frozen=True, slots=True)
class Plain(Codec):
    """``none``: the tensor, unchanged."""

    def __str__(self) -> str:
        return "none"

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return cols * dtype.itemsize

    def segment(self, cols: int) -> int:
        return 1 if cols else 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().view(torch.uint8)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        return _values(payload, cols, dtype).clone()

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Cast(Codec):
    """``bf16`` or ``fp32``: each value rounded half to even to that type; exact if the input's type is narrower."""

    wire: torch.dtype

    def __post_init__(self):
        if self.wire not in (torch.bfloat16, torch.float32):
            raise ValueError(f"values travel as bf16 or fp32, not {self.wire}: fp16 overflows at 65504")

    def __str__(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.wire]

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return cols * self.wire.itemsize

    def segment(self, cols: int) -> int:
        return 1 if cols else 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return canonical_nan(x.to(self.wire, copy=True)).contiguous().view(torch.uint8)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        return canonical_nan(_values(payload, cols, self.wire).to(dtype, copy=True))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        if (self.wire.itemsize >= x.dtype.itemsize and x.dtype != torch.float16) or self.wire == torch.float32:
            return torch.zeros_like(x, dtype=torch.float32)
        return spacing(x, self.wire)


def _values(payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """View bytes as values; rows of none have strides that torch cannot view so."""
    return payload.contiguous().view(-1).view(dtype).view(-1 if cols else payload.shape[0], cols)


def spacing(x: torch.Tensor, wire: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """fp32: the distance between neighbouring bf16 (or fp16) numbers around each x; 0 for a tensor of that type itself.

    NaN where x rounds to Inf.
    """
    if x.dtype == wire:
        return torch.zeros_like(x, dtype=torch.float32)
    # frexp gives |x| = m * 2**e with m in [1/2, 1); bf16 keeps eight significant bits, down to 2**-133.
    bits, least = (11, -24) if wire == torch.float16 else (8, -133)
    exponent = (torch.frexp(x.float())[1] - bits).masked_fill(x == 0, least).clamp_min(least)
    distance = torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent)
    # A number that rounds to Inf has no neighbour above.
    return distance.masked_fill(x.to(wire).isinf(), float("nan"))
