"""The only timer: variants take turns in one run, so that other work on the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Sorted wall-clock seconds of one variant."""

    seconds: tuple[float, ...]

    def _quantile(self, q: float) -> float:
        return self.seconds[min(int(q * len(self.seconds)), len(self.seconds) - 1)]

    @property
    def p20_ms(self) -> float:
        return 1e3 * self._quantile(0.2)

    @property
    def p50_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def p80_ms(self) -> float:
        return 1e3 * self._quantile(0.8)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
    combine: Callable[[Sequence[float]], Sequence[float]] = lambda seconds: seconds,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Time every variant `repeats` times, in turn, forwards and backwards alternately.

    Args:
        variants: functions to time, by name.
        repeats: timed rounds; each runs every variant once.
        warmup: rounds before them that are not timed.
        before: runs before each call, outside its time (a barrier, say).
        after: runs after each call, inside its time (a wait until the work is done, say).
        combine: turns a variant's seconds, in the order of rounds, into those to report (the slowest rank's, say).
        progress: runs after each round.

    Returns:
        The times of each variant by its name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for round_number in range(-warmup, repeats):
        for name in order if round_number % 2 == 0 else reversed(order):
            before()
            start = time.perf_counter()
            variants[name]()
            after()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
        progress()
    return {name: Times(seconds=tuple(sorted(combine(values)))) for name, values in seconds.items()}
