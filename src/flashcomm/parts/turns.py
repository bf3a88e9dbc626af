"""Let functions of one thread take turns: while one waits for a transfer, the next one computes.

Each function runs, as a greenlet, up to its first `wait`; then the next function runs up to its first `wait`, and so on
round. A function that is resumed waits for the transfer that it started, which had the turns of all others to arrive.
The order depends on the program alone, so all ranks start their collectives in the same order.

Hazard: greenlets share the state of their thread, such as torch's modes. State that differs between functions must be a
`contextvars.ContextVar`, because each greenlet has a context of its own.

Source: our own; that halves of a prompt take turns is ISO's idea (arXiv 2409.11155).
"""

import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import greenlet

_part: "contextvars.ContextVar[int | None]" = contextvars.ContextVar("part", default=None)


class Waitable(Protocol):
    """A transfer that can be waited for, such as `flashcomm.Work`."""

    def wait(self) -> Any:
        """Wait for the result and return it."""


def part() -> int | None:
    """Number, from 0, of the function that has its turn; None outside `run`."""
    return _part.get()


def wait(transfer: Waitable) -> Any:
    """Wait for `transfer` and return its result; within `run`, the other functions have their turns first.

    Raises:
        Exception: what ``transfer.wait()`` raises.
    """
    if part() is not None:
        parent = greenlet.getcurrent().parent
        assert parent is not None
        parent.switch(transfer)
    return transfer.wait()


def run(functions: Sequence[Callable[[], Any]]) -> list:
    """Call all functions, which take turns wherever one of them comes to `wait`.

    Args:
        functions: the first one leads; it is always one `wait` ahead of the second, and so on.

    Returns:
        Their results, in their order.

    Raises:
        RuntimeError: called by a function that takes turns already.
        Exception: raised by the first function that failed. The others are ended where they wait, after their transfers
            have arrived, so that none is left under way.

    >>> from types import SimpleNamespace
    >>> arrived = SimpleNamespace(wait=lambda: None)
    >>> def count(name):
    ...     print(name, 1)
    ...     wait(arrived)
    ...     print(name, 2)
    >>> run([lambda: count("a"), lambda: count("b")])
    a 1
    b 1
    a 2
    b 2
    [None, None]
    """
    if part() is not None:
        raise RuntimeError("parts of a prompt take turns already: a part cannot be split once more")
    results: list = [None] * len(functions)
    line: deque[tuple[int, greenlet.greenlet, Waitable | None]] = deque()
    for number, function in enumerate(functions):
        runner = greenlet.greenlet(function)
        runner.gr_context = contextvars.copy_context()
        runner.gr_context.run(_part.set, number)
        line.append((number, runner, None))
    try:
        while line:
            number, runner, _ = line.popleft()
            outcome = runner.switch()
            if runner.dead:
                results[number] = outcome
            else:
                line.append((number, runner, outcome))
    except BaseException:
        # Of several errors the first is the cause.
        for _, runner, transfer in line:
            if transfer is not None:
                with suppress(Exception):
                    transfer.wait()
            while not runner.dead:
                with suppress(Exception):
                    runner.throw(greenlet.GreenletExit)
        raise
    return results
