"""Make the integers of `codecs/entropy_tables.py`: code lengths of Huffman codes for the codes of a row, and steps.

    python tools/make_entropy_tables.py > src/flashcomm/codecs/entropy_tables.py

The codes of a row are taken to be a generalised Gaussian of shape 1.5, rounded to integers, which lies between the
Gaussian and the Laplacian. Table t is for a mean magnitude of 2**((t - 4) / 4).

The mantissas of the steps are the fp32 numbers next to 2**(j / 16) whose reciprocals fp32 holds almost exactly, so that
one product with the reciprocal rounds as a division would.
"""

import heapq
import itertools
import math
import sys

import numpy as np

SHAPE = 1.5
TABLES = 15
LONGEST = 11
WIDEST = 63
"""Codes without the escape: |z| <= 31."""
RECORD_BITS = 6
"""Bits of an escape beside its code, for the choice of its place; rows with larger values pay more."""


def masses(mean: float, count: int) -> np.ndarray:
    """Probabilities of |q| = 0, 1, ..., count - 1."""
    grid = np.concatenate([np.linspace(0, 8, 160001), np.linspace(8, 200, 40001)[1:]])
    density = SHAPE / math.gamma(1 / SHAPE) * np.exp(-(grid**SHAPE))
    below = np.concatenate([[0], np.cumsum(np.diff(grid) * (density[1:] + density[:-1]) / 2)])
    edges = (np.arange(count + 1) - 0.5).clip(0) / mean * math.gamma(2 / SHAPE) / math.gamma(1 / SHAPE)
    return np.diff(np.interp(edges, grid, below))


def huffman(weights: list[float]) -> list[int]:
    """Code lengths, not limited."""
    heap = [(w, i, [i]) for i, w in enumerate(weights)]
    heapq.heapify(heap)
    lengths, made = [0] * len(weights), len(weights)
    while len(heap) > 1:
        (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        for i in left + right:
            lengths[i] += 1
        heapq.heappush(heap, (a + b, made, left + right))
        made += 1
    return lengths


def limited(weights: list[float]) -> list[int]:
    """Optimal code lengths of at most LONGEST bits, by package-merge (Larmore and Hirschberg, 1990)."""
    items = sorted((w, (i,)) for i, w in enumerate(weights))
    packages: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(LONGEST):
        merged = sorted(items + packages)
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[::2], merged[1::2], strict=False)]
    lengths = [0] * len(weights)
    for _, members in packages[: len(weights) - 1]:
        for i in members:
            lengths[i] += 1
    return lengths


def table(mean: float) -> tuple[list[int], int, float]:
    """Lengths of codes in the order 0, -1, 1, -2, ..., non-decreasing; the escape's length; mean |q|."""
    p = masses(mean, 600)
    signed = [p[0], *(x / 2 for x in p[1:] for _ in range(2))]
    best = None
    for count in range(3, WIDEST + 1, 2):
        escape = max(sum(signed[count:]), 1e-7)
        lengths = limited([*signed[:count], escape])
        cost = sum(n * w for n, w in zip(lengths, [*signed[:count], escape], strict=True)) + escape * RECORD_BITS
        if best is None or cost < best[0] - 1e-6:
            best = cost, sorted(lengths[:count]), lengths[count]
    assert best is not None
    mean_code = float((np.arange(600) * p).sum())
    return best[1], best[2], mean_code


def mantissa(target: float) -> int:
    """The pattern of an fp32 near `target` whose reciprocal is nearest to an fp32."""
    near = np.float32(target).view(np.int32) + np.arange(-4000, 4001, dtype=np.int32)
    near = near[near >= np.float32(1).view(np.int32)]
    m = near.view(np.float32).astype(np.float64)
    error = np.abs((1 / m).astype(np.float32).astype(np.float64) * m - 1)
    return int(near[error.argmin()])


def main():
    rows = [table(2.0 ** ((t - 4) / 4)) for t in range(TABLES)]
    means = [mean for _, _, mean in rows]
    write = sys.stdout.write
    write(
        '"""Integers of the entropy-coded formats, made by tools/make_entropy_tables.py: code lengths, and steps."""\n'
    )
    write("\nLENGTHS = (\n")
    for lengths, _, _ in rows:
        text = ", ".join(str(n) for n in lengths)
        write(f"    ({text}),\n")
    write(")\n")
    write('"""Bits of the codes 0, -1, 1, -2, 2, ... of each table; larger codes escape."""\n')
    write(f"\nESCAPES = ({', '.join(str(escape) for _, escape, _ in rows)})\n")
    write('"""Bits of the escape of each table."""\n')
    edges = [round(256 * math.sqrt(a * b)) for a, b in itertools.pairwise(means)]
    write(f"\nEDGES = ({', '.join(map(str, edges))})\n")
    write('"""Mean magnitudes of a row\'s codes, in 1/256, from which on tables 1, 2, ... are taken."""\n')
    write(f"\nMANTISSAS = ({', '.join(hex(mantissa(2.0 ** (j / 16)) if j else 0x3F800000) for j in range(16))})\n")
    write('"""Patterns of sixteen fp32 from 1 to 2, a sixteenth of an octave apart."""\n')


if __name__ == "__main__":
    main()
