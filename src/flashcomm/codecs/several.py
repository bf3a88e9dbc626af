"""Codecs of several formats: one for each transfer of an all-reduce.

    int4g128:int8g128   a pair: the reduce-scatter's format, then the all-gather's
    bf16/int4g128       levels: inside a host, then between hosts

Neither can encode one tensor; `steps` are the formats that can.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs.base import Codec
from flashcomm.codecs.calibrated import Features


class _Several(Codec):
    """A codec of several formats, which cannot encode one tensor; each of its `steps` can."""

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        raise self._refusal()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        raise self._refusal()

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        raise self._refusal()

    def step(self, x: torch.Tensor) -> torch.Tensor:
        raise self._refusal()

    def check(self, cols: int, ranks: int | None = None):
        for single in self.formats:
            single.check(cols, ranks)

    def _refusal(self) -> ValueError:
        formats = " and ".join(dict.fromkeys(str(single) for single in self.formats))
        return ValueError(
            f"codec {self} is several formats, one for each transfer of an all-reduce. To encode a tensor, "
            f"use one of them: {formats}"
        )


@dataclass(frozen=True, slots=True)
class Pair(_Several):
    """A pair, ``FIRST:SECOND``: one format for the reduce-scatter of an all-reduce, another for its all-gather.

    Source: Flash Communication (arXiv 2412.04964) sends 4 bits, then 8, and calls the mix INT6.
    """

    first: Codec
    second: Codec

    def __str__(self) -> str:
        return f"{self.first}:{self.second}"

    @property
    def formats(self) -> tuple[Codec, ...]:
        return self.first, self.second

    @property
    def identity(self) -> str:
        return f"{self.first.identity}:{self.second.identity}"

    @property
    def unbound(self) -> bool:
        return self.first.unbound or self.second.unbound

    def bind(self, features: Features, rank: int) -> "Pair":
        return Pair(self.first.bind(features, rank), self.second.bind(features, features.ranks))

    def bits_per_value(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> float:
        return (self.first.bits_per_value(cols, dtype) + self.second.bits_per_value(cols, dtype)) / 2


@dataclass(frozen=True, slots=True)
class Levels(_Several):
    """Levels, ``INSIDE/BETWEEN``: formats inside a host and between hosts, for a hierarchical all-reduce.

    Each may be a pair. Inside a host links are fast and ``bf16`` costs little; between hosts each bit counts.
    Source: FlashCommunication V2 (arXiv 2508.03760), hierarchical all-reduce; two formats are our own.
    """

    inside: Codec
    between: Codec

    def __str__(self) -> str:
        return f"{self.inside}/{self.between}"

    @property
    def formats(self) -> tuple[Codec, ...]:
        return *self.inside.formats, *self.between.formats

    def bits_per_value(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Average bits per value between hosts, where they matter."""
        return self.between.bits_per_value(cols, dtype)
