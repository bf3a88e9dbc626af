"""Rate control of entropy-coded rows: the step of each row, and its codes.

The smallest step with which a row fits its slot, found by secants and halvings; or the row's own grid, if it lies on
one already. Integers alone decide, so every backend finds the same step.

Source: rate control by bisection and grids that survive are our own.
"""

from typing import NamedTuple

import torch

from flashcomm.codecs.entropy_layout import (
    BISECTIONS,
    FLOOR,
    GUESS,
    GUESSES,
    LADDER,
    LARGEST,
    OCTAVES,
    constants,
    layout,
    plane_bits,
    raw_of,
    split,
)
from flashcomm.codecs.entropy_tables import MANTISSAS
from flashcomm.codecs.groups import bits_of, from_bits


class Coded(NamedTuple):
    """A row's codes with one step: all [T] but the codes, [T, H]."""

    q: torch.Tensor
    table: torch.Tensor
    width: torch.Tensor
    bits: torch.Tensor


def _quantise(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """fp32 [T, H] and steps [T] -> the codes, int64."""
    return torch.round(x * constants(x.device).inverses[k][:, None]).to(torch.int64)


def _measure(q: torch.Tensor, size: int) -> Coded:
    """Choose the table of a row of codes, and count its bits."""
    c, cols = constants(q.device), q.shape[1]
    shape = layout(cols, size)
    magnitude = q.abs()
    mean = torch.div(256 * magnitude.clamp_max(shape.cap).sum(1), cols, rounding_mode="floor")
    table = (mean[:, None] >= c.edges).sum(1)
    raw = raw_of(table)
    base = table - 4 * raw
    number, _ = split(q, raw)
    limit = c.limits[base]
    words = c.lengths[base].gather(1, number.clamp_max(64)).sum(1)
    # The width follows from the largest magnitude, whatever its sign.
    excess = split(magnitude.amax(1, keepdim=True), raw)[0][:, 0] - limit
    width = torch.where(excess >= 0, _bit_length(excess.clamp_min(1)), 0)
    escapes = (number >= limit[:, None]).sum(1)
    return Coded(q, table, width, words + escapes * width + plane_bits(cols, q.device)[raw])


def _bit_length(n: torch.Tensor) -> torch.Tensor:
    """Bits of integers from 1 to 2**24."""
    return (bits_of(n.float()) >> 23).long() - 126


class _Reach(NamedTuple):
    """Limits of each row's step, from its largest magnitude and its mean exponent, all [T]."""

    bad: torch.Tensor
    zero: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    guess: torch.Tensor


def _reach(x: torch.Tensor, size: int) -> _Reach:
    """The steps that a row may have: `first` to `last`, of which `last` makes all codes 0, and a guess."""
    pattern = bits_of(x) & 0x7FFFFFFF
    most = pattern.amax(1)
    bad = most > LARGEST
    most = most.masked_fill(bad, 0)
    # The ladder's first step that is not below twice the largest magnitude.
    twice = bits_of(2 * from_bits(most))
    mantissas = [pattern - MANTISSAS[0] for pattern in MANTISSAS]
    above = sum((twice & 0x7FFFFF > mantissa).long() for mantissa in mantissas)
    last = (16 * ((twice >> 23) - 1).long() + 1 + above).clamp_min(1)
    first = (last - 16 * OCTAVES).clamp_min(1)
    # From the mean exponent, which no outlier moves far.
    exponent = (pattern >> 23).long()
    exponent = torch.maximum(exponent, exponent.amax(1, keepdim=True) - 24)
    mean = torch.div(16 * exponent.sum(1), x.shape[1], rounding_mode="floor")
    room = min(128 * size // x.shape[1], 384)
    return _Reach(bad, most == 0, first, last, torch.minimum(torch.maximum(mean - room + GUESS, first), last))


def _rate(x: torch.Tensor, reach: _Reach, size: int) -> torch.Tensor:
    """The rate control: a step with which each row fits its slot, while it does not with the next smaller one."""
    cols, budget = x.shape[1], layout(x.shape[1], size).budget
    # Beyond the ladder only the last step serves, which makes everything 0.
    below, fits, k = reach.first - 1, reach.last.clamp_max(LADDER + 1), reach.guess
    for probe in range(GUESSES + BISECTIONS):
        # The number of probes is fixed where asking for their outcome would wait for a device.
        if x.device.type == "cpu" and not (fits - below > 1).any():
            break
        k = torch.minimum(torch.maximum(k, below + 1), torch.maximum(fits - 1, below + 1))
        over = _measure(_quantise(x, k), size).bits - budget
        fits = torch.where((over <= 0) & (k < fits), k, fits)
        below = torch.where((over > 0) & (k > below) & (k < fits), k, below)
        secant = k + torch.div(16 * over, cols, rounding_mode="floor")
        secant = torch.where(over > 0, torch.maximum(secant, k + 1), secant)
        k = secant if probe < GUESSES - 1 else torch.div(below + fits, 2, rounding_mode="floor")
    return torch.where(fits > LADDER, reach.last, fits)


def _own_grid(x: torch.Tensor, reach: _Reach, k: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The coarsest step on whose grid each row lies without error, and whether there is one with which it fits.

    Steps a whole number of octaves apart have nested grids, so there are sixteen families. The smallest magnitude tells
    which of them may serve, from their finest steps on; at most two are tried.
    """
    c = constants(x.device)
    pattern = bits_of(x) & 0x7FFFFFFF
    least = from_bits(pattern.masked_fill(pattern == 0, 0x7F000000).amin(1))
    start = torch.maximum(torch.maximum(reach.first - 16, k - FLOOR), torch.ones_like(k))
    family = torch.minimum(
        start[:, None] + torch.arange(16, dtype=torch.int64, device=x.device), torch.full_like(start, LADDER)[:, None]
    )
    codes = torch.round(least[:, None] * c.inverses[family])
    may = (codes >= 1) & (codes * c.steps[family] == least[:, None])
    found, best = torch.zeros_like(k, dtype=torch.bool), k
    for _ in range(2):
        place = may.long().argmax(1)
        finest = (start + place).clamp_max(LADDER)
        q = _quantise(x, finest)
        on_grid = may.any(1) & ~found & (q.float() * c.steps[finest][:, None] == x).all(1)
        best = torch.where(on_grid, finest + 16 * _common_octaves(q, finest), best)
        found = found | on_grid
        may.scatter_(1, place[:, None], False)
    fits = _measure(_quantise(x, best), size).bits <= layout(x.shape[1], size).budget
    return best, found & fits


def _common_octaves(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[T, H] codes of step k -> [T]: how often 2 divides all codes of a row, as far as the ladder goes; 0 for zeros."""
    # The largest power of two that divides a code, of which a row's smallest counts; 2**24 for zero.
    power = torch.where(q == 0, 1 << 24, q & -q).amin(1)
    octaves = torch.minimum(_bit_length(power) - 1, torch.div((LADDER - k).clamp_min(0), 16, rounding_mode="floor"))
    return octaves.masked_fill((q == 0).all(1), 0)


def choose(x: torch.Tensor, size: int) -> tuple[torch.Tensor, Coded, _Reach]:
    """The step of each row, 0 for zeros alone and NAN for a bad row, its codes and its reach; `x` is clean."""
    reach = _reach(x, size)
    x = x.masked_fill(reach.bad[:, None], 0.0)
    k = _rate(x, reach, size)
    own, found = _own_grid(x, reach, k, size)
    k = torch.where(found, own, k)
    # The same row on its coarsest grid, so that encoding what was decoded finds it.
    q = _quantise(x, k)
    octaves = _common_octaves(q, k).masked_fill(found, 0)
    fewer = _measure(q >> octaves[:, None], size)
    octaves = octaves.masked_fill(fewer.bits > layout(x.shape[1], size).budget, 0)
    coded = _measure(q >> octaves[:, None], size)
    return k + 16 * octaves, coded, reach


def spacing(x: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [T, H] -> the step of each value, fp32 [T, H]: 0 in a row of zeros, NaN in a bad one."""
    k, _, reach = choose(x, size)
    step = constants(x.device).steps[k].masked_fill(reach.zero, 0.0).masked_fill(reach.bad, float("nan"))
    return step[:, None].expand(x.shape)
