"""Helpers of the formats with groups: rows as groups, and one number per group as bytes.

Shape legend: T rows, H columns, G = ceil(H / group) groups of a row, S values of a group.
"""

import torch

TINY = 2.0**-126
"""Smallest scale other than zero: its reciprocal is finite."""


def check(group: int):
    """Refuse a group size out of range.

    Raises:
        ValueError: fewer than 1 or more than 2**20 values.
    """
    if not 1 <= group <= 1 << 20:
        raise ValueError(f"a group has 1 to {1 << 20} values, not {group}")


def count(cols: int, group: int) -> int:
    """Number of groups of a row; the last one may be short.

    >>> count(300, 128)
    3
    """
    return -(-cols // group)


def by_group(x: torch.Tensor, group: int) -> torch.Tensor:
    """[T, H] -> [T, G, S]; a short last group is filled with copies of its last value, which change no range."""
    rows, cols = x.shape
    group = max(1, min(group, cols))
    missing = count(cols, group) * group - cols
    if missing:
        x = torch.cat([x, x[:, -1:].expand(rows, missing)], 1)
    return x.unflatten(1, (-1, group))


def by_value(per_group: torch.Tensor, group: int, cols: int) -> torch.Tensor:
    """[T, G] -> [T, H]: repeat each group's number for each of its values."""
    return per_group.repeat_interleave(max(1, min(group, cols)), 1)[:, :cols]


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """The int32 patterns of fp32 numbers."""
    return x.contiguous().view(torch.int32)


def from_bits(pattern: torch.Tensor) -> torch.Tensor:
    """fp32 numbers from their int32 patterns."""
    return pattern.contiguous().view(torch.float32)


def to_bytes(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """[T, N] integers -> [T, N * width] uint8, low byte first."""
    return torch.stack([numbers >> 8 * i & 0xFF for i in range(width)], -1).flatten(1).to(torch.uint8)


def from_bytes(payload: torch.Tensor, width: int) -> torch.Tensor:
    """Inverse of `to_bytes`, int32; four bytes give the pattern's sign too."""
    parts = payload.unflatten(1, (payload.shape[1] // width, width)).to(torch.int32)
    total = parts[..., 0]
    for i in range(1, width):
        total = total | parts[..., i] << 8 * i
    return total


def like(x: torch.Tensor, value: float) -> torch.Tensor:
    """Fill the shape of `x` with `value`: torch divides a CUDA tensor by a Python number with a rounded reciprocal."""
    return torch.full_like(x, value)
