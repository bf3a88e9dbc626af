"""Tokens of one forward pass, and the work of each part that they are cut into.

Work is counted in tokens, for matrix products and messages, and in query-key pairs, for attention.

Source: our own.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# Kernels leave out whole blocks: 512 and 1,024 causal tokens take 0.9 and 0.65 of the time that a mask of as many pairs
# takes. sdpa on a CPU, 2 cores of an AMD EPYC, 2026-11-21.
_BLOCK = 192
_SNAP = 1 / 16
"""Share of the tokens by which a cut may move to lie between two requests."""


class PartWork(NamedTuple):
    """Work of one part."""

    tokens: int
    pairs: float
    """Query-key pairs that attention computes."""


class Batch(Protocol):
    """Tokens that can be cut into parts."""

    @property
    def tokens(self) -> int:
        """Number of tokens along which it is cut."""
        ...

    def fitted(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Move the cuts a little, to where they cost least."""
        ...

    def parts(self, sizes: Sequence[int], skips: str) -> list[PartWork]:
        """Work of each part, if the parts have `sizes` tokens and attention leaves out keys as `skips` says."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """Prompts of one length, cut across: each part has some tokens of every prompt."""

    tokens: int
    """Tokens of each prompt."""
    rows: int = 1
    """Number of prompts."""
    before: int = 0
    """Tokens that the cache holds already."""

    def fitted(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return `sizes`: all cuts cost the same."""
        return sizes

    def parts(self, sizes: Sequence[int], skips: str) -> list[PartWork]:
        """Work of each part; `sizes` are tokens of each prompt.

        >>> Rows(100, rows=2).parts((60, 40), "none")
        [PartWork(tokens=120, pairs=7200.0), PartWork(tokens=80, pairs=8000.0)]
        """
        starts = itertools.accumulate(sizes[:-1], initial=self.before)
        return [
            PartWork(self.rows * size, self.rows * pairs(size, start, skips))
            for size, start in zip(sizes, starts, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests that lie one behind the other, as servers batch them: a part may end inside of one."""

    requests: tuple[tuple[int, int], ...]
    """Tokens of each request in this step, and tokens of it that the cache holds already."""

    @property
    def tokens(self) -> int:
        """Tokens of all requests."""
        return sum(tokens for tokens, _ in self.requests)

    def fitted(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Move each cut to a near end of a request, if there is one and every part keeps some tokens.

        >>> Requests(((500, 0), (540, 0))).fitted((520, 520)), Requests(((100, 0), (940, 0))).fitted((520, 520))
        ((500, 540), (520, 520))
        """
        total = self.tokens
        ends = list(itertools.accumulate(tokens for tokens, _ in self.requests))
        cuts = []
        for cut in itertools.accumulate(sizes[:-1]):
            nearest = min(ends, key=lambda end: abs(end - cut))
            cuts.append(nearest if abs(nearest - cut) <= _SNAP * total else cut)
        moved = tuple(end - start for start, end in itertools.pairwise([0, *cuts, total]))
        return moved if min(moved) > 0 else sizes

    def parts(self, sizes: Sequence[int], skips: str) -> list[PartWork]:
        """Work of each part.

        >>> Requests(((1, 50), (99, 0))).parts((60, 40), "none")
        [PartWork(tokens=60, pairs=3532.0), PartWork(tokens=40, pairs=3960.0)]
        """
        work = []
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            attended, at = 0.0, 0
            for tokens, before in self.requests:
                first, last = max(at, end - size), min(at + tokens, end)
                if first < last:
                    attended += pairs(last - first, before + first - at, skips)
                at += tokens
            work.append(PartWork(size, attended))
        return work


def pairs(tokens: int, before: int, skips: str) -> float:
    """Count the query-key pairs that attention computes, hidden pairs too unless it leaves them out.

    >>> pairs(100, 0, "first"), pairs(1000, 0, "first"), pairs(1000, 500, "first"), pairs(1000, 500, "all")
    (10000.0, 692000.0, 1500000.0, 1192000.0)
    """
    skipped = skips == "all" or (skips == "first" and before == 0)
    return tokens * (before + tokens) - (tokens * max(0.0, tokens / 2 - _BLOCK) if skipped else 0.0)
