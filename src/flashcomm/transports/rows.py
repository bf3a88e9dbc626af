"""Rows that vary in length, one behind the other on the wire and apart by their bound in memory.

    packed     row 0 | row 1 | row 2                       each begins with its length, 4 bytes, low byte first
    apart      row 0 .... | row 1 .. | row 2 ......        each at a multiple of the bound

Codecs see rows that are apart, so they need not know. A message of packed rows may be the work of a broken peer, so
its lengths are checked before any row is moved.

Loaded when such rows first travel, because numba takes a while; without it, the same functions run as Python.

Source: our own.
"""

import ctypes

import numpy as np
import torch

from flashcomm import machine

LENGTH_BYTES = 4
"""Bytes of the length with which a row begins; they count too."""

_move, _compile = ctypes.memmove, lambda function: function
if not machine.why_not_compiled():
    from numba import njit, types

    from flashcomm.kernels.cpu.ops import compiled

    _move = types.ExternalFunction("memmove", types.int64(types.int64, types.int64, types.int64))
    _compile = lambda function: compiled(  # noqa: E731
        lambda on_disk: njit(nogil=True, error_model="numpy", cache=on_disk)(function)
    )


def _pack(payload, rows, bound, target):
    at, to, size = payload.ctypes.data, target.ctypes.data, 0
    for row in range(rows):
        start = row * bound
        count = int(payload[start]) | int(payload[start + 1]) << 8
        count |= int(payload[start + 2]) << 16 | int(payload[start + 3]) << 24
        if count < LENGTH_BYTES or count > bound:
            return -1
        _move(to + size, at + start, count)
        size += count
    return size


def _spread(payload, rows, bound, size, starts):
    at, end = payload.ctypes.data, 0
    for row in range(rows):
        if end + LENGTH_BYTES > size:
            return False
        count = int(payload[end]) | int(payload[end + 1]) << 8
        count |= int(payload[end + 2]) << 16 | int(payload[end + 3]) << 24
        if count < LENGTH_BYTES or count > bound:
            return False
        starts[row] = end
        end += count
    if end != size:
        return False
    # Rows only move up, so those before one still lie where they came.
    for row in range(rows - 1, -1, -1):
        start = int(starts[row])
        _move(at + row * bound, at + start, end - start)
        end = start
    return True


_pack, _spread = _compile(_pack), _compile(_spread)


def load():
    """Compile what moves rows, or load it from disk."""
    row = torch.tensor([[4, 0, 0, 0]], dtype=torch.uint8, device="cpu")
    assert spread(pack(row, row).view(1, 4), 4)


def pack(payload: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Move rows from a contiguous payload[n, P] to the beginning of a contiguous `into` of its size; return them.

    `into` may be `payload` itself.

    >>> payload = torch.tensor([[5, 0, 0, 0, 9, 0], [4, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    >>> pack(payload, torch.empty_like(payload)).tolist()
    [5, 0, 0, 0, 9, 4, 0, 0, 0]
    """
    flat = into.view(-1)
    rows, bound = payload.shape
    size = _pack(payload.view(-1).numpy(), rows, bound, flat.numpy())
    assert size >= 0, "a codec wrote a row that is longer than its bound"
    return flat[:size]


def spread(payload: torch.Tensor, size: int) -> bool:
    """Move packed rows from the first `size` bytes of a contiguous payload[n, P] to their places.

    Returns:
        Whether the lengths of n rows are at most P and add up to `size`; if not, nothing has been moved.

    >>> payload = torch.tensor([[5, 0, 0, 0, 9, 4], [0, 0, 0, 7, 7, 7]], dtype=torch.uint8)
    >>> spread(payload, 9), payload[0, :5].tolist(), payload[1, :4].tolist()
    (True, [5, 0, 0, 0, 9], [4, 0, 0, 0])
    >>> spread(payload, 9)
    False
    """
    rows, bound = payload.shape
    return bool(_spread(payload.view(-1).numpy(), rows, bound, size, np.empty(rows, np.int64)))
