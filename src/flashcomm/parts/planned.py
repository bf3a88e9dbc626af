"""Run forward passes in parts that take turns, where measured times of this model say that it pays.

`Planned` decides, runs, counts, and measures anew when times drift; what a pass is, and how it is cut, is the caller's:
`flashcomm.overlap` cuts the prompts of a transformers model, and `flashcomm.integrations.vllm_overlap` vLLM's steps.

Source: our own; parts of one prompt that take turns are ISO's (arXiv 2409.11155).
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol

import torch

from flashcomm.collectives.stats import record_prefill
from flashcomm.parts import turns
from flashcomm.parts.measuring import SHARES, Stopwatch, profile_of, slowest
from flashcomm.planner.batches import Batch
from flashcomm.planner.overlap import MIN_TOKENS, Profile, Split, fastest

MEASURE_TOKENS = 2 * MIN_TOKENS
"""Fewest tokens that are measured: fewer say too little about more."""
DRIFT = 1.3
"""Factor by which times may differ from those after the measurement before they are measured anew."""
WINDOW = 8
"""Passes whose median shows a drift."""

Waiting = Callable[[Callable[[], Any], str], torch.Tensor]
"""Function that makes a sum: of one that starts it and returns a `turns.Waitable`, and the name of its module."""


class Refused(Exception):
    """Raised if a pass cannot be split; the message says why, in words that do not vary with the pass."""


class Pass(Protocol):
    """One forward pass that can be cut."""

    @property
    def batch(self) -> Batch:
        """Its tokens."""
        ...

    @property
    def skips(self) -> str:
        """Parts whose attention leaves out keys; see `Profile.skips`."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the computation."""
        ...

    def whole(self) -> Any:
        """Run in one piece."""
        ...

    def check(self, sizes: Sequence[int]):
        """Raise `Refused` if it cannot be cut so."""
        ...

    def calls(self, sizes: Sequence[int]) -> list[Callable[[], Any]]:
        """Make a function for each part, which runs it."""
        ...

    def joined(self, outputs: Sequence[Any]) -> Any:
        """Join the parts' outputs to that of the whole."""
        ...

    def waiting(self, wait: Waiting) -> AbstractContextManager:
        """Make the model's sums by `wait` in a ``with`` block."""
        ...

    def reduce(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Sum `x` over the ranks as the parts do, and wait for it."""
        ...


class Planned:
    """Passes of one model over the ranks of one group.

    Args:
        parts: see `Planned.parts`.
        graphs: whether a pass in one piece runs as a compiled graph. Measured parts do not tell its time, so the first
            pass that they say to cut runs in one piece once more, to compare.
    """

    profiles: "dict[Any, Profile]"
    """Measured profiles, by codec and algorithm; without an entry the next long pass is measured."""
    last_split: Split | None
    """Parts of the latest pass and their predicted times; None if it was not planned."""
    wait: Waiting
    """Function that makes the sums while parts take turns; a benchmark may replace it."""

    def __init__(self, parts: "int | str | Sequence[int]", *, graphs: bool = False):
        self.parts, self.last_split, self.profiles = parts, None, {}
        self.wait = lambda start, name: turns.wait(start())
        self._graphs = graphs
        self._compared: set[Any] = set()
        self._ratios: dict[tuple[Any, bool], list[float]] = {}
        self._usual: dict[tuple[Any, bool], float] = {}

    @property
    def parts(self) -> "str | tuple[int, ...]":
        """Shares of the parts, or ``auto``; a number of parts may be assigned too, on all ranks alike."""
        return self._parts

    @parts.setter
    def parts(self, parts: "int | str | Sequence[int]"):
        shares = (1,) * parts if isinstance(parts, int) else parts
        if shares != "auto" and (isinstance(shares, str) or not shares or min(shares) < 1):
            raise ValueError(f"parts={parts!r}: give 'auto', a number of 1 or more, or a positive share for each part")
        self._parts = shares if isinstance(shares, str) else tuple(shares)

    def run(self, one: Pass, key: Any, group: Any) -> Any:
        """Run a pass in one piece or in parts, the same on every rank.

        Args:
            one: the pass.
            key: codec and algorithm of its sums; passes with another key are measured on their own.
            group: the ranks.
        """
        self.last_split = None
        try:
            split = self._split_of(one, key)
            if split is None:
                return self._measured(one, key, group)
            if len(split.sizes) > 1:
                one.check(split.sizes)
            self.last_split = split
        except Refused as why:
            return refused(one, why)
        whole_s = split.whole_s if self._graphs and len(split.sizes) > 1 and key not in self._compared else None
        start = time.perf_counter()
        if whole_s:
            how, output = "in one piece: to compare", one.whole()
        elif len(split.sizes) == 1:
            how, output = "in one piece: parts would not be faster", one.whole()
        else:
            how = f"{len(split.sizes)} parts"
            with one.waiting(self.wait):
                output = one.joined(turns.run(one.calls(split.sizes)))
        # On a GPU the host is done long before.
        seconds = time.perf_counter() - start if one.device.type == "cpu" else None
        record_prefill(how, whole_s or split.seconds, seconds)
        if whole_s and seconds is not None:
            self._compared.add(key)
            self.profiles[key] = replace(self.profiles[key], whole=slowest(seconds / whole_s, group))
        elif split.seconds is not None and seconds is not None:
            self._watch(key, len(split.sizes) > 1, seconds / split.seconds, group)
        return output

    def _split_of(self, one: Pass, key: Any) -> Split | None:
        """Choose the parts of a pass, or None to measure it."""
        if len(self.parts) == 1:
            raise Refused("asked for")
        batch = one.batch
        if not isinstance(self.parts, str):
            return Split(sizes=batch.fitted(tuple(cut(batch.tokens, self.parts))))
        if batch.tokens < MIN_TOKENS:
            raise Refused(f"fewer than {MIN_TOKENS} tokens")
        profile = self.profiles.get(key)
        if profile is not None:
            return fastest(profile, batch)
        if batch.tokens < MEASURE_TOKENS:
            raise Refused(f"nothing measured yet, and fewer than {MEASURE_TOKENS} tokens")
        return None

    def _measured(self, one: Pass, key: Any, group: Any) -> Any:
        """Run the parts one after the other, and keep their profile."""
        sizes, watch = cut(one.batch.tokens, SHARES), Stopwatch(one.device)
        one.check(sizes)
        outputs, times = [], []
        with one.waiting(watch.wait):
            for call in one.calls(sizes):
                outputs.append(call())
                times.append(watch.part())
        names, work = watch.names[: len(times[0].sums)], one.batch.parts(sizes, one.skips)
        rates = [watch.rate(lambda x: one.reduce(x, names[-1]), part.tokens) for part in work[1:]]
        self.profiles[key] = profile_of(times, rates, names, work, one.skips, group, one.device)
        record_prefill(f"{len(SHARES)} parts one after the other, to measure them")
        return one.joined(outputs)

    def _watch(self, key: Any, in_parts: bool, ratio: float, group: Any):
        """Forget a profile when measured times drift away from those it predicted at first.

        Args:
            key: of the profile.
            in_parts: whether the pass ran in parts.
            ratio: its measured time over the predicted.
            group: the ranks; they decide together, because each has its own clock.
        """
        ratios = self._ratios.setdefault((key, in_parts), [])
        ratios.append(ratio)
        if len(ratios) < WINDOW:
            return
        usual = slowest(statistics.median(ratios), group)
        ratios.clear()
        first = self._usual.setdefault((key, in_parts), usual)
        if not first / DRIFT <= usual <= first * DRIFT:
            del self.profiles[key]
            self._compared.discard(key)
            for way in (False, True):
                self._ratios.pop((key, way), None)
                self._usual.pop((key, way), None)
            record_prefill("measured anew: times have drifted")


def refused(one: Pass, why: Refused) -> Any:
    """Run a pass in one piece, and count why."""
    record_prefill(f"in one piece: {why}")
    return one.whole()


def cut(tokens: int, shares: Sequence[int]) -> list[int]:
    """Divide `tokens` among parts.

    Raises:
        Refused: fewer tokens than parts.

    >>> cut(1000, (1, 1)), cut(10, (1, 2, 1))
    ([500, 500], [2, 5, 3])
    """
    if tokens < len(shares):
        raise Refused("fewer tokens than parts")
    edges = [tokens * sum(shares[:n]) // sum(shares) for n in range(len(shares) + 1)]
    # A small share may come to nothing.
    for n in range(1, len(edges)):
        edges[n] = min(max(edges[n], edges[n - 1] + 1), tokens - len(shares) + n)
    return [end - start for start, end in itertools.pairwise(edges)]
