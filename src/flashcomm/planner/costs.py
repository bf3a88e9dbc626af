"""Measured costs of collectives on one link: a latency and seconds per byte between the message sizes that were timed.

At each size two formats, of 4 and 8 bits, tell the link's share of the time, which grows with the bits, from the cores'
share. Between sizes, and beyond the largest, time grows along a line, alpha + beta * bytes; below the smallest size it
is constant. So a cost includes whatever overlaps within a call, and whatever the transfers take from the cores. Formats
with slower kernels than the two that were timed take `extra_s` more.

Source: the alpha-beta model of collectives (Hockney 1994), with a term for the codec; the lines in pieces are our own.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from flashcomm.codecs import Codec, Entropy, Levels, Lossless, Pair

SIZES = tuple(1 << n for n in range(10, 29))
"""Message sizes that are compared: 1 KiB to 256 MiB."""
# Before compression is worth its error, and before an algorithm of ours replaces the backend's, it must win by this.
MARGIN = 0.95
SLOW_S_PER_BYTE = 1.77e-9
"""Core seconds for each byte of a message that ecB takes beyond an int format, two_step among 4 ranks: encoding 1 + 1/4
and decoding 2 messages of 32 MiB in 28.5 and 11.9 ms more; ec6 and int6g128 in results/codec_cpu.md, 2026-11-28."""
_ROW = 4096
"""Values of a row, by which a codec's bits per value are counted."""


