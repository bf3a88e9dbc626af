"""Arithmetic of torch that keeps subnormal numbers, on threads that are set to replace them by zero.

A library that was built for fast mathematics sets that on the thread that imports it, and threads that start from there
inherit it. A rank where it happened would send other bits than its peers. The compiled loops of `kernels.cpu` look
after themselves; this is for the specification.

Hazard: torch switches both halves of the setting together (results and arguments), and so do we when we put it back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SMALLEST_NORMAL = 2.0**-1022


def flushed() -> bool:
    """Whether this thread takes subnormal numbers for zero.

    >>> flushed()
    False
    """
    return _SMALLEST_NORMAL * 0.5 == 0.0


@contextmanager
def kept() -> Iterator[None]:
    """Compute with subnormal numbers in this block.

    On a thread that flushes them, torch computes on that thread alone meanwhile: its helpers may flush, too.
    """
    if not flushed():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_flush_denormal(False)
    if threads > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_flush_denormal(True)
        if threads > 1:
            torch.set_num_threads(threads)
