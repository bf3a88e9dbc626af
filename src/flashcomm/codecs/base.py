"""The interface of a wire format: rows of values in, rows of bytes out.

A codec knows of no rank, group or algorithm; an algorithm knows of no format. Rows are independent, so a message may be
cut between rows (and, see `segment`, at some places inside a row) without changing a bit of the result.

Shape legend: R ranks, T rows (tokens), H columns (hidden size), P = payload_bytes(H) bytes of one encoded row.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Codec(ABC):
    """A wire format. Subclasses are immutable and compare by value; `str()` gives the spelling that parses back.

    To write your own, implement the five abstract methods; everything else in flashcomm follows from them.
    """

    @abstractmethod
    def __str__(self) -> str:
        """The canonical spelling, for example ``int4g128``."""

    @abstractmethod
    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one encoded row of `cols` values. `dtype`, the input's, matters only to ``none``, which keeps it."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] floating point -> [T, P] uint8, on the device of `x`."""

    @abstractmethod
    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        """[T, P] uint8 -> [T, cols] of `dtype`, on the device of `payload`."""

    @abstractmethod
    def step(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> fp32 [T, H]: the spacing, or distance between neighbouring representable values, around each x.

        The published bound of one encode and decode is |error| <= step / 2, plus fp32 rounding
        (2**-14 * step + 2**-23 * (|x| + step); see docs/wire-format.md).
        """

    @property
    def identity(self) -> str:
        """The string that ranks compare before they communicate: the spelling, and whatever else changes the bytes."""
        return str(self)

    @property
    def unbound(self) -> bool:
        """Whether this codec still needs a calibration; see `bind`."""
        return False

    @property
    def varies(self) -> bool:
        """Whether rows take fewer bytes than `payload_bytes`, which is then the bound of the worst row."""
        return False

    def lengths(self, payload: torch.Tensor) -> torch.Tensor:
        """[T, P] uint8 -> int64 [T]: the bytes at the beginning of each row that are used; the rest is not sent.

        They are what the rows say, in the first four bytes, so those of a broken payload may be any number.
        """
        rows, size = payload.shape
        return torch.full((rows,), size, dtype=torch.int64, device=payload.device)

    def check(self, cols: int, ranks: int | None = None):
        """Refuse rows of `cols` values, or a number of ranks, that this codec cannot serve, before anything is sent.

        Raises:
            ValueError: what is wrong and what to do.
        """
        return

    def bind(self, features: Any, rank: int) -> "Codec":
        """Bind this codec to one sum of a calibrated model, as `rank` encodes it. Other formats return themselves.

        Args:
            features: a `flashcomm.codecs.Features`.
            rank: of this process in the group.
        """
        return self

    def segment(self, cols: int) -> int:
        """The shortest length, a divisor of `cols`, into which a row may be cut without changing the decoded values."""
        return cols

    def unit(self, cols: int) -> int:
        """The shortest length into which a row may be cut in all of the codec's formats.

        >>> from flashcomm.codecs import parse
        >>> parse("int4g32:int8g128").unit(4096)
        128
        """
        return math.lcm(*(single.segment(cols) for single in self.formats))

    @property
    def formats(self) -> tuple["Codec", ...]:
        """The formats of the two transfers of an all-reduce: the reduce-scatter's and the all-gather's.

        A `Levels` codec has four: two inside a host, then two between hosts.
        """
        return self, self

    def bits_per_value(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Average bits on the wire per value of a row of `cols` values, scales and zero points included.

        Where rows vary in length these are the bits to expect of a model's sums, for predictions.

        >>> from flashcomm.codecs import parse
        >>> parse("int4g128").bits_per_value(4096)
        4.25
        """
        return 8 * self.payload_bytes(cols, dtype) / cols if cols else 0.0


def decode_sum(payloads: torch.Tensor, codec: Codec, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """[R, T, P] uint8 -> [T, cols] of `dtype`: decode each rank's rows and add them in fp32, rank 0 first.

    One rank's rows are decoded alone, and keep their NaN payloads if the codec does.
    """
    if payloads.shape[0] == 1:
        return codec.decode(payloads[0], cols, dtype)
    total = codec.decode(payloads[0], cols, torch.float32)
    for payload in payloads[1:]:
        total = total + codec.decode(payload, cols, torch.float32)
    return canonical_nan(total.to(dtype))


def decode_sum_encode(payloads: torch.Tensor, codec: Codec, out_codec: Codec, cols: int) -> torch.Tensor:
    """[R, T, P] uint8 in `codec` -> [T, P'] uint8 in `out_codec`: encode the fp32 of `decode_sum`."""
    return out_codec.encode(decode_sum(payloads, codec, cols, torch.float32))


def canonical_nan(x: torch.Tensor) -> torch.Tensor:
    """Make every NaN of `x` the same quiet NaN: torch's vectorised bf16 cast gives another NaN than its scalar one."""
    return x.masked_fill_(x.isnan(), float("nan")) if x.is_floating_point() else x
