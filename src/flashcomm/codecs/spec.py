"""The one spelling of a codec, and the errors for every other.

none                          the plain collective, in the tensor's own dtype
bf16, fp32                    values cast
int4g128, int8                1 to 8 bits, asymmetric, groups of 128 (the default)
int4sg32                      symmetric
int4g128:int8g128             the reduce-scatter's format, then the all-gather's
"""

import difflib
import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from flashcomm.codecs.affine import Affine
from flashcomm.codecs.base import Codec
from flashcomm.codecs.cast import Cast, Plain

DEFAULT_GROUP = 128
ALLOWED = "none, bf16, fp32, int1 to int8 with optional s (symmetric) and gN (group size), or a pair FIRST:SECOND"

_AFFINE = re.compile(r"int([1-8])(s?)(?:g([1-9][0-9]*))?")
_FIXED = {"none": Plain(), "bf16": Cast(torch.bfloat16), "fp32": Cast(torch.float32)}
_COMMON = [*_FIXED, *(f"int{b}{s}g{g}" for b in range(1, 9) for s in ("", "s") for g in (32, 64, 128))]


@dataclass(frozen=True, slots=True)
class Pair(Codec):
    """``FIRST:SECOND``: one format for the reduce-scatter of an all-reduce, another for its all-gather.

    A pair describes two transfers, so it cannot encode one tensor; take `steps` apart for that.
    Source: Flash Communication (arXiv 2412.04964) sends 4 bits, then 8, and calls the mix INT6.
    """

    first: Codec
    second: Codec

    def __str__(self) -> str:
        return f"{self.first}:{self.second}"

    @property
    def steps(self) -> tuple[Codec, Codec]:
        return self.first, self.second

    def bits_per_value(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> float:
        return (self.first.bits_per_value(cols, dtype) + self.second.bits_per_value(cols, dtype)) / 2

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        raise self._refusal()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        raise self._refusal()

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        raise self._refusal()

    def step(self, x: torch.Tensor) -> torch.Tensor:
        raise self._refusal()

    def _refusal(self) -> ValueError:
        return ValueError(
            f"codec {self} is a pair: one format for each step of an all-reduce. To encode a tensor, "
            f"use one of its steps, {self.first} or {self.second}"
        )


def parse(spec: "str | Codec") -> Codec:
    """The codec that `spec` names.

    Args:
        spec: a spelling as in the module's docstring, or a codec, which is returned unchanged.

    Raises:
        ValueError: no such codec; the message lists what is allowed and the nearest match.

    >>> str(parse("int8"))
    'int8g128'
    """
    if isinstance(spec, Codec):
        return spec
    if not isinstance(spec, str):
        raise ValueError(f"a codec is a string such as 'int8g128', not {spec!r}. Allowed: {ALLOWED}")
    return _parse(spec)


@lru_cache(maxsize=1024)
def _parse(spec: str) -> Codec:
    if ":" in spec:
        parts = spec.split(":")
        if len(parts) != 2 or "none" in parts:
            raise ValueError(
                f"codec {spec!r}: a pair is FIRST:SECOND and neither is 'none' (use bf16 or fp32 for a step as it is)"
            )
        return Pair(parse(parts[0]), parse(parts[1]))
    if spec in _FIXED:
        return _FIXED[spec]
    if match := _AFFINE.fullmatch(spec):
        bits, symmetric, group = match.groups()
        return Affine(int(bits), symmetric == "s", int(group or DEFAULT_GROUP))
    near = difflib.get_close_matches(spec, _COMMON, n=1, cutoff=0.0)
    raise ValueError(f"unknown codec {spec!r}. Allowed: {ALLOWED}. Nearest: {near[0]}")
