"""What the segments and the sums of one prompt cost, for the planner: its parts run one after the other, timed.

Three parts of different lengths tell what grows with tokens, what with pairs of tokens, and what does not grow. Ranks
tell each other their times and take the same: of compute the slowest rank's, of a sum the shortest, because who is
early only waits.

Source: our own.
"""

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from flashcomm.collectives.state import state_of
from flashcomm.planner.overlap import Line, Profile, pairs

SHARES = (1, 2, 5)
"""Of the tokens, for the parts of a timed prompt."""


class Times(NamedTuple):
    """Of one part: what lies between its sums, and the sums."""

    segments: list[float]
    sums: list[float]
    busy_s: float
    """Of the cores, during the sums."""


class Stopwatch:
    """Makes each sum at once and notes how long it took, and the segment before it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._segments: list[float] = []
        self._sums: list[float] = []
        self._busy_s = 0.0
        self.names: list[str] = []
        """Of the modules whose sums were made."""
        self._restart()

    def wait(self, start: Callable[[], Any], name: str) -> torch.Tensor:
        """In place of `flashcomm.overlap.turns.wait`."""
        self._segments.append(self._lap())
        self.names.append(name)
        busy = time.process_time()
        result = start().wait()
        self._sums.append(self._lap())
        self._busy_s += time.process_time() - busy
        return result

    def part(self) -> Times:
        """The times of the part that has just ended."""
        times = Times([*self._segments, self._lap()], self._sums, self._busy_s)
        self._segments, self._sums, self._busy_s = [], [], 0.0
        self._restart()
        return times

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
    parts: Sequence[Times], names: Sequence[str], sizes: Sequence[int], rows: int, before: int, skips: str, group: Any
) -> Profile:
    """The same profile on every rank, from the times of each part on this rank.

    Args:
        parts: of each part, in order.
        names: the module of each sum of a part.
        sizes: tokens of each part.
        rows: prompts in the batch.
        before: tokens that the cache held before.
        skips: as `Profile.skips`.
        group: the ranks.
    """
    spare_cores = _cores() > torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    everyone: list[list[Times]] = state_of(group).tell([*map(tuple, parts)])
    everyone = [[Times(*one) for one in theirs] for theirs in everyone]
    # Layers repeat, so the segments before the sums of the same module of each layer are alike.
    kinds = [re.sub(r"\d+", "*", name) for name in names] + ["end"]
    starts = [before + sum(sizes[:n]) for n in range(len(sizes))]
    lines = {}
    for kind in dict.fromkeys(kinds):
        places = [n for n, one in enumerate(kinds) if one == kind]
        points = []
        for number, (size, start) in enumerate(zip(sizes, starts, strict=True)):
            slowest = max(statistics.median(rank[number].segments[n] for n in places) for rank in everyone)
            points.append((rows * size, rows * pairs(size, start, skips), slowest))
        lines[kind] = Line.through(points)
    transfers = []
    for number, size in enumerate(sizes):
        shortest = [min(times) for times in zip(*(rank[number].sums for rank in everyone), strict=True)]
        transfers.append((rows * size, 0, statistics.median(shortest)))
    whole = sum(sum(min(t) for t in zip(*(rank[n].sums for rank in everyone), strict=True)) for n in range(len(sizes)))
    busy = max(sum(part.busy_s for part in rank) for rank in everyone) / whole if whole else 0.0
    profile = Profile(
        segments=tuple(lines[kind] for kind in kinds),
        sum=Line.through(transfers),
        busy=0.0 if spare_cores else min(1.0, busy),
        skips=skips,
    )
    # Ranks may differ in their cores.
    return state_of(group).tell(profile)[0]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