class Point(NamedTuple):
    """Cost of calls of one size: ``fixed_s + bits * per_bit_s`` seconds."""

    message_bytes: int
    fixed_s: float
    per_bit_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one algorithm: points in ascending order of their sizes."""

    points: tuple[Point, ...]

    def seconds(self, message_bytes: int, bits: float = 16.0) -> float:
        """Predict the seconds of a call that sends `bits` per value.

        >>> cost = Cost((Point(1000, 1.0, 0.0), Point(2000, 1.0, 0.25)))
        >>> cost.seconds(10, bits=4), cost.seconds(1500, bits=4), cost.seconds(3000, bits=4)
        (1.0, 1.5, 3.0)
        """
        points = self.points
        times = [point.fixed_s + bits * point.per_bit_s for point in points]
        if message_bytes <= points[0].message_bytes or len(points) == 1:
            return times[0]
        right = min(bisect_right([point.message_bytes for point in points], message_bytes), len(points) - 1)
        left = right - 1
        share = (message_bytes - points[left].message_bytes) / (
            points[right].message_bytes - points[left].message_bytes
        )
        # Noise may let a larger message seem cheaper; beyond what was measured that must not go on.
        rise = times[right] - times[left]
        return times[left] + share * (rise if share <= 1 else max(0.0, rise))

    @classmethod
    def measured(cls, samples: Sequence[tuple[int, float, float]]) -> "Cost":
        """Fit samples of (message bytes, bits, seconds), with one or two numbers of bits at each size.

        >>> Cost.measured([(1000, 4, 1.0), (1000, 8, 2.0)])
        Cost(points=(Point(message_bytes=1000, fixed_s=0.0, per_bit_s=0.25),))
        """
        points = []
        for size in sorted({size for size, _, _ in samples}):
            seen = sorted((bits, seconds) for n, bits, seconds in samples if n == size)
            (few, low), (many, high) = seen[0], seen[-1]
            per_bit = max(0.0, (high - low) / (many - few)) if many > few else 0.0
            points.append(Point(size, max(0.0, low - few * per_bit), per_bit))
        return cls(tuple(points))


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """An algorithm and the number of pieces in which a message travels; spelled ``two_step/3``."""

    name: str
    pieces: int = 1

    def __str__(self) -> str:
        return f"{self.name}/{self.pieces}" if self.pieces > 1 else self.name

    @classmethod
    def parse(cls, text: str) -> "Algorithm":
        """Read the spelling that `str` gives."""
        name, _, pieces = text.partition("/")
        return cls(name=name, pieces=int(pieces or 1))


class Fastest(NamedTuple):
    """The fastest algorithm for one message, and its predicted seconds."""

    algorithm: Algorithm | None
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkCosts:
    """Costs on the links of one group: of the backend's own all-reduce, and of each algorithm of ours."""

    name: str
    plain: Cost
    compressed: dict[Algorithm, Cost] = field(default_factory=dict)
    uncompressed: dict[Algorithm, Cost] = field(default_factory=dict)
    """Costs of sending bf16 and fp32 uncompressed by our own algorithms: over shared memory they beat the backend."""
    lossless: dict[Algorithm, Cost] = field(default_factory=dict)
    """Costs of sending bf16 without loss, whose kernels take longer than those of `compressed`."""

    def cheapest(self, codec: Codec, message_bytes: int) -> Fastest:
        """Find the fastest compressed algorithm; None, and infinite seconds, if all that fit `codec` were given up."""
        return _fastest(
            {
                algorithm: _seconds(algorithm, cost, codec, message_bytes)
                for algorithm, cost in self._costs_of(codec).items()
                if self._holds(algorithm, cost, message_bytes) and _fits(algorithm, codec)
            }
        )

    def exact(self, message_bytes: int) -> Fastest:
        """Find the fastest algorithm for uncompressed values; None if the backend's own all-reduce is faster."""
        plain_s = self.plain.seconds(message_bytes)
        ours = _fastest(
            {
                algorithm: cost.seconds(message_bytes)
                for algorithm, cost in self.uncompressed.items()
                if self._holds(algorithm, cost, message_bytes)
            }
        )
        return ours if ours.seconds < MARGIN * plain_s else Fastest(None, plain_s)

    def without_loss(self, exact: Fastest, message_bytes: int) -> Fastest | None:
        """Find the fastest pieces of the same algorithm for bf16 without loss; None if they are not faster."""
        best = _fastest(
            {
                algorithm: cost.seconds(message_bytes)
                for algorithm, cost in self.lossless.items()
                if exact.algorithm and algorithm.name == exact.algorithm.name
                if self._holds(algorithm, cost, message_bytes)
            }
        )
        return best if best.seconds < MARGIN * exact.seconds else None

    @lru_cache(maxsize=1024)
    def pays_from(self, codec: Codec) -> int | None:
        """Find the message size in bytes from which compression wins at every larger one; None if there is none."""
        return crossover([self.cheapest(codec, size).seconds < MARGIN * self.exact(size).seconds for size in SIZES])

    def pieces(self, codec: Codec, name: str, message_bytes: int) -> int | None:
        """Find the fastest number of pieces for the algorithm of this name; None if it was not measured at this size.

        Args:
            codec: wire format.
            name: ``one_step``, ``two_step`` or ``hierarchical``.
            message_bytes: on each rank, uncompressed.
        """
        best = _fastest(
            {
                algorithm: _seconds(algorithm, cost, codec, message_bytes)
                for algorithm, cost in self._costs_of(codec).items()
                if algorithm.name == name and self._holds(algorithm, cost, message_bytes)
            }
        )
        return best.algorithm.pieces if best.algorithm else None

    def seconds(self, algorithm: Algorithm | None, codec: Codec, message_bytes: int, *, exact: bool = False) -> float:
        """Predict the seconds of one call.

        Args:
            algorithm: one that was measured; None for the backend's own.
            codec: what is sent; of a `Levels` codec, the format between hosts counts.
            message_bytes: on each rank, uncompressed.
            exact: whether `codec` holds the values uncompressed, as the plans do that `auto` makes instead.
        """
        if algorithm is None:
            return self.plain.seconds(message_bytes)
        sent = codec.between if isinstance(codec, Levels) else codec
        if exact and not isinstance(sent, Lossless):
            return self.uncompressed[algorithm].seconds(message_bytes, sent.bits_per_value(_ROW))
        return _seconds(algorithm, self._costs_of(sent)[algorithm], sent, message_bytes)

    def _costs_of(self, codec: Codec) -> dict[Algorithm, Cost]:
        sent = codec.between if isinstance(codec, Levels) else codec
        return self.lossless if self.lossless and isinstance(sent, Lossless) else self.compressed

    def _holds(self, algorithm: Algorithm, cost: Cost, message_bytes: int) -> bool:
        """Whether a cost holds at this size: pieces were timed at or below it, and the algorithm was not given up."""
        first, last = cost.points[0].message_bytes, cost.points[-1].message_bytes
        given_up = last < self.plain.points[-1].message_bytes and last < message_bytes
        return (algorithm.pieces == 1 or first <= message_bytes) and not given_up

    def as_dict(self) -> dict:
        """Convert to what JSON stores."""
        spell = lambda costs: {str(algorithm): cost.points for algorithm, cost in costs.items()}  # noqa: E731
        ours = {"compressed": spell(self.compressed), "uncompressed": spell(self.uncompressed)}
        ours |= {"lossless": spell(self.lossless)} if self.lossless else {}
        return {"name": self.name, "plain": self.plain.points, **ours}

    @classmethod
    def from_dict(cls, fields: dict) -> "LinkCosts":
        """Read what `as_dict` returns."""
        cost = lambda points: Cost(tuple(Point(*point) for point in points))  # noqa: E731
        read = lambda costs: {Algorithm.parse(name): cost(points) for name, points in costs.items()}  # noqa: E731
        ours = {"compressed": read(fields["compressed"]), "uncompressed": read(fields["uncompressed"])}
        ours |= {"lossless": read(fields.get("lossless", {}))}
        return cls(name=fields["name"], plain=cost(fields["plain"]), **ours)


