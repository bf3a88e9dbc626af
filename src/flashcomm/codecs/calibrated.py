"""Formats that know the features of one sum: ``+keep64`` and ``int4static``.

The features (columns) that are hard to send are the same for every token, so they can be found once, on real text.
`flashcomm calibrate` records the reach (largest magnitude) of each feature, on each rank and in the sum (`Features`);
`flashcomm.calibration` binds a codec to one module's record. Unbound, these codecs have a name and a size, and refuse
to encode.

    BASE+keepN   the 1/N features of the largest reach, summed over ranks, are sent as bf16, all others in the base
    intBstatic   one scale per rank and feature, which all ranks know, so no scale is sent: per row one byte, the number
                 of the sender's table of scales, and

                     scale = reach / (last / 2)        last = 2**B - 2
                     code  = round((x + reach') / scale), clamped to 0 and last; last + 1 for NaN and Inf
                     value = code * scale - reach'     reach' = last / 2 * scale

The base of ``+keep`` sees the other features closed up, as one row. ``static`` clamps values beyond the calibrated
reach to it, and `step` says so.

Source: Towards Low-bit Communication for TP LLM Inference (arXiv 2411.07942); the NaN code and the byte are our own.

Shape legend: R ranks, H features.
"""

import hashlib
from dataclasses import dataclass, field, replace

import torch

from flashcomm import subnormals
from flashcomm.codecs import bits as planes
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.cast import spacing
from flashcomm.codecs.groups import TINY, from_bits, from_bytes, like


class Features:
    """The calibration of one sum.

    Args:
        reach: fp32 [R + 1, H], the largest magnitude of each feature on each rank; in the last row, of the sum.
    """

    def __init__(self, reach: torch.Tensor):
        if reach.dim() != 2 or reach.shape[0] < 2:
            raise ValueError(f"reach is [ranks + 1, features], not {list(reach.shape)}")
        bad = ~((reach >= 0) & reach.isfinite())
        if bad.any():
            row, feature = bad.nonzero()[0].tolist()
            raise ValueError(
                f"a reach is finite and not negative, but row {row}, feature {feature} has {reach[row, feature]}"
            )
        self.reach = reach.detach().float().cpu().contiguous()
        self.digest = hashlib.blake2b(self.reach.numpy().tobytes(), digest_size=4).hexdigest()

    @property
    def ranks(self) -> int:
        """Number of ranks, R."""
        return self.reach.shape[0] - 1

    @property
    def cols(self) -> int:
        """Number of features, H."""
        return self.reach.shape[1]

    def worst(self, count: int) -> tuple[int, ...]:
        """The `count` features of the largest reach, summed over ranks; ascending, the first among equals.

        >>> Features(torch.tensor([[1.0, 5.0, 2.0], [1.0, 0.0, 3.0], [2.0, 5.0, 5.0]])).worst(2)
        (1, 2)
        """
        with subnormals.kept():
            total = self.reach[:-1].sum(0)
            return tuple(sorted(torch.sort(total, descending=True, stable=True).indices[:count].tolist()))

    def without(self, kept: tuple[int, ...]) -> "Features":
        """The calibration of all other features."""
        mask = torch.ones(self.cols, dtype=torch.bool, device=self.reach.device)
        mask[list(kept)] = False
        return Features(self.reach[:, mask])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Features) and torch.equal(self.reach, other.reach)

    def __hash__(self) -> int:
        return hash(self.digest)


def _refusal(codec: Codec) -> ValueError:
    return ValueError(
        f"codec {codec} needs to know the features of the model: record them with 'flashcomm calibrate MODEL', then "
        "pass calibration= to flashcomm.integrations.transformers.compress, or bind the codec with "
        "flashcomm.calibration.Calibration"
    )


