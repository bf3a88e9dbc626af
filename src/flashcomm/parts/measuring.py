"""Time the segments and the sums of one prompt for the planner: its parts run one after the other.

Three parts of different lengths separate the time that grows with tokens, with pairs of tokens, and not at all. Ranks
tell each other their times and take the same ones: the slowest rank's compute, and the shortest time of each sum, as a
rank that is early only waits.

Source: our own.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from flashcomm.collectives.group import group_of
from flashcomm.machine import Seat, crowd
from flashcomm.planner.batches import PartWork
from flashcomm.planner.overlap import CROWDED, Line, Profile

SHARES = (1, 2, 5)
"""Shares of the tokens, for the parts of a timed prompt."""
REPEATS = 4
"""Number of sums by which the rate is measured."""


class PartTimes(NamedTuple):
    """Seconds of one part's segments and sums."""

    segments: list[float]
    sums: list[float]


class Rate(NamedTuple):
    """Times of sums that follow each other without a pause."""

    tokens: int
    seconds: float
    """Wall-clock seconds per sum."""
    busy_s: float
    """CPU seconds per sum."""


class Stopwatch:
    """Makes each sum at once, and notes its seconds and those of the segment before it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._segments: list[float] = []
        self._sums: list[float] = []
        self.names: list[str] = []
        """Names of the modules whose sums were made."""
        self.latest: torch.Tensor | None = None
        """Result of the latest sum."""
        self._restart()

    def wait(self, start: Callable[[], Any], name: str) -> torch.Tensor:
        """Make a sum, in place of `flashcomm.parts.turns.wait`."""
        self._segments.append(self._lap())
        self.names.append(name)
        self.latest = result = start().wait()
        self._sums.append(self._lap())
        return result

    def part(self) -> PartTimes:
        """Return the times of the part that has just ended."""
        times = PartTimes([*self._segments, self._lap()], self._sums)
        self._segments, self._sums = [], []
        self._restart()
        return times

    def rate(self, reduce: Callable[[torch.Tensor], Any], tokens: int) -> Rate:
        """Measure sums over ranks of `tokens` tokens, otherwise shaped like the latest one."""
        assert self.latest is not None
        x = self.latest.new_zeros((tokens, self.latest.shape[-1]))
        # An idle link may send the first one faster than its rate.
        reduce(x)
        self._lap()
        busy = time.process_time()
        for _ in range(REPEATS):
            reduce(x)
        return Rate(tokens, self._lap() / REPEATS, (time.process_time() - busy) / REPEATS)

    def _restart(self):
        self._lap_start = time.perf_counter()
        self._lap()

    def _lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        lap, self._lap_start = now - self._lap_start, now
        return lap


def profile_of(
    parts: Sequence[PartTimes],
    rates: Sequence[Rate],
    names: Sequence[str],
    work: Sequence[PartWork],
    skips: str,
    group: Any,
    device: torch.device,
) -> Profile:
    """Combine the times of all ranks to one profile, the same on every rank.

    Args:
        parts: times of each part on this rank, in order.
        rates: of sums as long as those of some parts, the longest part among them.
        names: the module of each sum of a part.
        work: of each part.
        skips: see `Profile.skips`.
        group: the ranks.
        device: of the computation.
    """
    mine = [*map(tuple, parts)], [*map(tuple, rates)], Seat.mine()
    told: list[tuple] = group_of(group).ranks.tell(mine)
    times = [[PartTimes(*part) for part in theirs] for theirs, *_ in told]
    # Layers repeat, so the segments before the sums of the same module of each layer are alike.
    kinds = [re.sub(r"\d+", "*", name) for name in names] + ["end"]
    lines, usual_s, slowest_s = {}, 0.0, 0.0
    for kind in dict.fromkeys(kinds):
        places = [n for n, one in enumerate(kinds) if one == kind]
        points = []
        for part, of_part in enumerate(work):
            usual = max(statistics.median(rank[part].segments[n] for n in places) for rank in times)
            points.append((*of_part, usual))
            usual_s += max(sum(rank[part].segments[n] for n in places) for rank in times)
            slowest_s += sum(max(rank[part].segments[n] for rank in times) for n in places)
        lines[kind] = Line.through(points)
    steady = [[Rate(*rate) for rate in rates] for rates in zip(*(theirs for _, theirs, *_ in told), strict=True)]
    sums = Line.through([(rates[0].tokens, 0, max(rate.seconds for rate in rates)) for rates in steady])
    longest = max(range(len(work)), key=lambda part: work[part].tokens)
    alone_s = statistics.median(map(min, zip(*(rank[longest].sums for rank in times), strict=True)))
    busy = max(rate.busy_s / rate.seconds for rates in steady for rate in rates)
    # A GPU computes and sends without the cores.
    crowded = crowd([seat for *_, seat in told]) if device.type == "cpu" else 0.0
    segments, layers = _repeated([lines[kind] for kind in kinds])
    profile = Profile(
        segments=segments,
        layers=layers,
        sum=sums,
        burst_s=max(0.0, sums.seconds(work[longest].tokens) - alone_s),
        # A second of a core that ranks share keeps all of them from computing; if cores are left over, none.
        busy=min(1.0, crowded * busy),
        crowded=CROWDED * crowded,
        uneven=slowest_s / usual_s - 1 if usual_s else 0.0,
        skips=skips,
    )
    # Ranks may differ in their cores.
    return group_of(group).ranks.tell(profile)[0]


def _repeated(segments: Sequence[Line]) -> tuple[tuple[Line, ...], int]:
    """Find the layers that repeat between the first segment and the last, as `Profile.layers` counts them.

    >>> a, b, c = (Line(fixed_s=seconds) for seconds in (1, 2, 3))
    >>> _repeated([c, a, b, a, b, c]) == ((c, a, b, c), 2), _repeated([a, b, a, c]) == ((a, b, a, c), 1)
    (True, True)
    """
    inner = list(segments[1:-1])
    for length in range(1, len(inner) // 2 + 1):
        layers, rest = divmod(len(inner), length)
        if not rest and inner == layers * inner[:length]:
            return (segments[0], *inner[:length], segments[-1]), layers
    return tuple(segments), 1


def slowest(ratio: float, group: Any) -> float:
    """Return the largest of all ranks' figures, the same on every rank."""
    return max(group_of(group).ranks.tell(ratio))
