"""``+hadamard`` and ``+taco``: every value is spread over its group before it is quantised.

The Walsh-Hadamard transform H of n = 2**k values has entries +1 and -1 and H H = n. A group is transformed to
z = H (x / n), the base encodes z, and x = H z comes back; both scalings are powers of two, so only sums and differences
round. An outlier becomes small everywhere, which suits formats with few levels and data with few large values.

A group of any other size is transformed in blocks of powers of two, largest first: 100 = 64 + 32 + 4. So is a short
last group. The k stages run over neighbours first: values 1 apart, then 2, 4, ...; each stage is a + b, a - b in fp32.

``+taco`` multiplies each group by alpha before the transform (x * (alpha / n) is one product) and by 1 / alpha before
the transform back. alpha = 448 / sqrt(mean(x**2) + 1e-6), clamped to 1e-3 and 1e3, is sent as fp32 behind the base's
bytes. The sum of squares is sixteen running sums, of every sixteenth value, whose neighbours are then added pairwise.
``fp8g128+taco`` has TACO's two scales, 8.5 bits. In exact arithmetic alpha cancels against the base's own scale; it
only keeps the coefficients in a safe range.

Source: TACO (arXiv 2604.24088); the blocks and the exact scalings are our own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flashcomm.codecs import groups
from flashcomm.codecs.base import Codec, canonical_nan
from flashcomm.codecs.groups import bits_of, from_bits, like
from flashcomm.codecs.spike import Spike

_TARGET = 448.0


@dataclass(frozen=True, slots=True)
class Hadamard(Codec):
    """``{base}+hadamard`` or ``{base}+taco`` in front of any base that has groups: see the module's docstring.

    >>> from flashcomm.codecs.affine import Affine
    >>> codec = Hadamard(Affine(bits=8, symmetric=True, group=4))
    >>> codec.transform(torch.tensor([[8.0, 0.0, 0.0, 4.0]])).tolist()
    [[3.0, 1.0, 1.0, 3.0]]
    """

    base: Codec
    adaptive: bool = False

    def __post_init__(self):
        if isinstance(self.base, Spike):
            raise ValueError(
                f"{self} would look for spikes among transformed values, where none are left: take nf4+peaks, which "
                f"takes large values out and transforms the others, or {self.base.base}+hadamard"
            )
        if getattr(self.base, "group", None) is None:
            raise ValueError(f"a Hadamard transform goes in front of a format with groups, not {self.base}")

    def __str__(self) -> str:
        return f"{self.base}+{'taco' if self.adaptive else 'hadamard'}"

    @property
    def group(self) -> int:
        """Number of values that are transformed together, and quantised together."""
        return self.base.group  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def identity(self) -> str:
        return str(self).replace(str(self.base), self.base.identity, 1)

    def check(self, cols: int, ranks: int | None = None):
        self.base.check(cols, ranks)

    def _alpha_bytes(self, cols: int) -> int:
        return 4 * groups.count(cols, self.group) * self.adaptive

    def payload_bytes(self, cols: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return self.base.payload_bytes(cols, dtype) + self._alpha_bytes(cols)

    def segment(self, cols: int) -> int:
        return self.base.segment(cols)

    def transform(self, x: torch.Tensor, alpha: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [T, H] -> H (x * (alpha / n)) in each block; alpha [T, H] is 1 if not given."""
        if alpha is None:
            return by_block(self.group, lambda x: butterflies(x * (1.0 / x.shape[-1])), x)
        return by_block(self.group, lambda x, alpha: butterflies(x * (alpha * (1.0 / x.shape[-1]))), x, alpha)

    def _alpha(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [T, H] -> each group's alpha, [T, G]."""
        cols = x.shape[1]
        size = min(self.group, cols)
        count = groups.count(cols, size)
        squares = F.pad(x.square(), (0, count * size - cols)).unflatten(1, (count, size))
        running = F.pad(squares, (0, -size % 16)).unflatten(2, (-1, 16))
        total = running[:, :, 0]
        for i in range(1, running.shape[2]):
            total = total + running[:, :, i]
        while total.shape[-1] > 1:
            total = total[..., ::2] + total[..., 1::2]
        n = torch.full((count,), float(size), dtype=torch.float32, device=x.device)
        n[-1] = cols - (count - 1) * size
        # The square root in float64: that of fp32 in torch is not correctly rounded on every CPU.
        root = (total[..., 0] / n + 1e-6).double().sqrt().float()
        return (like(root, _TARGET) / root).clamp(1e-3, 1e3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        cols = x.shape[1]
        if cols == 0:
            return torch.empty(x.shape[0], 0, dtype=torch.uint8, device=x.device)
        x = x.float()
        if not self.adaptive:
            return self.base.encode(self.transform(x))
        alpha = canonical_nan(self._alpha(x))
        z = self.transform(x, groups.by_value(alpha, self.group, cols))
        return torch.cat([self.base.encode(z), groups.to_bytes(bits_of(alpha), 4)], 1)

    def decode(self, payload: torch.Tensor, cols: int, dtype: torch.dtype) -> torch.Tensor:
        cut = payload.shape[1] - self._alpha_bytes(cols)
        value = self.base.decode(payload[:, :cut], cols, torch.float32)
        if cols == 0:
            return value.to(dtype)
        if self.adaptive:
            alpha = from_bits(groups.from_bytes(payload[:, cut:], 4))
            value = value * groups.by_value(like(alpha, 1.0) / alpha, self.group, cols)
        return canonical_nan(by_block(self.group, butterflies, value).to(dtype))

    def step(self, x: torch.Tensor) -> torch.Tensor:
        cols = x.shape[1]
        if cols == 0:
            return x.float()
        x = x.float()
        alpha = groups.by_value(self._alpha(x), self.group, cols) if self.adaptive else like(x, 1.0)
        z = self.transform(x, alpha)
        step = self.base.step(z)

        def total(block: torch.Tensor) -> torch.Tensor:
            return block.sum(-1, keepdim=True).expand_as(block)

        # The errors of all coefficients may add up. Rounding: k + 4 operations on at most these magnitudes, both ways.
        log = self.group.bit_length() + 4
        rounding = log * 2.0**-22 * ((x * alpha).abs() + z.abs() + step) + 2.0**-140
        bound = by_block(self.group, total, step * (1 + 2.0**-13) + rounding)
        # Decoded values, and the sums on the way to them, may leave fp32; then the group becomes NaN.
        largest = by_block(self.group, lambda block: block.abs().amax(-1, keepdim=True).expand_as(block), x)
        return (bound / alpha).masked_fill(~(largest + bound / alpha / 2 < 3e38), float("nan"))


def blocks_of(n: int) -> list[tuple[int, int]]:
    """(start, size) of each block: the powers of two that add up to n, largest first.

    >>> blocks_of(100)
    [(0, 64), (64, 32), (96, 4)]
    """
    found, start = [], 0
    for k in reversed(range(n.bit_length())):
        if n >> k & 1:
            found.append((start, 1 << k))
            start += 1 << k
    return found


def by_block(group: int, function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """Apply a function to the blocks of each group of rows [T, H], and put its results together to rows."""
    cols = rows[0].shape[1]
    full = cols // group * group
    parts = []
    for start, stop, n in ((0, full, group), (full, cols, cols - full)):
        if start == stop:
            continue
        grouped = [x[:, start:stop].unflatten(1, (-1, n)) for x in rows]
        done = [function(*(x[..., at : at + size] for x in grouped)) for at, size in blocks_of(n)]
        parts.append(torch.cat(done, -1).flatten(1))
    return torch.cat(parts, 1)


def butterflies(x: torch.Tensor) -> torch.Tensor:
    """H x along the last dimension, a power of two: stages of a + b and a - b, neighbours first."""
    apart = 1
    while apart < x.shape[-1]:
        pair = x.unflatten(-1, (-1, 2, apart))
        a, b = pair.unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        apart *= 2
    return x
