"""Decide whether a prompt in parts is faster than in one piece, and where to cut it, from times of one prompt.

A decoder computes segments, each of which ends with a sum over ranks. A segment of n tokens that attend to p pairs of
query and key takes ``fixed_s + n * token_s + p * pair_s``: matrix products are linear, attention is quadratic. A sum
takes ``fixed_s + n * token_s``, and the cores are busy for some share of it. Parts take turns as in
`flashcomm.parts.turns`, so the time of a split follows from a walk through the turns, with one core and one link.

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

from flashcomm.planner.batches import Batch, PartWork, Rows

MOST_PARTS = 4
MARGIN = 0.97
"""Factor on the time in one piece below which a split is worth it."""
MIN_TOKENS = 128
"""Shortest prompt that is worth a plan: shorter ones take as long as their Python."""
_MORE, _LESS_EVEN = 0.98, 0.99
"""Factors that more parts, and less even ones, must win by: the model's own error is of that size, and few even parts
lose the least by it."""
_RATIOS = tuple(1.15**n for n in sorted(range(-5, 6), key=abs))
CROWDED = 0.1
"""Share by which computing and sending take longer at once than one after the other, times the threads for each core:
prompts in two parts took 1.07 to 1.17 times the CPU time of one piece. llama-160m, 2 and 4 ranks on 2 cores of an AMD
EPYC, links of 200 Mbit/s to 10 Gbit/s, 2026-11-22."""
_TILE = 64
"""Tokens of which parts are multiples where that leaves a choice, because matrix products are faster then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Seconds as a function of tokens and of query-key pairs."""

    fixed_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    least_s: float = 0.0
    """Shortest time of the tokens: weights are read once for all of them."""

    def seconds(self, tokens: float, pairs: float = 0.0) -> float:
        """Predict seconds for `tokens` tokens and `pairs` query-key pairs.

        >>> Line(fixed_s=1, token_s=2, pair_s=3).seconds(10, 100)
        321
        >>> Line(token_s=2, least_s=50).seconds(10), Line(token_s=2, least_s=50).seconds(30)
        (50.0, 60.0)
        """
        return self.fixed_s + max(self.least_s, tokens * self.token_s) + pairs * self.pair_s

    @classmethod
    def through(cls, points: "Sequence[tuple[float, float, float]]") -> "Line":
        """Fit points of (tokens, pairs, seconds) without negative terms; if all pairs are 0, without the term of pairs.

        >>> line = Line.through([(1, 0, 3.0), (2, 0, 5.0)])
        >>> round(line.fixed_s, 9), round(line.token_s, 9)
        (1.0, 2.0)
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
    """Something whose time depends on a number of tokens, such as a `Line`."""

    def seconds(self, tokens: float) -> float:
        """Predict seconds for `tokens` tokens."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Times of a model's segments and sums in one codec on the ranks of a group."""

    segments: tuple[Line, ...]
    """S segments, in order; a sum follows each but the last."""
    sum: Timed
    """Time of a sum over ranks, from its start to its end, if the link was not idle before."""
    layers: int = 1
    """Number of times that the segments between the first and the last run."""
    burst_s: float = 0.0
    """Seconds of transfer that an idle, token-bucket-limited link sends at full speed."""
    busy: float = 0.0
    """Share of a sum's time in which it takes the core from the segments; 0 if there is another core for it."""
    uneven: float = 0.0
    """Share of a segment's time that its sum waits for the rank that is slowest this time, if prompts run in one piece.
    In parts there is no such wait: ranks compute another part instead of waiting for each other at every sum."""
    crowded: float = 0.0
    """Share by which segments and sums take longer while they run at once; 0 if the ranks leave a core idle."""
    whole: float = 1.0
    """Measured over predicted time in one piece, where that runs as a compiled graph and parts do not."""
    skips: str = "none"
    """Parts whose attention leaves out the keys that follow a token: ``all``, the ``first``, or ``none``."""

    @property
    def sums(self) -> int:
        """Number of sums of a prompt in one piece."""
        return min(1, len(self.segments) - 1) + self.layers * max(0, len(self.segments) - 2)

    def seconds(self, sizes: Sequence[int], rows: int = 1, before: int = 0) -> float:
        """Predict seconds of a prompt that runs in parts.

        Args:
            sizes: tokens of each part; a single number for a prompt in one piece.
            rows: prompts in the batch.
            before: tokens that the cache holds already.
        """
        return self.turns_s(Rows(sum(sizes), rows, before).parts(sizes, self.skips))

    def turns_s(self, parts: Sequence[PartWork]) -> float:
        """Predict seconds of parts that take turns; of one part, of one piece."""
        # In one piece all ranks wait for each sum anyway.
        busy, late, slow = (self.busy, 1.0, 1 + self.crowded) if len(parts) > 1 else (0.0, 1 + self.uneven, 1.0)
        computes = {line: [slow * late * line.seconds(*part) for part in parts] for line in self.segments}
        transfers = [slow * self.sum.seconds(part.tokens) for part in parts]
        core = link = 0.0
        burst = self.burst_s
        ready = [0.0] * len(parts)

        def run(segments: Sequence[Line]):
            nonlocal core, link, burst
            for segment in segments:
                for part, (compute, transfer) in enumerate(zip(computes[segment], transfers, strict=True)):
                    core = max(core, ready[part]) + compute
                    # An idle link saves up for a burst, and this transfer uses as much of it as it can.
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
                # Layers that begin in the same state take the same time.
                core += left * (core - start)
                ready = [core + one for one in lead[1:-1]]
                break
        for part, compute in enumerate(computes[last]):
            core = max(core, ready[part]) + compute
        return core

    def compute_s(self, tokens: int, rows: int = 1, before: int = 0) -> float:
        """Predict seconds of the segments of a prompt in one piece."""
        return self._compute_s(*Rows(tokens, rows, before).parts((tokens,), self.skips))

    def communication_s(self, tokens: int, rows: int = 1) -> float:
        """Predict seconds of the sums of a prompt in one piece."""
        return self.sums * self.sum.seconds(rows * tokens)

    def bound_s(self, batch: Batch) -> float:
        """Predict the larger of the seconds of all segments and of all sums, which no overlap can be faster than."""
        (work,) = batch.parts((batch.tokens,), self.skips)
        return max(self._compute_s(work), self.communication_s(work.tokens))

    def _compute_s(self, work: PartWork) -> float:
        times = [segment.seconds(*work) for segment in self.segments]
        return sum(times) + (self.layers - 1) * sum(times[1:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A prompt's parts, and the predicted times."""

    sizes: tuple[int, ...]
    """Tokens of each part; a single number for one piece."""
    seconds: float | None = None
    """Predicted seconds in these parts."""
    whole_s: float | None = None
    """Predicted seconds in one piece."""


def choose(profile: Profile, tokens: int, rows: int = 1, before: int = 0) -> Split:
    """Choose the fastest parts for prompts of one length.

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
    return fastest(profile, Rows(tokens, rows, before))


@lru_cache(maxsize=1024)
def fastest(profile: Profile, batch: Batch) -> Split:
    """Choose the fastest parts for a batch; one piece unless parts win by `MARGIN`."""
    tokens = batch.tokens

    def seconds_of(sizes: tuple[int, ...]) -> float:
        return profile.turns_s(batch.parts(sizes, profile.skips))

    whole = profile.whole * seconds_of((tokens,))
    best, least = (tokens,), MARGIN * whole
    if profile.bound_s(batch) >= least:
        # Even perfect overlap would not win.
        return Split(sizes=best, seconds=whole, whole_s=whole)
    for count in range(2, MOST_PARTS + 1):
        for ratio in _RATIOS:
            sizes = _geometric(tokens, count, ratio)
            if sizes is None:
                continue
            sizes = batch.fitted(sizes)
            seconds = seconds_of(sizes)
            more = _MORE if count > len(best) else _LESS_EVEN
            if seconds < (more if len(best) > 1 else 1.0) * least:
                best, least = sizes, seconds
    return Split(sizes=best, seconds=least if len(best) > 1 else whole, whole_s=whole)


def _geometric(tokens: int, count: int, ratio: float) -> tuple[int, ...] | None:
    """Cut into parts that are each `ratio` times as long as the one before; None if they would be too short."""
    unit = _TILE if tokens >= 2 * count * _TILE else 1
    weights = [ratio**n for n in range(count)]
    edges = [round(tokens * sum(weights[:n]) / sum(weights) / unit) * unit for n in range(count)] + [tokens]
    sizes = tuple(end - start for start, end in itertools.pairwise(edges))
    return sizes if min(sizes) >= MIN_TOKENS // 2 else None
