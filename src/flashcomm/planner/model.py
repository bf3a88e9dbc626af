"""What a collective costs on one link: a latency, the cores' time per byte of the message, the link's per byte sent.

    seconds = latency + message_bytes * (codec_s_per_byte + bits / 16 * wire_s_per_byte)

for each way to run it; `bits` per value on the wire, of a bf16 message. `flashcomm tune` fits the three numbers to
calls on the real group, so whatever overlaps there is in them, and so is what the cores lose to the transfers.

Source: the alpha-beta model of collectives (Hockney 1994), with a term for the codec; the fit is our own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

SIZES = tuple(1 << n for n in range(10, 29))
"""Message sizes that are compared: 1 KiB to 256 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one way to run a collective. The wire's share is 0 where only one format was measured."""

    latency_s: float
    codec_s_per_byte: float
    wire_s_per_byte: float = 0.0

    def seconds(self, message_bytes: int, bits: float = 16.0) -> float:
        """How long a call takes.

        >>> Cost(latency_s=1e-3, codec_s_per_byte=1e-9, wire_s_per_byte=2e-9).seconds(1_000_000, bits=8)
        0.003
        """
        return self.latency_s + message_bytes * (self.codec_s_per_byte + bits / 16 * self.wire_s_per_byte)


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

    def as_dict(self) -> dict:
        """As JSON stores it."""
        ways = {
            kind: {str(w): asdict(c) for w, c in getattr(self, kind).items()} for kind in ("compressed", "uncompressed")
        }
        return {"name": self.name, "plain": asdict(self.plain), **ways}

    @classmethod
    def from_dict(cls, fields: dict) -> "Machine":
        """The inverse of `as_dict`."""
        ways = {
            kind: {Way.parse(w): Cost(**c) for w, c in fields[kind].items()} for kind in ("compressed", "uncompressed")
        }
        return cls(name=fields["name"], plain=Cost(**fields["plain"]), **ways)


def fit(samples: Sequence[tuple[int, float, float]], wire: bool) -> Cost:
    """The cost that comes nearest to (message bytes, bits, seconds), by relative error, with no number below 0.

    Args:
        samples: measured calls, of several sizes and, if `wire`, of several bits per value.
        wire: tell the link's share from the cores'.

    >>> fit([(0, 16, 1.0), (1000, 16, 3.0), (2000, 16, 5.0)], wire=False)
    Cost(latency_s=1.0, codec_s_per_byte=0.002, wire_s_per_byte=0.0)
    """
    terms = [lambda size, bits: 1.0, lambda size, bits: float(size)]
    if wire:
        terms.append(lambda size, bits: size * bits / 16)
    rows = np.array([[term(size, bits) / seconds for term in terms] for size, bits, seconds in samples])
    scale = np.abs(rows).max(0)
    active = list(range(len(terms)))
    while True:
        solution = np.linalg.lstsq(rows[:, active] / scale[active], np.ones(len(rows)))[0] / scale[active]
        if solution.min() >= 0 or len(active) == 1:
            break
        # A negative cost is noise: leave out the worst and fit the others again.
        active.pop(int((solution * scale[active]).argmin()))
    values = [0.0] * 3
    for i, value in zip(active, solution, strict=True):
        values[i] = float(f"{max(0.0, value):.6g}")
    return Cost(latency_s=values[0], codec_s_per_byte=values[1], wire_s_per_byte=values[2])


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
