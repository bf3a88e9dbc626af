"""Progress of a long measurement: bars on a terminal, a line per phase where there is none."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str, int], Callable[[], None]]
"""Begins a phase, given its name and number of parts; returns a function to call after each part."""


@contextmanager
def progress() -> Iterator[Step]:
    """Show progress for the length of a ``with`` block, which is given a `Step`."""
    if not sys.stderr.isatty():
        yield _announce
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def step(name: str, total: int) -> Callable[[], None]:
            task = bars.add_task(name, total=total)
            return lambda: bars.advance(task)

        yield step


def _announce(name: str, total: int) -> Callable[[], None]:
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    return lambda: None
