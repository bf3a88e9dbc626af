"""Large CPU tensors in huge pages, whose memory is used again once nobody holds it.

Memory that is fresh from the operating system costs a page fault for every 4 KiB, and for a result of 32 MiB all faults
together take longer than the sum. So large results lie in memory of our own. It asks for pages of 2 MiB, which also
make encoding into it and decoding from it faster, and goes into a bounded pool when the last tensor, view or array over
it is gone. There the operating system may take huge pages back at any time (``MADV_FREE``), but for the first 64 MiB,
so that the pool does not make memory short.

Why no result is overwritten while a caller holds it: torch itself says when it is given up. The storage holds the
memory as a Python buffer and drops it when it is freed, and views, aliases, graphs of autograd, arrays of numpy and
DLPack capsules hold the storage. A storage that moves to memory shared with other processes drops the buffer then.

Hazard: such a storage cannot grow by ``resize_``, like that of `torch.from_numpy`.

Source: our own.
"""

import contextlib
import functools
import mmap
import weakref
from pathlib import Path
from typing import NamedTuple

import torch

HUGE_BYTES = 2 << 20
"""Bytes of a huge page on x86, and on ARM with pages of 4 KiB."""
LEAST_BYTES = 4 << 20
"""Bytes from which a result is large."""
MOST_IDLE_BYTES = 256 << 20
"""Bytes that may wait in the pool."""
KEPT_BYTES = 64 << 20
"""Bytes of the pool that are not marked as free: marking takes 0.03 ms, and the next use is slower."""
# A page of 4 KiB that was marked as free costs another fault, so marking pays only where pages are huge.
_MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class _Block(NamedTuple):
    memory: mmap.mmap
    start: int
    """Offset of the first huge page."""
    size: int
    """Bytes from there on."""


_idle: list[_Block] = []
"""The pool, the longest unused first. Blocks come back at any moment, from any thread and inside of a garbage
collection, which a lock would not survive, so whoever changes the list does it in one operation of the interpreter."""


def is_large(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a tensor is worth memory of our own."""
    return device.type == "cpu" and shape.numel() * dtype.itemsize >= LEAST_BYTES


def empty(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Make an uninitialised, contiguous, large CPU tensor."""
    size = shape.numel() * dtype.itemsize
    block = _take(size)
    if block is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    window = memoryview(block.memory)[block.start : block.start + size]
    # At exit tensors may still be in use.
    weakref.finalize(window, _give_back, block).atexit = False
    storage = torch.frombuffer(window, dtype=torch.uint8).untyped_storage()
    # A view of these bytes would be a view to autograd, too.
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # pyright: ignore[reportCallIssue]


def _take(size: int) -> _Block | None:
    """A block of at least `size` bytes; None if this operating system has none."""
    size = -(-size // HUGE_BYTES) * HUGE_BYTES
    # The latest first: it may still be in the cache. What is much larger stays for what is.
    for _, block in sorted(enumerate(_idle), key=lambda entry: (entry[1].size, -entry[0])):
        if size <= block.size <= 2 * size:
            with contextlib.suppress(ValueError):
                _idle.remove(block)
                return block
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        # Private: a child of this process must not write into it.
        memory = mmap.mmap(-1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        # torch's own error says how much is missing.
        return None
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return _Block(memory, -address % HUGE_BYTES, size)


def _give_back(block: _Block):
    if _huge() and block.size + _idle_bytes() > KEPT_BYTES:
        with contextlib.suppress(OSError):
            block.memory.madvise(mmap.MADV_FREE)
    _idle.append(block)
    while _idle_bytes() > MOST_IDLE_BYTES:
        with contextlib.suppress(IndexError):
            _idle.pop(0)


def _idle_bytes() -> int:
    return sum(block.size for block in list(_idle))


@functools.cache
def _huge() -> bool:
    """Whether the operating system gives huge pages to those who ask."""
    try:
        return "[never]" not in _MODES.read_text()
    except OSError:
        return False
