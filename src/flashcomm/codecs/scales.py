"""Scales of block floats and their bytes: one row of `SCALES` per kind.

The scale of a group is the smallest representable one for which `limit * scale` reaches the group's largest magnitude.
Powers of two are coarse, so for them the limit is half a spacing beyond the largest element: values between the two
round down to the largest element, and that is within half a spacing. For finer scales the limit is the largest element.

    e8m0   one byte, 2**(code - 127), code 255 is NaN (OCP MX, section 5.4)
    e5m0   five bits, exponents below the row's largest e8m0 code, which is one more byte; code 31 is NaN
    fp32   four bytes, rounded half to even
    e4m3   one FP8 byte, times the row's fp32, which is four more bytes; code 127 is NaN (NVFP4's two levels)

Rows of the two kinds that share something over a row (`whole_rows`) cannot be cut.

Hazard: scales below 2**-126 do not occur, so that their reciprocals are finite.

Source: OCP Microscaling Formats (MX) v1.0; arXiv 2411.09510 for exponents of 5 bits; NVFP4 for two levels. The limit
half a spacing further out and the row's byte of e5m0 are our own.

Shape legend: T rows, G groups of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashcomm.codecs import bits as planes
from flashcomm.codecs.elements import ELEMENTS
from flashcomm.codecs.groups import TINY, bits_of, from_bits, from_bytes, like, to_bytes

_E4M3 = ELEMENTS["fp8_e4m3"]
_FURTHEST = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One kind of scale.

    `encode(amax, limit, bad)` takes the groups' largest magnitudes [T, G] fp32 (0 where `bad`) and gives the payload's
    bytes [T, B]; `decode(bytes, G)` gives the fp32 scales [T, G], NaN where `bad`.
    """

    num_bytes: Callable[[int], int]
    encode: Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor, int], torch.Tensor]
    power_of_two: bool
    whole_rows: bool


def _exponents(amax: torch.Tensor, limit: float) -> torch.Tensor:
    """e8m0 codes: ceil(log2(amax / limit)) + 127 on the patterns themselves, at least 1."""
    distance = bits_of(amax) - bits_of(like(amax, limit)) + 0x7FFFFF >> 23
    return (distance + 127).clamp_min(1)


def _encode_e8m0(amax: torch.Tensor, limit: float, bad: torch.Tensor) -> torch.Tensor:
    return _exponents(amax, limit).masked_fill(bad, 255).to(torch.uint8)


def _decode_e8m0(payload: torch.Tensor, count: int) -> torch.Tensor:
    code = payload.to(torch.int32)
    return from_bits(code << 23).masked_fill(code == 255, float("nan"))


def _encode_e5m0(amax: torch.Tensor, limit: float, bad: torch.Tensor) -> torch.Tensor:
    exponents = _exponents(amax, limit).masked_fill(bad, 1)
    top = exponents.amax(1, keepdim=True)
    below = (top - exponents).clamp_max(_FURTHEST).masked_fill(bad, 31)
    return torch.cat([planes.pack(below, 5), top.to(torch.uint8)], 1)


def _decode_e5m0(payload: torch.Tensor, count: int) -> torch.Tensor:
    below = planes.unpack(payload[:, :-1], count, 5)
    exponents = (payload[:, -1:].to(torch.int32) - below).clamp_min(1)
    return from_bits(exponents << 23).masked_fill(below == 31, float("nan"))


def _encode_fp32(amax: torch.Tensor, limit: float, bad: torch.Tensor) -> torch.Tensor:
    scale = torch.maximum(amax / like(amax, limit), like(amax, TINY))
    return to_bytes(bits_of(scale.masked_fill(bad, float("nan"))), 4)


def _decode_fp32(payload: torch.Tensor, count: int) -> torch.Tensor:
    return from_bits(from_bytes(payload, 4))


def _encode_e4m3(amax: torch.Tensor, limit: float, bad: torch.Tensor) -> torch.Tensor:
    largest = amax.amax(1, keepdim=True)
    # The smallest E4M3 is 2**-9, and its product with the row's scale must not fall below 2**-126.
    row = torch.maximum(largest / like(largest, limit * _E4M3.top), like(largest, 2.0**-117))
    ratio = amax / like(amax, limit) / row
    code = _E4M3.encode(ratio, up=True).clamp_min(1).masked_fill(bad, 127).to(torch.uint8)
    return torch.cat([code, to_bytes(bits_of(row), 4)], 1)


def _decode_e4m3(payload: torch.Tensor, count: int) -> torch.Tensor:
    code = payload[:, :count].to(torch.int32)
    return (_E4M3.decode(code) * from_bits(from_bytes(payload[:, count:], 4))).masked_fill(code == 127, float("nan"))


SCALES = {
    "e8m0": Scale(
        num_bytes=lambda groups: groups,
        encode=_encode_e8m0,
        decode=_decode_e8m0,
        power_of_two=True,
        whole_rows=False,
    ),
    "e5m0": Scale(
        num_bytes=lambda groups: planes.code_bytes(groups, 5) + 1,
        encode=_encode_e5m0,
        decode=_decode_e5m0,
        power_of_two=True,
        whole_rows=True,
    ),
    "fp32": Scale(
        num_bytes=lambda groups: 4 * groups,
        encode=_encode_fp32,
        decode=_decode_fp32,
        power_of_two=False,
        whole_rows=False,
    ),
    "e4m3": Scale(
        num_bytes=lambda groups: groups + 4,
        encode=_encode_e4m3,
        decode=_decode_e4m3,
        power_of_two=False,
        whole_rows=True,
    ),
}
