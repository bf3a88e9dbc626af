"""Entropy-coded rows of exactly B bits per value: ``ec8`` to ``ec3``, and every eighth of a bit in between.

One uniform step per row, codes q = round(x / step), and a Huffman code for q from fifteen static tables. The step is
the smallest of a ladder, sixteen to an octave, with which the row fits its slot. So an outlier costs some ten bits
once, where a group with a shared range gives up bits of all its values. Every row has the same size, and depends on
nothing but its own values.

All decisions follow from integers, and the only rounded operation is the product x * (1 / step), whose reciprocals are
exact to 2**-36. So every backend writes the same bytes.

A row that lies on the grid of a step already, such as one that was decoded before, is sent without loss. An all-reduce
to which one rank alone contributes rounds once, not twice.

    row      header, planes, first pair, second pair (rows of at least 1,024 values only)
    header   3 bytes: step 12 bits (0: zeros, 4095: NaN), table 6 bits, width of a record 5 bits; then the size of the
             first pair in bytes, if there are two
    planes   the lowest bits of q, one to seven planes as `bits` packs single bits, where the mean code is above 6
    pair     one stream from the front, the records of the row behind it (first pair), one stream from the back

A stream has the codes of a quarter or a half of the row. Streams from both ends need no offsets, and several are
decoded at a time. A record is the excess of a code that is beyond its table, which holds an escape for it.

Hazard: a NaN or Inf, or a value beyond 1.875 * 2**126, makes its row NaN, as there are no groups.

Source: entropy-coded scalar quantisation (Gish and Pierce, 1968); rate control by bisection, streams from both ends and
grids that survive are our own.
"""

from dataclasses import dataclass

import torch

from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.entropy_rate import spacing
from flashcomm.codecs.entropy_streams import read, write

FEWEST, MOST = 20, 80
"""Eighths of a bit per value that are allowed."""

LEAST_BYTES = 16
"""Size of the shortest payload."""


@dataclass(frozen=True, slots=True)
class Entropy(Codec):
    """``ecB``: B bits per value, `eighths` / 8 of them.

    Rows shorter than about 128 / B values take 16 bytes.

    >>> codec = Entropy(34)
    >>> str(codec), codec.payload_bytes(4096), codec.bits_per_value(4096)
    ('ec4.25', 2176, 4.25)
    >>> x = torch.tensor([[0.5, -1.0, 3.0, 1000.0]])
    >>> codec.decode(codec.encode(x), 4, torch.float32).tolist()  # on the grid of 1/2, so without loss
    [[0.5, -1.0, 3.0, 1000.0]]

    Args:
        eighths: 20 to 80.

    Raises:
        ValueError: fewer or more bits.
    """

    eighths: int

    def __post_init__(self):
        if not FEWEST <= self.eighths <= MOST:
            raise ValueError(
                f"entropy-coded rows have {FEWEST / 8:g} to {MOST / 8:g} bits per value, in eighths, such as ec4.25 or "
                f"ec6, not {self.eighths / 8:g}"
            )

    def __str__(self) -> str:
        return f"ec{self.eighths / 8:g}"

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return max(self.eighths * cols // 64, LEAST_BYTES) if cols else 0

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        size = self.payload_bytes(x.shape[1])
        if x.numel() == 0:
            return torch.empty(x.shape[0], size, dtype=torch.uint8, device=x.device)
        return torch.cat([write(part.float(), size) for part in x.split(_rows_at_once(x.shape[1]))])

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        if payload.numel() == 0:
            return torch.empty(payload.shape[0], cols, dtype=dtype, device=payload.device)
        parts = [read(part, cols) for part in payload.split(_rows_at_once(cols))]
        return canonical_nan(torch.cat(parts).to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == 0:
            return x.float()
        size = self.payload_bytes(x.shape[1])
        return torch.cat([spacing(part.float(), size) for part in x.split(_rows_at_once(x.shape[1]))])


def _rows_at_once(cols: int) -> int:
    """Rows for which the specification's tables of bits fit into some hundred megabytes."""
    return max(1, (1 << 20) // cols)