@dataclass(frozen=True, slots=True)
class Keep(Codec):
    """``{base}+keep{every}``: see the module's docstring.

    >>> from flashcomm.codecs.affine import Affine
    >>> features = Features(torch.tensor([[9.0, 1.0, 1.0, 1.0]] * 2))
    >>> codec = Keep(Affine(2, False, 4), every=4).bind(features, 0)
    >>> codec.decode(codec.encode(torch.tensor([[9.1, 1.0, 2.0, 4.0]])), 4, torch.float32).tolist()
    [[9.125, 1.0, 2.0, 4.0]]
    """

    base: Codec
    every: int
    features: Features | None = None
    kept: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self):
        if not 2 <= self.every <= 1 << 16:
            raise ValueError(f"one in 2 to {1 << 16} features is kept, not one in {self.every}")

    def __str__(self) -> str:
        return f"{self.base}+keep{self.every}"

    @property
    def identity(self) -> str:
        return f"{self.base.identity}+keep{self.every}" + (f"@{self.features.digest}" if self.features else "")

    @property
    def unbound(self) -> bool:
        return self.features is None

    def check(self, cols: int, ranks: int | None = None):
        _check(self, cols, ranks)
        self.base.check(cols - len(self.kept), ranks)

    def bind(self, features: Features, rank: int) -> "Keep":
        kept = features.worst(features.cols // self.every)
        return Keep(self.base.bind(features.without(kept), rank), self.every, features, kept)

    @property
    def formats(self) -> tuple[Codec, Codec]:
        first, second = self.base.formats
        return (self, self) if first == second else (replace(self, base=first), replace(self, base=second))

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        count = cols // self.every
        return self.base.payload_bytes(cols - count, dtype) + 2 * count

    def _mask(self, cols: int, device: torch.device) -> torch.Tensor:
        """[cols] bool: whether each feature is kept."""
        self.check(cols)
        mask = torch.zeros(cols, dtype=torch.bool, device=device)
        mask[list(self.kept)] = True
        return mask

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        mask = self._mask(x.shape[1], x.device)
        sent = canonical_nan(x[:, mask].to(torch.bfloat16)).contiguous().view(torch.uint8)
        return torch.cat([self.base.encode(x[:, ~mask]), sent], 1)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        mask = self._mask(cols, payload.device)
        cut = payload.shape[1] - 2 * len(self.kept)
        value = torch.empty(payload.shape[0], cols, dtype=torch.float32, device=payload.device)
        value[:, ~mask] = self.base.decode(payload[:, :cut], cols - len(self.kept), torch.float32)
        value[:, mask] = from_bits(from_bytes(payload[:, cut:], 2) << 16)
        return canonical_nan(value.to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        mask = self._mask(x.shape[1], x.device)
        step = torch.empty_like(x, dtype=torch.float32)
        step[:, ~mask] = self.base.step(x[:, ~mask])
        step[:, mask] = spacing(x[:, mask]).masked_fill(~x[:, mask].isfinite(), float("nan"))
        return step


@dataclass(frozen=True, slots=True)
class Static(Codec):
    """``int{bits}static``: see the module's docstring."""

    bits: int
    features: Features | None = None
    table: int = 0

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"a code of static scales has 2 to 8 bits, not {self.bits}")

    def __str__(self) -> str:
        return f"int{self.bits}static"

    @property
    def identity(self) -> str:
        return f"{self}@{self.features.digest}" if self.features else str(self)

    @property
    def unbound(self) -> bool:
        return self.features is None

    @property
    def last(self) -> float:
        """The largest code of a number; the code after it means NaN."""
        return float(2**self.bits - 2)

    def check(self, cols: int, ranks: int | None = None):
        _check(self, cols, ranks)

    def bind(self, features: Features, rank: int) -> "Static":
        if features.ranks > 255:
            raise ValueError(f"static scales are numbered in a byte: at most 255 ranks, not {features.ranks}")
        if not 0 <= rank <= features.ranks:
            raise ValueError(f"calibrated on {features.ranks} ranks, so rank {rank} has no scales: calibrate again")
        return Static(self.bits, features, rank)

    @property
    def formats(self) -> tuple[Codec, Codec]:
        return self, self if self.features is None else replace(self, table=self.features.ranks)

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return planes.code_bytes(cols, self.bits) + 1

    def tables(self) -> torch.Tensor:
        """fp32 [R + 1, H]: the scales; 0 for a feature that is always 0."""
        if self.features is None:
            raise _refusal(self)
        reach = self.features.reach
        with subnormals.kept():
            scale = torch.maximum(reach / like(reach, self.last / 2), like(reach, TINY))
            return torch.where(reach > 0, scale, 0.0)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.check(x.shape[1])
        scale = self.tables()[self.table].to(x.device)
        inverse = torch.where(scale > 0, like(scale, 1.0) / scale, 0.0)
        x = x.float()
        code = torch.round((x + self.last / 2 * scale) * inverse).clamp(0, self.last)
        code = code.masked_fill(~x.isfinite(), self.last + 1).to(torch.int32)
        number = torch.full((x.shape[0], 1), self.table, dtype=torch.uint8, device=x.device)
        return torch.cat([planes.pack(code, self.bits), number], 1)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        self.check(cols)
        code = planes.unpack(payload[:, :-1], cols, self.bits)
        tables = self.tables().to(payload.device)
        scale = tables[payload[:, -1].long().clamp_max(len(tables) - 1)]
        value = (code.float() * scale - self.last / 2 * scale).masked_fill(code > self.last, float("nan"))
        return canonical_nan(value.to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        self.check(x.shape[1])
        scale = self.tables()[self.table].to(x.device).expand(x.shape)
        beyond = 2 * (x.float().abs() - self.last / 2 * scale)
        return torch.maximum(scale, beyond).masked_fill(~x.isfinite(), float("nan"))


def _check(codec: "Keep | Static", cols: int, ranks: int | None):
    """Refuse a codec that is unbound, or bound to another number of features or ranks.

    Raises:
        ValueError: says which and what to do.
    """
    if codec.features is None:
        raise _refusal(codec)
    if codec.features.cols != cols:
        raise ValueError(
            f"codec {codec} was calibrated for a sum of {codec.features.cols} features, not of {cols}: "
            "calibrate this model"
        )
    if ranks is not None and ranks != codec.features.ranks:
        raise ValueError(
            f"codec {codec} was calibrated on {codec.features.ranks} ranks, and the group has {ranks}: "
            f"run 'flashcomm calibrate MODEL --tp {ranks}'"
        )
