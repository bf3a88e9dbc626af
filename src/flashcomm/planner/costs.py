"""What a collective costs on one link: lines of latency and seconds per byte between the sizes that were measured.

At each size two formats, of 4 and 8 bits, tell the link's share, which grows with the bits, from the cores'. Between
sizes, and beyond the largest, time grows along a line, alpha + beta * bytes; below the smallest it stays as it is. So
whatever overlaps in a call is in its cost, and whatever the cores lose to the transfers.

Source: the alpha-beta model of collectives (Hockney 1994), with a term for the codec; the lines in pieces are our own.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = tuple(1 << n for n in range(10, 29))
"""Message sizes that are compared: 1 KiB to 256 MiB."""


class Point(NamedTuple):
    """What calls of one size cost: ``fixed_s + bits * per_bit_s`` seconds."""

    message_bytes: int
    fixed_s: float
    per_bit_s: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one way to run a collective: points in order of their sizes."""

    points: tuple[Point, ...]

    def seconds(self, message_bytes: int, bits: float = 16.0) -> float:
        """How long a call takes whose values have so many bits on the wire.

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
        """From (message bytes, bits, seconds), with one or two numbers of bits at each size.

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
class Way:
    """How to run a compressed collective."""

    algorithm: str
    pieces: int = 1

    def __str__(self) -> str:
        return f"{self.algorithm}/{self.pieces}" if self.pieces > 1 else self.algorithm

    @classmethod
    def parse(cls, text: str) -> "Way":
        """The inverse of `str`."""
        algorithm, _, pieces = text.partition("/")
        return cls(algorithm=algorithm, pieces=int(pieces or 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine:
    """Costs on one group of ranks: of the backend's own all-reduce, and of each way that flashcomm has."""

    name: str
    plain: Cost
    compressed: dict[Way, Cost] = field(default_factory=dict)
    uncompressed: dict[Way, Cost] = field(default_factory=dict)
    """bf16 and fp32 as they are, through our own algorithms: over shared memory they beat the backend."""

    def holds(self, cost: Cost, way: Way, message_bytes: int) -> bool:
        """Whether the cost of `way` holds for messages of this size: it does not start later, and was not given up."""
        first, last = cost.points[0].message_bytes, cost.points[-1].message_bytes
        given_up = last < self.plain.points[-1].message_bytes and last < message_bytes
        return (way.pieces == 1 or first <= message_bytes) and not given_up

    def as_dict(self) -> dict:
        """As JSON stores it."""
        spell = lambda costs: {str(way): cost.points for way, cost in costs.items()}  # noqa: E731
        ours = {"compressed": spell(self.compressed), "uncompressed": spell(self.uncompressed)}
        return {"name": self.name, "plain": self.plain.points, **ours}

    @classmethod
    def from_dict(cls, fields: dict) -> "Machine":
        """The inverse of `as_dict`."""
        cost = lambda points: Cost(tuple(Point(*point) for point in points))  # noqa: E731
        read = lambda costs: {Way.parse(way): cost(points) for way, points in costs.items()}  # noqa: E731
        ours = {"compressed": read(fields["compressed"]), "uncompressed": read(fields["uncompressed"])}
        return cls(name=fields["name"], plain=cost(fields["plain"]), **ours)


def crossover(wins: Sequence[bool], sizes: Sequence[int] = SIZES) -> int | None:
    """The size from which on every larger one wins, or None: a lone win among losses is noise.

    >>> crossover([True, False, True, True], sizes=[1, 2, 4, 8])
    4
    """
    tail = None
    for won, size in zip(reversed(wins), reversed(sizes), strict=True):
        if not won:
            break
        tail = size
    return tail