def crossover(wins: Sequence[bool], sizes: Sequence[int] = SIZES) -> int | None:
    """Find the size from which every larger one wins, or None: a lone win among losses is noise.

    >>> crossover([True, False, True, True], sizes=[1, 2, 4, 8])
    4
    """
    tail = None
    for won, size in zip(reversed(wins), reversed(sizes), strict=True):
        if not won:
            break
        tail = size
    return tail


def extra_s(codec: Codec, message_bytes: float) -> float:
    """Core seconds that the kernels of `codec` take beyond those of the formats that were timed; see `SLOW_S_PER_BYTE`.

    >>> from flashcomm.codecs import parse
    >>> [round(1e3 * extra_s(parse(spec), 16 << 20)) for spec in ("int8g128", "ec6", "bf16:ec6")]
    [0, 30, 15]
    """
    sent = codec.between if isinstance(codec, Levels) else codec
    slow = [isinstance(getattr(one, "base", one), Entropy) for one in sent.formats]
    return sum(slow) / len(slow) * SLOW_S_PER_BYTE * message_bytes


def _seconds(algorithm: Algorithm, cost: Cost, codec: Codec, message_bytes: int) -> float:
    """Predicted seconds of one compressed call."""
    whole, extra = cost.seconds(message_bytes, codec.bits_per_value(_ROW)), extra_s(codec, message_bytes)
    # All but one piece's share hides behind the transfers.
    link = max(0.0, whole - cost.seconds(message_bytes, 0)) if extra else 0.0
    return whole + extra - (1 - 1 / algorithm.pieces) * min(extra, link)


def _fastest(seconds: dict[Algorithm, float]) -> Fastest:
    algorithm = min(seconds, key=lambda one: seconds[one], default=None)
    return Fastest(algorithm, seconds[algorithm] if algorithm else math.inf)


def _fits(algorithm: Algorithm, codec: Codec) -> bool:
    """Whether `algorithm` can send `codec`: one step has one format, and levels need `hierarchical`."""
    if isinstance(codec, Levels):
        return algorithm.name == "hierarchical"
    return not (algorithm.name == "one_step" and isinstance(codec, Pair))
