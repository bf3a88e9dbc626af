"""When a prompt in parts is faster than in one piece, and where to cut it: arithmetic on what one prompt has shown.

A decoder computes segments, each of which ends with a sum over ranks. A segment of n tokens that attend to p pairs of
query and key takes ``fixed_s + n * token_s + p * pair_s``: matrix products are linear, attention is quadratic. A sum
takes ``fixed_s + n * token_s``, of which the cores are busy for some share. Parts take turns as in
`flashcomm.overlap.turns`, so the time of a split is found by going through the turns, with one core and one link.

Shape legend: P parts, S segments.

Source: ISO (arXiv 2409.11155) names the balance of compute and communication, and unequal parts; the model is our own.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

MOST_PARTS = 4
MARGIN = 0.97
"""What a split must win by."""
MIN_TOKENS = 128
"""Of a prompt that is worth a plan: shorter ones take as long as their Python."""
_MORE, _LESS_EVEN = 0.98, 0.99
"""What more parts, and less even ones, must win by: the model's own error is of that size, and few even ones lose the
least by it."""
_RATIOS = tuple(1.15**n for n in sorted(range(-5, 6), key=abs))
# Kernels leave out whole blocks: 512 and 1,024 causal tokens take 0.9 and 0.65 of the time that a mask of as many pairs
# takes. sdpa on a CPU, 2 cores of an AMD EPYC, 2026-11-21.
_BLOCK = 192
CROWDED = 0.1
"""By what share computing and sending take longer at once than one after the other, times the threads for each core:
prompts in two parts took 1.07 to 1.17 times the CPU time of one piece. llama-160m, 2 and 4 ranks on 2 cores of an AMD
EPYC, links of 200 Mbit/s to 10 Gbit/s, 2026-11-22."""
_TILE = 64
"""Parts are multiples of it where that leaves a choice, as matrix products like them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Seconds for so many tokens and pairs."""

    fixed_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    least_s: float = 0.0
    """What tokens take at least, however few they are: weights are read once for all of them."""

    def seconds(self, tokens: float, pairs: float = 0.0) -> float:
        """What it says.

        >>> Line(fixed_s=1, token_s=2, pair_s=3).seconds(10, 100)
        321
        >>> Line(token_s=2, least_s=50).seconds(10), Line(token_s=2, least_s=50).seconds(30)
        (50.0, 60.0)
        """
        return self.fixed_s + max(self.least_s, tokens * self.token_s) + pairs * self.pair_s

    @classmethod
    def through(cls, points: "Sequence[tuple[float, float, float]]") -> "Line":
        """The best fit of (tokens, pairs, seconds), in which nothing is negative; pairs of 0 have no part in it.

        >>> Line.through([(1, 0, 3.0), (2, 0, 5.0)])
        Line(fixed_s=1.0, token_s=2.0, pair_s=0.0, least_s=0.0)
        """
        seconds = np.array([point[2] for point in points])
        # Relative errors, so that the small part of a prompt counts as much as the large one.
        weights = 1 / np.maximum(seconds, 1e-9)
        terms = np.array([[1.0, tokens, pairs] for tokens, pairs, _ in points])
        used = [n for n in range(3) if terms[:, n].any()]
        best, least = (0.0, 0.0, 0.0), math.inf
        for count in range(1, min(len(used), len(points)) + 1):
            for chosen in itertools.combinations(used, count):
                columns = terms[:, chosen] * weights[:, None]
                found = np.linalg.lstsq(columns, seconds * weights, rcond=None)[0]
                error = float(np.square(columns @ found - 1).sum())
                if (found >= 0).all() and error < least - 1e-12:
                    least, best = (
                        error,
                        tuple(round(float(found[chosen.index(n)]), 15) if n in chosen else 0.0 for n in range(3)),
                    )
        return cls(fixed_s=best[0], token_s=best[1], pair_s=best[2])


class Timed(Protocol):
    """Whatever takes a time that depends on a number of tokens, such as a `Line`."""

    def seconds(self, tokens: float) -> float:
        """For so many tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a model and a codec cost on the ranks of a group."""

    segments: tuple[Line, ...]
    """S of them, in order; each but the last is followed by a sum."""
    sum: Timed
    """A sum over ranks, from its start to its end, where the link was not idle before."""
    layers: int = 1
    """How often the segments between the first and the last are run through."""
    burst_s: float = 0.0
    """Of sending that an idle link makes up for, as those do whose rate is a limit on an average."""
    busy: float = 0.0
    """Share of a sum's time in which it takes the core from the segments; 0 where there is a core for it."""
    uneven: float = 0.0
    """Share of a segment's time that its sum waits, in one piece, for the rank that happens to be slowest this time.
    Parts make up for it: ranks that compute another part do not wait for each other at every sum."""
    crowded: float = 0.0
    """Share of their time that segments and sums take longer while they run at once; 0 where the ranks'
    threads leave a core over.
    """
    skips: str = "none"
    """Whose attention leaves out the keys that follow a token: ``all`` parts, the ``first``, or ``none``."""

    @property
    def sums(self) -> int:
        """How many there are in a prompt in one piece."""
        return min(1, len(self.segments) - 1) + self.layers * max(0, len(self.segments) - 2)

    def seconds(self, sizes: Sequence[int], rows: int = 1, before: int = 0) -> float:
        """Time of a prompt whose parts have so many tokens.

        Args:
            sizes: tokens of each part; a single one for a prompt in one piece.
            rows: prompts in the batch.
            before: tokens that the cache holds already.
        """
        starts = [before, *itertools.accumulate(sizes[:-1], initial=before)][1:] if len(sizes) > 1 else [before]
        tokens = [rows * size for size in sizes]
        attended = [rows * pairs(size, start, self.skips) for size, start in zip(sizes, starts, strict=True)]
        # Alone, a sum is waited for anyway, and by all ranks.
        busy, late, slow = (self.busy, 1.0, 1 + self.crowded) if len(sizes) > 1 else (0.0, 1 + self.uneven, 1.0)
        computes = {
            line: [slow * late * seconds for seconds in map(line.seconds, tokens, attended)] for line in self.segments
        }
        transfers = [slow * seconds for seconds in map(self.sum.seconds, tokens)]
        core = link = 0.0
        burst = self.burst_s
        ready = [0.0] * len(sizes)

        def run(segments: Sequence[Line]):
            nonlocal core, link, burst
            for segment in segments:
                for part, (compute, transfer) in enumerate(zip(computes[segment], transfers, strict=True)):
                    core = max(core, ready[part]) + compute
                    # What the link makes up for in its idle time, of which this transfer uses what it can.
                    burst = min(self.burst_s, burst + max(0.0, core - link))
                    ready[part] = link = max(link, core) + max(0.0, transfer - burst)
                    burst = max(0.0, burst - transfer)
                    core += busy * transfer

        *summed, last = self.segments
        run(summed[:1])
        lead: list[float] = []
        for left in range(self.layers - 1, -1, -1):
            start, earlier = core, lead
            run(summed[1:])
            lead = [one - core for one in (link, *ready)] + [burst]
            if earlier and all(math.isclose(a, b, abs_tol=1e-9 * core) for a, b in zip(earlier, lead, strict=True)):
                # Layers that begin alike take as long.
                core += left * (core - start)
                ready = [core + one for one in lead[1:-1]]
                break
        for part, compute in enumerate(computes[last]):
            core = max(core, ready[part]) + compute
        return core

    def compute_s(self, tokens: int, rows: int = 1, before: int = 0) -> float:
        """What the segments of a prompt in one piece take."""
        attended = rows * pairs(tokens, before, self.skips)
        times = [segment.seconds(rows * tokens, attended) for segment in self.segments]
        return sum(times) + (self.layers - 1) * sum(times[1:-1])

    def communication_s(self, tokens: int, rows: int = 1) -> float:
        """What the sums of a prompt in one piece take."""
        return self.sums * self.sum.seconds(rows * tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How a prompt is to be run."""

    sizes: tuple[int, ...]
    """Tokens of each part; a single one for one piece."""
    seconds: float | None = None
    """As predicted."""
    whole_s: float | None = None
    """In one piece, as predicted."""


def pairs(tokens: int, before: int, skips: str) -> float:
    """Pairs of query and key that attention goes through, hidden ones too where it does not leave them out.

    >>> pairs(100, 0, "first"), pairs(1000, 0, "first"), pairs(1000, 500, "first"), pairs(1000, 500, "all")
    (10000.0, 692000.0, 1500000.0, 1192000.0)
    """
    skipped = skips == "all" or (skips == "first" and before == 0)
    return tokens * (before + tokens) - (tokens * max(0.0, tokens / 2 - _BLOCK) if skipped else 0.0)


@lru_cache(maxsize=1024)
def choose(profile: Profile, tokens: int, rows: int = 1, before: int = 0) -> Split:
    """The fastest way to run a prompt; in one piece unless parts win by `MARGIN`.

    Args:
        profile: of the model and codec.
        tokens: of each prompt in the batch.
        rows: prompts in the batch.
        before: tokens that the cache holds already.

    >>> even = Profile(segments=(Line(token_s=1e-6),) * 9, sum=Line(token_s=1e-6))
    >>> choose(even, 1024).sizes
    (512, 512)
    >>> choose(Profile(segments=even.segments, sum=Line(token_s=1e-9)), 1024).sizes
    (1024,)
    """
    whole = profile.seconds((tokens,), rows, before)
    best, least = (tokens,), MARGIN * whole
    if max(profile.compute_s(tokens, rows, before), profile.communication_s(tokens, rows)) >= least:
        # Not even perfect overlap would win.
        return Split(sizes=best, seconds=whole, whole_s=whole)
    for count in range(2, MOST_PARTS + 1):
        for ratio in _RATIOS:
            sizes = _geometric(tokens, count, ratio)
            if sizes is None:
                continue
            seconds = profile.seconds(sizes, rows, before)
            more = _MORE if count > len(best) else _LESS_EVEN
            if seconds < (more if len(best) > 1 else 1.0) * least:
                best, least = sizes, seconds
    return Split(sizes=best, seconds=least if len(best) > 1 else whole, whole_s=whole)


def _geometric(tokens: int, count: int, ratio: float) -> tuple[int, ...] | None:
    """Parts each `ratio` times as long as the one before; None if they would be too short."""
    unit = _TILE if tokens >= 2 * count * _TILE else 1
    weights = [ratio**n for n in range(count)]
    edges = [round(tokens * sum(weights[:n]) / sum(weights) / unit) * unit for n in range(count)] + [tokens]
    sizes = tuple(end - start for start, end in itertools.pairwise(edges))
    return sizes if min(sizes) >= MIN_TOKENS // 2 else None
