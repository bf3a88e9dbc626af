"""Progress of a long measurement: bars on a terminal, a line for each phase and half-minute where there is none."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str, int], Callable[[], None]]
"""Begins a phase, given its name and number of parts; returns a function to call after each part."""


PAUSE_S = 30.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def progress() -> Iterator[Step]:
    """Show progress for the length of a ``with`` block, which is given a `Step`."""
    if not sys.stderr.isatty():
        yield _announce
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def step(name: str, total: int) -> Callable[[], None]:
            task = bars.add_task(name, total=total)
            return lambda: bars.advance(task)

        yield step


def _announce(name: str, total: int) -> Callable[[], None]:
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    start = said = time.monotonic()
    done = 0

    def advance():
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if done < total and now - said >= PAUSE_S:
            said, left = now, (now - start) / done * (total - done)
            print(f"  {done} of {total} parts, {left / 60:.1f} min left", file=sys.stderr, flush=True)

    return advance
