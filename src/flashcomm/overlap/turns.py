"""Functions of one thread that take turns: who waits for a transfer lets the next one compute.

A function runs, as a greenlet, up to its first `wait`; then the next one runs up to its own, and so on round. Whoever
is resumed waits for the transfer that it started, which had all the others' turns to arrive. The order follows from
the program alone, so all ranks start their collectives in the same order.

Hazard: greenlets share what belongs to the thread, such as torch's modes. What differs between functions must be a
`contextvars.ContextVar`, of which each has its own.

Source: our own; that halves of a prompt take turns is ISO's idea (arXiv 2409.11155).
"""

import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import greenlet

_part: "contextvars.ContextVar[int | None]" = contextvars.ContextVar("part", default=None)


class Transfer(Protocol):
    """What a function waits for, such as `flashcomm.Work`."""

    def wait(self) -> Any:
        """The result, once it is there."""


def part() -> int | None:
    """The number, from 0, of the function that has its turn; None outside of `run`."""
    return _part.get()


def wait(transfer: Transfer) -> Any:
    """The result of `transfer`; in a function that `run` runs, the others have their turns first.

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
        functions: the first one leads: it is always a `wait` ahead of the next, and so on.

    Returns:
        Their results, in their order.

    Raises:
        RuntimeError: called by a function that takes turns already.
        Exception: what the first function to fail raised. The others are ended where they wait, once what they wait for
            has arrived, so that no transfer is left under way.

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
    line: deque[tuple[int, greenlet.greenlet, Transfer | None]] = deque()
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
