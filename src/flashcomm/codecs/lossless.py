"""Rows without loss, and fewer bytes: ``lossless`` (values travel as bf16) and ``lossless_fp16``.

Neighbouring values of a sum have similar magnitudes, so their exponents need three bits instead of eight: seven
neighbouring exponents, the row's window, have the codes 0 to 6. Code 7 is an escape, and the exponent itself follows
behind the codes. The sign and the mantissa look like noise and travel as they are. On sums of real models a bf16 value
takes 11.3 bits.

    row       length, 4 bytes, low byte first: bytes of the row, these included; then one of
    zeros     nothing: all values are +0; length 4
    raw       the values themselves; length 4 + 2 * cols
    packed    base, 1 byte: the window's lowest exponent; then tops, planes, escapes; shorter than raw
    tops      a byte per value: its sign and its seven highest bits of mantissa
    planes    a bit per value each, the first value's lowest: three of the codes, exponent - base or 7, lowest bits
              first; with fp16 three more of the lowest bits of mantissa
    escapes   a byte per value with code 7: its exponent, in order of place

The window is the one with most values of the seven that hold the row's median exponent, the lowest among equals. So
outliers and zeros, up to half of the row, do not move it, and no other window could hold more than half of the row.

A tensor of the wire's type keeps every bit, those of NaN included. Another one is cast, as by codec ``bf16``.

Hazard: rows vary in length (`Codec.varies`). What lies behind a row's length is 0, and need not be sent.

Source: exponents with escapes are those of DFloat11 and NeuZip (arXiv 2504.11651, 2410.20650) without their entropy
coders; windows around the median are our own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.cast import spacing
from flashcomm.codecs.groups import from_bytes, to_bytes

LENGTH_BYTES = 4
HEADER_BYTES = LENGTH_BYTES + 1
CODE_BITS = 3
ESCAPE = (1 << CODE_BITS) - 1
TOP_BITS = 7
SEGMENT = 256
ESCAPED_BITS = 0.24
"""Bits of escapes per value of the sums of real models: 3 % of the values have one."""


class Layout(NamedTuple):
    """Where the bits of a value lie.

    Args:
        mantissa: bits of the mantissa.
        exponent: bits of the exponent, above them.
    """

    mantissa: int
    exponent: int

    @property
    def rest(self) -> int:
        """Lowest bits of the mantissa that a top byte has no room for."""
        return self.mantissa - TOP_BITS


LAYOUTS = {torch.bfloat16: Layout(7, 8), torch.float16: Layout(10, 5)}


@dataclass(frozen=True, slots=True)
class Lossless(Codec):
    """``lossless``, and ``lossless_fp16`` with fp16 on the wire, where casting other types may overflow at 65504.

    >>> codec = Lossless(torch.bfloat16)
    >>> x = torch.tensor([[1.0, -2.5, 0.75, 3e38, 0.0, 1.5, 1.0, -1.0] * 2, [0.0] * 16]).bfloat16()
    >>> payload = codec.encode(x)
    >>> codec.payload_bytes(16), codec.lengths(payload).tolist()  # 5 + 16 + 6 and 4 escapes; zeros
    (36, [31, 4])
    >>> torch.equal(codec.decode(payload, 16, torch.bfloat16), x)
    True

    Args:
        wire: bf16 or fp16.

    Raises:
        ValueError: another type.
    """

    wire: torch.dtype

    def __post_init__(self):
        if self.wire not in LAYOUTS:
            raise ValueError(f"rows without loss are of bf16 or fp16, not {self.wire}: fp32 travels as codec 'fp32'")

    def __str__(self) -> str:
        return {torch.bfloat16: "lossless", torch.float16: "lossless_fp16"}[self.wire]

    @property
    def varies(self) -> bool:
        return True

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return LENGTH_BYTES + 2 * cols if cols else 0

    def bits_per_value(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Average bits per value to expect of a model's sums; the most are those of `payload_bytes`."""
        expected = 1 + LAYOUTS[self.wire].mantissa + CODE_BITS + ESCAPED_BITS
        return min(expected * cols + 8 * HEADER_BYTES, 8.0 * self.payload_bytes(cols)) / cols if cols else 0.0

    def lengths(self, payload: torch.Tensor) -> torch.Tensor:
        if payload.shape[1] == 0:
            return torch.zeros(payload.shape[0], dtype=torch.int64, device=payload.device)
        return from_bytes(payload[:, :LENGTH_BYTES], LENGTH_BYTES)[:, 0].long()

    def segment(self, cols: int) -> int:
        # Cuts change no value, but a header costs 1 % of 256 values.
        return next((n for n in range(SEGMENT, cols) if cols % n == 0), cols)

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return spacing(x, self.wire).masked_fill(~x.isfinite(), float("nan"))

    def parts(self, cols: int) -> tuple[int, int]:
        """Where a packed row's planes and escapes begin."""
        planes = HEADER_BYTES + cols
        return planes, planes + (CODE_BITS + LAYOUTS[self.wire].rest) * (-(-cols // 8))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        (rows, cols), form = x.shape, LAYOUTS[self.wire]
        if x.numel() == 0:
            return torch.empty(rows, self.payload_bytes(cols), dtype=torch.uint8, device=x.device)
        values = (x if x.dtype == self.wire else canonical_nan(x.to(self.wire))).contiguous()
        pattern = values.view(torch.int16).int() & 0xFFFF
        exponent = pattern >> form.mantissa & (1 << form.exponent) - 1
        base = _base(exponent)
        escaped = (exponent < base) | (exponent >= base + ESCAPE)
        code = torch.where(escaped, ESCAPE, exponent - base)
        planes, escapes = self.parts(cols)
        packed = torch.zeros(rows, escapes + cols + 1, dtype=torch.uint8, device=x.device)
        # An escape goes behind those before it. All other values go to one place behind the row, which is cut off.
        place = torch.where(escaped, escapes + escaped.cumsum(1) - 1, escapes + cols)
        packed.scatter_(1, place, exponent.to(torch.uint8))
        packed[:, LENGTH_BYTES] = base[:, 0]
        packed[:, HEADER_BYTES:planes] = (pattern >> 8 & 0x80 | pattern >> form.rest & 0x7F).to(torch.uint8)
        low = pattern & (1 << form.rest) - 1
        packed[:, planes:escapes] = _to_planes(code | low << CODE_BITS, CODE_BITS + form.rest)
        size = self.payload_bytes(cols)
        length = (escapes + escaped.sum(1, keepdim=True)).clamp_max(size)
        raw = torch.nn.functional.pad(values.view(torch.uint8), (LENGTH_BYTES, 0))
        payload = torch.where(length == size, raw, packed[:, :size])
        length = length.masked_fill((pattern == 0).all(1, keepdim=True), LENGTH_BYTES)
        payload *= torch.arange(size, dtype=torch.int64, device=x.device) < length
        payload[:, :LENGTH_BYTES] = to_bytes(length, LENGTH_BYTES)
        return payload

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        form = LAYOUTS[self.wire]
        if payload.numel() == 0:
            return torch.empty(payload.shape[0], cols, dtype=dtype, device=payload.device)
        planes, escapes = self.parts(cols)
        length = self.lengths(payload)
        # Room for the escapes of a broken payload.
        payload = torch.nn.functional.pad(payload, (0, escapes + cols - payload.shape[1]))
        low = _from_planes(payload[:, planes:escapes], cols, CODE_BITS + form.rest)
        code = low & ESCAPE
        escaped = code == ESCAPE
        place = escapes + (escaped.cumsum(1) - 1).clamp_min(0)
        exponent = torch.where(escaped, payload.gather(1, place).int(), payload[:, LENGTH_BYTES, None].int() + code)
        exponent &= (1 << form.exponent) - 1
        top = payload[:, HEADER_BYTES:planes].int()
        pattern = (top & 0x80) << 8 | exponent << form.mantissa | (top & 0x7F) << form.rest | low >> CODE_BITS
        raw = from_bytes(payload[:, LENGTH_BYTES : self.payload_bytes(cols)], 2)
        pattern = torch.where(length[:, None] >= self.payload_bytes(cols), raw, pattern)
        pattern = torch.where(length[:, None] <= LENGTH_BYTES, 0, pattern)
        values = pattern.to(torch.int16).view(self.wire)
        return values if dtype == self.wire else canonical_nan(values.to(dtype))


def _base(exponent: torch.Tensor) -> torch.Tensor:
    """int32 [T, H] -> [T, 1]: the window's lowest exponent."""
    median = exponent.median(1, keepdim=True).values
    lowest = (median - ESCAPE + 1).clamp_min(0)
    best, most = lowest, torch.zeros_like(lowest)
    for i in range(ESCAPE):
        base = torch.minimum(lowest + i, median)
        inside = ((exponent >= base) & (exponent < base + ESCAPE)).sum(1, keepdim=True)
        best, most = torch.where(inside > most, base, best), torch.maximum(inside, most)
    return best


def _to_planes(numbers: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [T, H] below 2**count -> uint8 [T, count * ceil(H / 8)]: one plane of bits after the other."""
    octets = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % 8)).unflatten(1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.int32, device=numbers.device)
    return torch.cat([((octets >> i & 1) << shifts).sum(-1) for i in range(count)], 1).to(torch.uint8)


def _from_planes(planes: torch.Tensor, cols: int, count: int) -> torch.Tensor:
    """Inverse of `_to_planes`."""
    shifts = torch.arange(8, dtype=torch.int32, device=planes.device)
    numbers = torch.zeros(planes.shape[0], cols, dtype=torch.int32, device=planes.device)
    for i, plane in enumerate(planes.int().chunk(count, 1)):
        numbers |= (plane[..., None] >> shifts & 1).flatten(1)[:, :cols] << i
    return numbers
